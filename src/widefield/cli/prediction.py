"""Predictions for images on disk: a table, and an overlay per image."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from widefield.cli.history import write_csv
from widefield.cli.progress import TileTask, make_progress
from widefield.images import LazyImage, open_image, thumbnail
from widefield.models import Classifier
from widefield.reports import class_activation, peak, save_overlay

_log = logging.getLogger(__name__)
_THUMBNAIL = 1024
"""Long side of the thumbnail under an overlay, in pixels."""


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one image."""

    image: LazyImage
    probabilities: tuple[float, ...]
    label: str
    peak: tuple[int, int]
    """(y, x) in pixels of the image: where the evidence for the predicted class is greatest; see `class_activation`."""
    overlay: Path


def predict(
    checkpoint: Path,
    images: Sequence[Path],
    out: Path,
    *,
    level: int | None = None,
    memory_budget: int | str | None = None,
    tile_size: int | None = None,
) -> list[Prediction]:
    """Write `out/predictions.csv` and an overlay PNG per image.

    Args:
        checkpoint: A file that `fit` wrote.
        images: Files, or folders of which every visible file is taken.
        out: Folder for the results; made once the checkpoint and the header of every image have been read.
        level: Level of the pyramids; None takes the one trained on.
        memory_budget, tile_size: See `StreamingCNN`.

    Raises:
        ValueError, OSError, UnsupportedOpError: What the user gave cannot be used; the message says why.
    """
    files = _files(images)
    model, content = Classifier.from_checkpoint(checkpoint, memory_budget=memory_budget, tile_size=tile_size)
    if level is None:
        level = content["LabelledImages"]["level"]
    opened = [open_image(file, level) for file in files]
    for image in opened:
        model.stream_network.normalisation.check_channels(image.shape[0])
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder with --out DIR")
    out.mkdir(parents=True, exist_ok=True)
    predictions = []
    with make_progress() as progress:
        bar = progress.add_task("images", total=len(opened))
        model.stream_network.progress = TileTask(progress).update
        for image, overlay in zip(opened, _overlay_paths(files, out), strict=True):
            predictions.append(_predict(model, image, overlay))
            progress.advance(bar)
    write_csv(out / "predictions.csv", [_row(prediction, model.class_names) for prediction in predictions])
    _log.info("%d predictions: %s", len(predictions), out / "predictions.csv")
    return predictions


def _predict(model: Classifier, image: LazyImage, overlay: Path) -> Prediction:
    probabilities, evidence = class_activation(model, image)
    index = int(probabilities.argmax())
    label = model.class_names[index]
    size = image.shape[1:]
    title = f"{image.path.name}: {label} ({float(probabilities[index]):.0%})"
    save_overlay(overlay, thumbnail(image, _THUMBNAIL), evidence.numpy(), size, image.spacing, title)
    return Prediction(image, tuple(probabilities.tolist()), label, peak(evidence.numpy(), size), overlay)


def _row(prediction: Prediction, class_names: Sequence[str]) -> dict[str, object]:
    named = zip(class_names, prediction.probabilities, strict=True)
    return {
        "image": str(prediction.image.path),
        **{f"probability_{name}": f"{probability:.6g}" for name, probability in named},
        "predicted": prediction.label,
        "peak_y": prediction.peak[0],
        "peak_x": prediction.peak[1],
        "overlay": prediction.overlay.name,
    }


def _files(images: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named, once each."""
    files: dict[Path, None] = {}
    for path in images:
        if not path.is_dir():
            files[path] = None
            continue
        inside = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not inside:
            raise FileNotFoundError(f"the folder {path} holds no files; name image files, or a folder of them")
        files.update(dict.fromkeys(inside))
    return list(files)


def _overlay_paths(files: Sequence[Path], out: Path) -> list[Path]:
    """A PNG in `out` for each file, named after it; equal names get the number of the image."""
    names = Counter(file.name for file in files)
    return [
        out / (f"{file.name}.png" if names[file.name] == 1 else f"{file.name}.{number}.png")
        for number, file in enumerate(files, start=1)
    ]
