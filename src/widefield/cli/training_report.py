"""The page about a run of `widefield fit`."""

import json
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from widefield.cli.history import Seen
from widefield.cli.predict import explain
from widefield.cli.predict_maps import predict_map
from widefield.components.models.features import left_out
from widefield.data import LazyImages
from widefield.errors import WidefieldError
from widefield.images import ImageFile, LabelMap, open_image
from widefield.inference.names import CONFIG
from widefield.inference.prediction import labels_of, task_of
from widefield.models import Classifier, FromCheckpoint, MapRegressor, Segmenter
from widefield.reports import Page, plain_step_bytes, save_overlay
from widefield.reports.charts import Line, confusion, curves, memory_bars, scatter
from widefield.reports.figures import as_png
from widefield.reports.label_overlay import compared_maps, label_overlay
from widefield.streaming import LazyImage, Plan
from widefield.streaming.budget import format_bytes
from widefield.streaming.tiles import pixel_dtype

_log = logging.getLogger(__name__)
_SHOWN = 3
"""Images whose label maps a report shows."""
_WORST = 4
"""Images that a report shows of those with the worst predictions."""
_MOST_CLASSES = 30
"""Classes up to which a report has the whole confusion matrix; of more, their most frequent mistakes."""
_ENDS = ("_min", "_max")


def write_training_report(
    out: Path,
    model: FromCheckpoint,
    data: LazyImages,
    rows: list[dict[str, float]],
    peak: int | None,
    seen: Sequence[Seen],
) -> None:
    """Write `out/report.html`: what was trained on what, how well, which images are mistaken, and how it is streamed.

    Args:
        out: The folder of the run.
        model: As the last epoch left it. It is left in evaluation mode.
        data: What it was trained on.
        rows: The numbers of each epoch.
        peak: Measured peak memory of a training step above that between steps, in bytes, if known.
        seen: What was predicted in the last validation, in this process.
    """
    page = Page(f"Training of {model.hparams['model_name']}")
    counts = len(data.train_set), len(data.val_set)
    page.paragraph(
        f"Trained for {len(rows)} epoch{'s' * (len(rows) != 1)} on {counts[0]} images, at {_scale(data)}, to predict "
        f"{data.described}; "
        f"{counts[1]} other images tell how well that went."
    )
    complete = len(seen) == counts[1]  # of several processes each has seen a part
    if complete and seen and task_of(model) == "classification":
        hits = sum(int(one.predicted.argmax()) == int(one.target) for one in seen)
        page.paragraph(
            f"In the last epoch, {hits} of {counts[1]} of these were classified right ({hits / counts[1]:.0%})."
        )
    _add_numbers(page, rows, peak)
    step = largest_step(data) if model.reads_pixels else None
    plan = None if step is None else model.stream_network.plan(step[0], *step[1], mask=step[2])
    model.eval()
    if isinstance(model, Segmenter):
        _add_label_maps(page, model, data)
    elif isinstance(model, MapRegressor):
        _add_number_maps(page, model, data)
    elif isinstance(model, Classifier) and seen:
        if complete:
            _add_validation(page, model, seen)
            _add_worst(page, model, seen)
        else:
            page.paragraph("Several processes validated images of their own; `widefield test` counts all of them.")
    if step is not None and plan is not None:
        _add_memory(page, model, step[0], plan, peak, out)
    page.write(out / "report.html")


def write_curves(out: Path, name: str, rows: list[dict[str, float]], peak: int | None) -> None:
    """Write `out/report.html` of a model of components: how it learned, and the configuration.

    Args:
        out: The folder of the run.
        name: What was trained.
        rows, peak: See `write_training_report`.
    """
    page = Page(f"Training of {name}")
    _add_numbers(page, rows, peak)
    with page.folded("Configuration"):
        page.code((out / CONFIG).read_text(encoding="utf-8"))
    page.write(out / "report.html")


def _add_numbers(page: Page, rows: Sequence[dict[str, float]], peak: int | None) -> None:
    """Add the last numbers, the learning curves, and the numbers of every epoch."""
    last = {name.removeprefix("val_"): value for name, value in (rows or [{}])[-1].items() if name.startswith("val_")}
    memory = [] if peak is None else [("measured peak of a step", format_bytes(peak))]
    page.numbers(
        [("epochs", len(rows)), *((f"{name}, validation", value) for name, value in [*last.items()][:5]), *memory]
    )
    if rows:
        page.heading("Learning curves")
        for lines in _grouped(rows):
            page.chart(
                curves(lines),
                "band: least and greatest loss of a step, as far as the chart reaches"
                if lines[0].low is not None
                else "",
            )
        with page.folded("Numbers of every epoch"):
            names = list(dict.fromkeys(name for row in rows for name in row))
            page.table(names, [[row.get(name) for name in names] for row in rows])


def _scale(data: Any) -> str:
    spacing, level = data.options["spacing"], data.options["level"]
    return f"level {level or 0}" if spacing is None else f"{spacing:g} micrometres per pixel"


def _grouped(rows: Sequence[Mapping[str, float]]) -> list[list[Line]]:
    """Return lines for charts, those of a chart together: training and validation of a metric, and metrics of a kind."""
    names = dict.fromkeys(name for row in rows for name in row if name != "epoch" and not name.endswith(_ENDS))
    epochs = [row["epoch"] for row in rows]
    groups: dict[str, list[Line]] = {}
    for name in names:
        values, *ends = ([row.get(name + end, float("nan")) for row in rows] for end in ("", *_ENDS))
        band = ends if any(name + _ENDS[0] in row for row in rows) else (None, None)
        kind = name.removeprefix("train_").removeprefix("val_").partition("_")[0]
        groups.setdefault(kind, []).append(Line(name, epochs, values, *band))
    order = sorted(groups, key=lambda kind: (kind != "loss", kind.startswith("lr-")))
    return [sorted(groups[kind], key=lambda line: not line.name.startswith("train_")) for kind in order]


def _add_validation(page: Page, model: Classifier, seen: Sequence[Seen]) -> None:
    """Add what was predicted against what is true, by the task; of survival nothing, as its targets are no predictions."""
    names, task = model.class_names, task_of(model)
    predicted, true = torch.stack([one.predicted for one in seen]), torch.stack([one.target for one in seen])
    if task == "classification":
        matrix = np.zeros((len(names), len(names)), np.int64)
        np.add.at(matrix, (true.numpy(), predicted.argmax(1).numpy()), 1)
        page.heading("Confusion matrix of the last validation")
        add_confusion(page, matrix, names)
    elif task == "multilabel":
        found, is_true = predicted >= 0.5, true >= 0.5
        page.heading("Labels of the last validation")
        hits = (found & is_true).sum(0).numpy()
        _add_classes(page, names, hits, is_true.sum(0).numpy(), found.sum(0).numpy())
    elif task == "regression":
        page.heading("Predictions of the last validation")
        for name, x, y in zip(names, true.T.tolist(), predicted.T.tolist(), strict=True):
            page.chart(scatter(x, y, [_name(one) for one in seen], f"true {name}", f"predicted {name}"))


def add_confusion(page: Page, matrix: np.ndarray, names: Sequence[str]) -> None:
    """Add a confusion matrix (C, C) with true classes as rows, or its greatest mistakes, and the numbers of each class."""
    if len(names) <= _MOST_CLASSES:
        page.chart(confusion(matrix, names), "true classes are rows; colour is the share of the true class", wide=True)
    else:
        mistakes = matrix - np.diag(matrix.diagonal())
        worst = np.argsort(mistakes, axis=None)[::-1][:_MOST_CLASSES]
        places = [divmod(int(at), len(names)) for at in worst if mistakes.flat[at]]
        page.table(
            ("true class", "predicted class", "times"), [(names[i], names[j], int(matrix[i, j])) for i, j in places]
        )
    _add_classes(page, names, matrix.diagonal(), matrix.sum(1), matrix.sum(0))


def _add_classes(page: Page, names: Sequence[str], hits: np.ndarray, true: np.ndarray, found: np.ndarray) -> None:
    """Add a table of each class: how many there are, precision, recall and F1, where they are defined."""

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    page.table(
        ("class", "true", "predicted", "precision", "recall", "F1"),
        [
            (name, t, p, share(hit, p), share(hit, t), share(2 * hit, t + p))
            for name, hit, t, p in zip(names, hits.tolist(), true.tolist(), found.tolist(), strict=True)
        ],
    )


def _name(one: Seen) -> str:
    return one.image.path.name


def _add_worst(page: Page, model: Classifier, seen: Sequence[Seen]) -> None:
    """Add the images with the greatest errors, with the evidence for what was predicted where there is a map of it."""
    task = task_of(model)
    if task == "survival":
        return
    errors = [_error(one, model) for one in seen]
    worst = sorted(range(len(seen)), key=lambda k: -errors[k])[:_WORST]
    if task == "classification":
        worst = [k for k in worst if int(seen[k].predicted.argmax()) != int(seen[k].target)]
    page.heading("Worst mistakes of the last validation")
    if not worst:
        page.paragraph("No image was mistaken.")
        return
    page.table(
        ("image", "true", "predicted", "error"), [(_name(seen[k]), *_told(seen[k], model), errors[k]) for k in worst]
    )
    page.paragraph(
        {
            "classification": "The error is the negative logarithm of the probability of the true class.",
            "multilabel": "The error is the mean cross-entropy of the labels.",
            "regression": "The error is the distance to the true numbers, in standard deviations of the training images.",
        }[task]
    )
    if not model.reads_pixels:
        return
    with tempfile.TemporaryDirectory(prefix="widefield-") as folder:
        for k in worst:
            path, (true, predicted) = Path(folder) / f"{k}.png", _told(seen[k], model)
            try:
                found = explain(model, seen[k].image)
                assert found is not None
                save_overlay(path, seen[k].image, found[1], _name(seen[k]))
            except (WidefieldError, ValueError, OSError) as error:  # a picture that is missing ends no run
                _log.warning("no heatmap of %s: %s", seen[k].image.path, error)
                continue
            page.picture(path.read_bytes(), f"{_name(seen[k])}: predicted {predicted}, true {true}", wide=True)


def _error(one: Seen, model: Classifier) -> float:
    """Return how wrong a prediction is, by the task; see `_add_worst`."""
    task, tiny = task_of(model), torch.finfo(torch.float32).tiny
    if task == "classification":
        return float(-one.predicted[int(one.target)].clamp_min(tiny).log())
    if task == "multilabel":
        return float(functional.binary_cross_entropy(one.predicted, one.target.float()))
    return float((one.predicted - one.target).div(torch.tensor(model.target["std"])).norm())


def _told(one: Seen, model: Classifier) -> tuple[str, str]:
    """Return words for the target and for the prediction."""
    names, task = model.class_names, task_of(model)
    if task == "regression":
        both = (
            (f"{name} {value:.4g}" for name, value in zip(names, x.tolist(), strict=True))
            for x in (one.target, one.predicted)
        )
        true, predicted = (", ".join(texts) for texts in both)
        return true, predicted
    labels: Tensor = one.target if task == "classification" else one.target.nonzero()

    def text(found: Tensor) -> str:
        return ", ".join(names[k] for k in found.flatten().tolist()) or "none"

    return text(labels), f"{text(labels_of(one.predicted, model))} ({float(one.predicted.max()):.0%})"


def _add_label_maps(page: Page, model: Segmenter, data: LazyImages) -> None:
    """Add the confusion matrix of the last validation, and validation images with their labels and with what is predicted."""
    names = model.class_names
    if (matrix := model.tables.get("val_confusion_matrix")) is not None:
        page.heading("Confusion matrix of the last validation, in pixels")
        add_confusion(page, matrix.cpu().numpy(), names)
    if model.class_weights is not None:
        shown = zip(names, model.class_weights, strict=True)
        page.paragraph(f"Class weights of the loss: {', '.join(f'{name} {weight:.4g}' for name, weight in shown)}.")
    page.heading("Label maps of validation images")
    for image, labels, predicted in _predicted(model, data):
        for what, each in (("labels", labels), ("predicted", predicted)):
            title = f"{image.path.name}: {what}"
            page.picture(as_png(label_overlay(image, each, names, title)), title)


def _add_number_maps(page: Page, model: MapRegressor, data: LazyImages) -> None:
    """Add validation images with their targets and what is predicted."""
    page.heading("Maps of validation images")
    for image, target, predicted in _predicted(model, data):
        name = image.path.name
        page.picture(as_png(compared_maps(image, target, predicted, name)), f"{name}: target and prediction", wide=True)


def _predicted(model: Segmenter | MapRegressor, data: LazyImages) -> Iterator[tuple[Any, Any, ImageFile]]:
    """Yield the first validation images with their maps, and those that the model predicts, which are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="widefield-") as folder:
        for k in range(min(_SHOWN, len(data.val_set))):
            image, true = data.val_set[k]
            predict_map(model, image, Path(folder) / f"{k}.tif", None)
            yield image, true, open_image(Path(folder) / f"{k}.tif")


def largest_step(data: LazyImages) -> tuple[tuple[int, ...], list[Any], Any]:
    """Return the shape of the largest image of a training step, its maps, as `StreamingCNN.plan` takes them, and its mask.

    The shape is (C, H, W) of an image, and (N, C, H, W) of a batch of crops.
    """
    crop = getattr(data, "crop", None) or math.inf
    pairs: Iterator[Any] = iter(data.train_set)
    image, target = max(pairs, key=lambda pair: math.prod(min(crop, n) for n in pair[0].shape[1:]))
    if crop == math.inf:
        maps = [target] if isinstance(target, LazyImage) else []
        return image.shape, maps, left_out(image.background).get("mask")
    size = [min(crop, n) for n in image.shape[1:]]
    leading = () if isinstance(target, LabelMap) else target.shape[:1]
    labels = torch.empty(data.batch_size, *leading, *size, dtype=pixel_dtype(target), device="meta")
    return (data.batch_size, image.shape[0], *size), [labels], None


def _add_memory(
    page: Page, model: FromCheckpoint, shape: tuple[int, ...], plan: Plan, peak: int | None, out: Path
) -> None:
    """Add the memory of the largest training step, of an image or batch of `shape`, and write it to `memory.json`."""
    crops, (channels, height, width) = shape[:-3], shape[-3:]
    plain = plain_step_bytes(model.stream_network.module, (channels, height, width)) * math.prod(crops)
    largest = f"The largest step is that of {crops[0]} crop(s) of" if crops else "The largest image has"
    budget = model.stream_network.memory_budget
    page.heading("Memory of a training step")
    against = (
        "no memory budget was given"
        if budget is None
        else f"the memory budget, {format_bytes(budget)}, is the dashed line"
    )
    page.paragraph(
        f"{largest} {height} x {width} pixels. It is streamed in {plan.steps} steps of "
        f"{plan.tile_size[0]} x {plan.tile_size[1]} pixels, about {plan.predicted_overhead:.2f} times as long as a plain step. "
        f"In one piece, the activations alone would take {format_bytes(plain)}."
    )
    page.chart(
        memory_bars(plan.predicted_bytes, {"measured peak": peak}, budget),
        f"planned memory by kind; {against}",
        wide=True,
    )
    page.table(["the largest training step", "memory"], memory_rows(peak, plain))
    with page.folded("The plan, layer by layer"):
        page.code(str(plan))
    memory = {"streamed_peak_bytes": peak, "plain_step_bytes": plain, "image_shape": [channels, height, width]}
    (out / "memory.json").write_text(json.dumps(memory), encoding="utf-8")


def memory_rows(peak: int | None, plain: int) -> list[tuple[str, str]]:
    """Rows for a table: the measured peak, and what a plain step would have kept."""
    return [
        ("streamed: measured peak, above the memory between steps", "unknown" if peak is None else format_bytes(peak)),
        ("plain: computed, the activations that autograd keeps for the backward pass", format_bytes(plain)),
    ]
