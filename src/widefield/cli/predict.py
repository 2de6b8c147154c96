"""`widefield predict`, for images on disk: a table, and an overlay per image."""

import argparse
import csv
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.cli.progress import make_progress, streamed_network, tile_bar
from widefield.components.models.image_classifier import ImageClassifier
from widefield.components.models.image_to_image_retriever import ImageToImageRetriever
from widefield.config import load
from widefield.data.pipeline import Picture
from widefield.images import ImageFile, image_endings, images_below, open_image, thumbnail
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.models import ModelInfo, info_of, load_trained
from widefield.inference.prediction import labels_of, predict_samples
from widefield.models import Classifier
from widefield.reports import NoMapError, class_activation, grad_cam, peak, save_overlay

_log = logging.getLogger(__name__)
_SHOWN = 10
"""Failures that an error lists."""
_THUMBNAIL = 1024
"""Long side of the thumbnail under an overlay, in pixels."""


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Write `predictions.csv`, and an overlay PNG per image where the model has a map of the image.

    The folder for the results is made once the checkpoint and the header of an image have been read. The row of an image is on
    disk before the next image is read. An image that fails is named, and the others go on.

    Raises:
        ValueError, OSError, UnsupportedOpError: What the user gave cannot be used; the message says why. If some of several
            images failed, it names them, once all others are done.
    """
    checkpoint, out, level = arguments.checkpoint, arguments.out, arguments.level
    views = None if arguments.tta is None else AveragedViews.parse(arguments.tta)
    files = image_files(arguments.images)
    options = {"memory_budget": arguments.memory_budget, "tile_size": arguments.tile_size}
    streaming = {name: value for name, value in options.items() if value is not None}
    config = None if arguments.config is None else load(arguments.config)
    model: Any = load_trained(checkpoint, streaming=streaming, config=config)
    info, score = info_of(model), "probability"
    if isinstance(model, ImageToImageRetriever):
        info, score = replace(info, class_names=None), "similarity"  # with the items of the collection, by their index
    network = streamed_network(model)
    if not isinstance(model, Classifier) and not hasattr(model, "predict"):
        raise ValueError(f"{checkpoint} holds a {type(model).__name__}, which predicts nothing")
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder with --out DIR")
    table = out / "predictions.csv"
    overlays = dict(zip(files, overlay_paths(files, out), strict=True))
    predicted: list[Path] = []

    def predict_one(file: Path) -> None:
        image = open_image(file, info.level if level is None else level, alpha=info.alpha)
        if isinstance(model, Classifier):
            model.stream_network.normalisation.check_channels(image.shape[0])
        out.mkdir(parents=True, exist_ok=True)
        row = {"image": str(image.path), **_predict(model, info, image, overlays[file], views, score)}
        with table.open("a" if predicted else "w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(row), lineterminator="\n")
            if not predicted:
                writer.writeheader()
            writer.writerow(row)
        predicted.append(file)

    with make_progress() as progress:
        bar = progress.add_task("images", total=len(files))
        if network is not None:
            network.progress = tile_bar(progress)
        try:
            for_each(files, predict_one, lambda: progress.advance(bar))
        finally:
            if predicted:
                _log.info("%d predictions: %s", len(predicted), table)


def for_each(files: Sequence[Path], action: Callable[[Path], None], done: Callable[[], None] = lambda: None) -> None:
    """Call `action` with each file, and `done` after it; a file that fails is logged at once, and the others go on.

    Raises:
        ValueError: Some of several files failed; the message has a line for each of the first of them.
    """
    failed: list[str] = []
    for file in files:
        try:
            action(file)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            if len(files) == 1:
                raise
            reason = (
                f"{type(error).__name__}: {error}" if isinstance(error, (RuntimeError, MemoryError)) else str(error)
            )
            failed.append(reason if str(file) in reason else f"{file}: {reason}")
            _log.warning("left out: %s", failed[-1])
        done()
    if failed:
        more = [f"... and {len(failed) - _SHOWN} more, named above"] if len(failed) > _SHOWN else []
        raise ValueError("\n".join([f"{len(failed)} of {len(files)} images are missing:", *failed[:_SHOWN], *more]))


def _predict(
    model: Any, info: ModelInfo, image: ImageFile, overlay: Path, views: AveragedViews | None, score: str
) -> dict[str, object]:
    """Return the cells of an image's row after its name. Writes the overlay where the model has a map."""
    picture = info.pipeline(image)
    found = explain(model, picture)
    if found is None or views is not None:
        sample = predict_samples(model, [picture], views)[0]
        scores, labels = sample.pred_score.float().cpu(), sample.pred_label.tolist()
    else:
        scores = found[0]
        labels = labels_of(scores, getattr(model, "head", None)).reshape(-1).tolist()
    names = info.names(len(scores))
    predicted = [names[label] for label in labels]
    y, x = "", ""
    if found is not None:
        evidence = found[1].numpy()
        top = f" ({float(scores[labels[0]]):.0%})" if len(labels) == 1 else ""
        draw(overlay, image, picture, evidence, f"{image.path.name}: {', '.join(predicted)}{top}")
        if isinstance(picture, ImageFile):
            y, x = map(str, peak(evidence, image.shape[1:]))
    return {
        **{f"{score}_{name}": f"{value:.6g}" for name, value in zip(names, scores.tolist(), strict=True)},
        "predicted": ";".join(predicted),
        "peak_y": y,
        "peak_x": x,
        "overlay": "" if found is None else overlay.name,
    }


def explain(
    model: Any, picture: Picture, layer: str | None = None, class_index: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Scores and the map of the evidence for a class; None where a model has no map and no layer is asked for."""
    if isinstance(model, Classifier):
        if layer is not None:
            raise ValueError(
                f"the trunk of a Classifier streams, so that {layer} never has its whole output; leave the layer away"
            )
        return class_activation(model, picture[None] if isinstance(picture, Tensor) else picture, class_index)
    if not isinstance(model, ImageClassifier):
        return None
    try:
        return grad_cam(model, picture, layer, class_index)
    except NoMapError:
        if layer is not None:
            raise
        return None


def draw(path: Path, image: ImageFile, picture: Picture, evidence: np.ndarray, title: str) -> None:
    """An overlay on the whole image, or on what the transforms made of it."""
    if isinstance(picture, Tensor):
        under = _as_rgb(picture)
        save_overlay(path, under, evidence, under.shape[:2], None, title)
    else:
        save_overlay(path, thumbnail(image, _THUMBNAIL), evidence, image.shape[1:], image.spacing, title)


def _as_rgb(picture: Tensor) -> np.ndarray:
    """uint8 (H, W, 3): the first three channels, or the first one as grey where there are fewer."""
    top = 1.0 if picture.is_floating_point() else float(torch.iinfo(picture.dtype).max)
    shown = (picture.float() / top).clamp(0, 1).mul(255).byte()
    colours = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
    return colours.permute(1, 2, 0).cpu().numpy()


def image_files(images: Sequence[Path]) -> list[Path]:
    """Return the files named, whatever their names, and the image files below the folders named, once each.

    Raises:
        FileNotFoundError: A file does not exist, or a folder holds no image files.
    """
    files: dict[Path, None] = {}
    for path in images:
        inside = images_below(path) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(
                f"the folder {path} holds no image files; they end in {', '.join(image_endings())}, and a file of another name "
                "can be named itself"
            )
        if not path.exists():
            raise FileNotFoundError(f"cannot read {path}: there is no such file")
        files.update(dict.fromkeys(inside))
    return list(files)


def overlay_paths(files: Sequence[Path], out: Path) -> list[Path]:
    """A PNG in `out` for each file, named after it; equal names get the number of the image."""
    names = Counter(file.name for file in files)
    return [
        out / (f"{file.name}.png" if names[file.name] == 1 else f"{file.name}.{number}.png")
        for number, file in enumerate(files, start=1)
    ]
