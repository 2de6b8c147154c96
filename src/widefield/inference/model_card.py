"""Model cards: what a reader of the Hugging Face Hub has to know of a trained model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widefield.inference.names import HUB_CARD
from widefield.models import FromCheckpoint
from widefield.streaming.budget import format_bytes

_USES = {
    "Classifier": (
        "image-classification",
        """\
import widefield

model = widefield.get_model("FOLDER")  # or "hf-hub:OWNER/NAME"
image = widefield.inference.info_of(model).open("slide.tif")  # as the images of the training were opened
scores = model.predictions(model(image))
""",
    ),
    "Segmenter": (
        "image-segmentation",
        """\
import widefield

model = widefield.get_model("FOLDER")  # or "hf-hub:OWNER/NAME"
image = widefield.inference.info_of(model).open("scene.tif")  # as the images of the training were opened
model.stream_network.write(image, "classes.ome.zarr", postprocess="argmax")  # tile by tile, never whole
""",
    ),
    "MapRegressor": (
        "image-to-image",
        """\
import widefield

model = widefield.get_model("FOLDER")  # or "hf-hub:OWNER/NAME"
image = widefield.inference.info_of(model).open("scene.tif")  # as the images of the training were opened
model.stream_network.write(image, "map.ome.zarr")  # tile by tile, never whole
""",
    ),
    "Backbone": (
        "image-feature-extraction",
        """\
import widefield

backbone = widefield.get_model("FOLDER")  # or "hf-hub:OWNER/NAME"; a plain module, for images that are normalised already
streamed = widefield.stream(backbone)  # for images of any size
""",
    ),
}
"""The task of each kind on the hub, and how it is used."""


def write_card(
    folder: Path,
    kind: str,
    model: Mapping[str, Any],
    images: Mapping[str, Any],
    training: Mapping[str, Any],
    made: nn.Module,
) -> None:
    """Write `README.md` in `folder`: metadata of the hub, and in words what stands in `config.json`, the training and the plan.

    Args:
        folder: Where it is written.
        kind, model, images, training: See `widefield.inference.hub.Saved`.
        made: The model itself, which is planned.
    """
    from huggingface_hub import ModelCard, ModelCardData

    task, use = _USES[kind]
    name = str(model["name"] if kind == "Backbone" else model["model_name"])
    data = ModelCardData(library_name="widefield", pipeline_tag=task, tags=["widefield", kind.lower()])
    parts = [
        f"# {name}",
        f"A {kind.lower()} trained with Widefield, on images of any size, tile by tile with the results of the whole image. "
        "The folder holds weights and plain data, and no code.",
        "```sh\nwidefield predict --checkpoint FOLDER images/  # or in Python:\n```" if kind != "Backbone" else "",
        f"```python\n{use}```",
        "## Images",
        _table("what", "value", _of_images(kind, model, images)),
    ]
    if kind != "Backbone":
        parts += ["## Classes", "\n".join(f"{k}. {one}" for k, one in enumerate(images["class_names"]))]
    if kind != "Backbone" and (task_of := model.get("target")):
        parts.append("Task: " + ", ".join(f"{key} {value}" for key, value in task_of.items()) + ".")
    parts += ["## Training", _table("what", "value", _of_training(training))]
    if metrics := training.get("metrics"):
        parts += ["Of the epoch that was kept:", _table("metric", "value", metrics.items())]
    if isinstance(made, FromCheckpoint) and made.reads_pixels:
        parts += ["## Memory", _memory(made, model, training)]
    text = "\n\n".join(part for part in parts if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / HUB_CARD)


def _of_images(kind: str, model: Mapping[str, Any], images: Mapping[str, Any]) -> list[tuple[str, str]]:
    if kind == "Backbone":
        normalize = images["normalize"]
        return [
            ("channels", str(model["channels"])),
            ("values that stand for 0 and 1", _shown(images["value_range"], "the range of their type")),
            ("mean, standard deviation", f"{_shown(normalize['mean'])}, {_shown(normalize['std'])}"),
        ]
    opening, pixels = images["opening"], images["pixels"]
    spacing, level = opening.get("spacing"), opening.get("level")
    rows = [
        ("resolution", f"{spacing:g} micrometres per pixel" if spacing else f"level {level or 0}, 0 being the largest"),
        ("channels", f"{model['in_channels']}" if not opening.get("channels") else _shown(opening["channels"])),
        ("pixels", f"{pixels[0]} x {pixels[1]}" if pixels else "not recorded"),
        ("values that stand for 0 and 1", _shown(model["value_range"], "0 and the largest of their type")),
        ("mean, standard deviation", f"{_shown(model['mean'])}, {_shown(model['std'])}"),
        ("background", {"none": "computed"}.get(images["foreground"], f"left out: {images['foreground']}")),
    ]
    if str(model["model_name"]).startswith("patches:"):
        rows.append(("side of a patch", f"{model['patch_size']} pixels"))
    return rows


def _of_training(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(training[name])) for name in ("method", "epochs", "steps") if name in training]
    memory = training.get("memory", {})
    if shape := memory.get("image_shape"):
        rows.append(("largest image", " x ".join(map(str, shape))))
    for key, what in (("streamed_peak_bytes", "peak of a step, measured"), ("plain_step_bytes", "of a plain step")):
        if memory.get(key):
            rows.append((f"memory {what}", format_bytes(memory[key])))
    return rows or [("epochs", "not recorded")]


def _memory(made: FromCheckpoint, model: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    shape = training.get("memory", {}).get("image_shape") or (model["in_channels"], 8192, 8192)
    with torch.no_grad():
        plan = made.stream_network.plan(tuple(shape))
    return f"The plan of a prediction, on the machine that wrote this:\n\n```text\n{plan.summary}\n```"


def _shown(value: Any, default: str = "none") -> str:
    if value is None:
        return default
    return ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value)


def _table(left: str, right: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
