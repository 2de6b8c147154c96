"""`widefield predict`, for images on disk: a table, and heatmaps of each image."""

import argparse
import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from widefield.cli.predict_maps import ending_of, predict_map
from widefield.cli.predictions import PredictionTable, Row
from widefield.cli.progress import streamed_network
from widefield.cli.run import console
from widefield.components.models.image_classifier import ImageClassifier
from widefield.components.models.image_to_image_retriever import ImageToImageRetriever
from widefield.config import load
from widefield.data.pipeline import Picture
from widefield.images import ImageFile, image_endings, images_below
from widefield.images.map_geotiff import import_rasterio
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.hub import fetch
from widefield.inference.masks import keep_background_if_usable
from widefield.inference.models import ModelInfo, checkpoint_file, info_of, load_trained
from widefield.inference.prediction import labels_of, predict_samples, row_of, task_of
from widefield.models import Classifier
from widefield.modules import DenseModule
from widefield.reports import Heatmap, NoMapError, ProgressLine, cells_of, class_activation, grad_cam, save_overlay
from widefield.streaming import StreamingCNN

_log = logging.getLogger(__name__)
_SHOWN = 10
"""Failures that an error lists."""
_BESIDE = (".xml", ".ovr", ".msk", ".tfw", ".tifw", ".jgw", ".pgw", ".wld")
"""Endings of files that stand beside an image of the same name (`scene.tif.aux.xml`, `scene.tif.ovr`): no images, though some could
be read as one."""
ENDINGS = {"png": ".png", "tiff": ".ome.tif", "geotiff": ".tif", "geojson": ".geojson"}
"""Endings of the names of heatmaps, by format; "tiff" is a "geotiff" where the image is a map."""


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Write `predictions.csv`, and the heatmaps of each image where the model has a map of it.

    The folder for the results is made once the checkpoint and the header of an image have been read. The row of an image is on
    disk before the next image is read. An image that fails gets a row with the reason, and the others go on.

    Raises:
        ValueError, OSError, UnsupportedOpError: What the user gave cannot be used; the message says why. If some of several
            images failed, it names them, once all others are done.
    """
    views = None if arguments.tta is None else AveragedViews.parse(arguments.tta)
    files = image_files(arguments.images)
    checkpoint = fetch(arguments.checkpoint) if isinstance(arguments.checkpoint, str) else arguments.checkpoint
    model = _load(checkpoint, arguments)
    info = info_of(model).with_foreground(arguments.foreground, len(files))
    if isinstance(model, ImageToImageRetriever):
        info = replace(info, class_names=None)  # its scores are those of the items of the collection, by their index
    _refuse_conflicts(model, info, arguments)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    with checkpoint_file(checkpoint).open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    given = {name: getattr(arguments, name) for name in ("level", "spacing", "tta")}
    table = PredictionTable(arguments.out, {"checkpoint": digest, **given, "foreground": info.foreground})
    failed = None if len(files) == 1 else table.add_failure
    if arguments.resume:
        files = table.resume(files)
    else:
        table.refuse_another()

    def predict_one(file: Path) -> None:
        image = info.open(file, level=arguments.level, spacing=arguments.spacing)
        stem = str(arguments.out / free_stem(file, table.names))
        if isinstance(model, DenseModule):
            cells, written = _write_map(model, image, stem, arguments.heatmap)
        else:
            cells, written = _predict_one(model, info, image, views, stem, arguments)
        table.add(file, {**cells, "overlay": ";".join(path.name for path in written)})

    with ProgressLine(streamed_network(model), console=console) as line:
        line.update(0, len(files))
        try:
            for_each(files, predict_one, lambda done: line.update(done, len(files)), failed)
        finally:
            table.finish()


def _load(checkpoint: Path, arguments: argparse.Namespace) -> Any:
    """Return the model in a checkpoint, with what the arguments say of its memory."""
    options = {"memory_budget": arguments.memory_budget, "tile_size": arguments.tile_size}
    streaming = {name: value for name, value in options.items() if value is not None}
    config = None if arguments.config is None else load(arguments.config)
    model: Any = load_trained(checkpoint, streaming=streaming, config=config)
    if not (isinstance(model, (DenseModule, Classifier)) or hasattr(model, "predict")):
        raise ValueError(f"{checkpoint} holds a {type(model).__name__}, which predicts nothing")
    return model


def _refuse_conflicts(model: Any, info: ModelInfo, arguments: argparse.Namespace) -> None:
    """Raise a ValueError if what is asked for cannot be had of this model."""
    others = set(arguments.heatmap) - {"png"}
    if isinstance(model, DenseModule) and (arguments.tta is not None or others):
        raise ValueError(
            "this model predicts maps, which are written as TIFF, labels with an overlay as PNG: leave --tta and other --heatmap "
            "out; widefield.images.polygons makes GeoJSON of a label map"
        )
    if info.pipeline.description and others:
        raise ValueError(
            f"--heatmap {','.join(arguments.heatmap)}: the transforms of the run change images before the model sees them, so that "
            "its heatmap cannot be laid over the file; leave all but png away"
        )


def _write_map(model: DenseModule, image: ImageFile, stem: str, formats: Sequence[str]) -> tuple[Row, list[Path]]:
    """Write the map of an image, and the overlay of labels; return the cells of its row, and the files."""
    written = [Path(stem + ending_of(model, image))]
    if model.task == "segmentation":
        written += [Path(stem + ENDINGS[one]) for one in formats]
    return predict_map(model, image, *written), written


def _predict_one(
    model: Any, info: ModelInfo, image: ImageFile, views: AveragedViews | None, stem: str, arguments: argparse.Namespace
) -> tuple[Row, list[Path]]:
    """Predict the scores of an image, and write its heatmaps; return the cells of its row, and the files."""
    named = {"tiff": "tiff" if image.transform is None else "geotiff"}
    formats = [named.get(one, one) for one in arguments.heatmap]
    if "geotiff" in formats:
        import_rasterio("a heatmap on a map (GeoTIFF)")  # rather than after hours of computing
    if isinstance(model, Classifier) and model.reads_pixels:
        model.stream_network.normalisation.check_channels(image.shape[0])
    keep_background_if_usable(model, image)
    picture = info.pipeline(image)
    cells, name, score, heatmap = _predict(model, info, picture, views)
    written = []
    for one in formats:
        if heatmap is None:
            break
        written.append(path := Path(stem + ENDINGS[one]))
        if one == "png":
            save_overlay(path, picture, heatmap, f"{image.path.name}: {name} ({score})")
        elif one == "geojson":
            heatmap.save_geojson(path, name, arguments.thresholds)
        else:
            (heatmap.save_tiff if one == "tiff" else heatmap.save_geotiff)(path, name)
    return {**cells, "skipped": _skipped(streamed_network(model), image)}, written


def for_each(
    files: Sequence[Path],
    action: Callable[[Path], None],
    done: Callable[[int], None] = lambda count: None,
    failed: Callable[[Path, str], None] | None = None,
) -> None:
    """Call `action` with each file, and `done` after it; a file that fails is logged at once, and the others go on.

    Args:
        files: In this order.
        action: May raise whatever it likes.
        done: Called after each file with how many are done.
        failed: Called with each file that failed and the reason; None raises the error itself where there is one file alone.

    Raises:
        ValueError: Some of several files failed; the message has a line for each of the first of them.
    """
    reasons: list[str] = []
    for count, file in enumerate(files, 1):
        try:
            action(file)
        except Exception as error:
            if len(files) == 1 and failed is None:
                raise
            _log.debug("the error came from here", exc_info=True)
            told = isinstance(error, (OSError, ValueError))
            reason = str(error) if told else f"{type(error).__name__}: {error}"
            if failed is not None:
                failed(file, reason)
            reasons.append(reason if str(file) in reason else f"{file}: {reason}")
            _log.warning("failed: %s", reasons[-1])
        done(count)
    if reasons:
        more = [f"... and {len(reasons) - _SHOWN} more, named above"] if len(reasons) > _SHOWN else []
        raise ValueError("\n".join([f"{len(reasons)} of {len(files)} images failed:", *reasons[:_SHOWN], *more]))


def _predict(
    model: Any, info: ModelInfo, picture: Picture, views: AveragedViews | None
) -> tuple[Row, str, str, Heatmap | None]:
    """Return the cells of an image's row; the name of the highest score, words for that score, and the heatmap of its evidence."""
    heatmap: Heatmap | None = None
    if views is None and (found := explain(model, picture)) is not None:
        scores, heatmap = found
        labels = labels_of(scores, model)
    else:
        sample = predict_samples(model, [picture], views)[0]
        scores, labels = sample.pred_score.float().cpu(), sample.pred_label
        found = None if views is None else explain(model, picture, class_index=int(scores.argmax()))
        heatmap = None if found is None else found[1]
    if not bool(scores.isfinite().all()):
        raise ValueError("the scores are NaN or infinite; look for such pixels in the image, and for such weights")
    names = info.names(len(scores))
    row = row_of(scores, labels, model, names)
    cells = {column: value if isinstance(value, str) else f"{value:.6g}" for column, value in row.items()}
    cells |= _peak(heatmap if isinstance(picture, ImageFile) else None)
    told = f"{float(scores.max()):.4g}" if task_of(model) == "regression" else f"{float(scores.max()):.0%}"
    return cells, names[int(scores.argmax())], told, heatmap


@torch.no_grad()  # as the image was computed
def _skipped(network: StreamingCNN | None, image: ImageFile) -> str:
    """Return the cell for the share of the computation of an image that was skipped as background."""
    if network is None or image.background is None:
        return "0"
    return f"{1 - network.plan(image.shape, mask=image.background.mask).computed_fraction:.3g}"


def _peak(heatmap: Heatmap | None) -> Row:
    """Return the cells for where the evidence is greatest: a pixel of the largest level, its middle in micrometres and on the map.

    Those that are not known are empty.
    """
    cells = {f"peak_{axis}{unit}": "" for unit in ("", "_um", "_map") for axis in "yx"}
    if heatmap is None or heatmap.peak is None:
        return cells
    (y, x), spacing = heatmap.peak, heatmap.spacing
    cells |= {"peak_y": str(y), "peak_x": str(x)}
    micrometres = None if spacing is None else (spacing[1], 0, 0, 0, spacing[0], 0)
    for unit, transform in (("um", micrometres), ("map", heatmap.transform)):
        if transform is not None:
            a, b, c, d, e, f = transform
            cells[f"peak_y_{unit}"] = f"{d * (x + 0.5) + e * (y + 0.5) + f:.10g}"
            cells[f"peak_x_{unit}"] = f"{a * (x + 0.5) + b * (y + 0.5) + c:.10g}"
    return cells


def explain(
    model: Any, picture: Picture, layer: str | None = None, class_index: int | None = None
) -> tuple[Tensor, Heatmap] | None:
    """Scores and the heatmap of the evidence for a class; None where a model has no map and no layer is asked for."""
    if isinstance(model, Classifier):
        if not model.reads_pixels:
            return None
        if layer is not None:
            raise ValueError(
                f"the trunk of a Classifier streams, so that {layer} never has its whole output; leave the layer away"
            )
        image = picture[None] if isinstance(picture, Tensor) else picture
        scores, evidence = class_activation(model, image, class_index)
    elif isinstance(model, ImageClassifier):
        try:
            scores, evidence = grad_cam(model, picture, layer, class_index)
        except NoMapError:
            if layer is not None:
                raise
            return None
    else:
        return None
    return scores, Heatmap.of(evidence, cells_of(model, picture, evidence, layer), picture)


def image_files(images: Sequence[Path]) -> list[Path]:
    """Return the files named and the image files below the folders named, once each.

    Of several files that are named, as `slides/*` names them, those that stand beside an image (`scene.tif.ovr`) are left out.

    Raises:
        FileNotFoundError: A file does not exist, or there are no image files.
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
        if path.is_file() and len(images) > 1 and path.name.lower().endswith(_BESIDE):
            _log.info("left out, as it stands beside an image and is none: %s", path)
        else:
            files.update(dict.fromkeys(inside))
    if not files:
        raise FileNotFoundError(
            f"none of {', '.join(map(str, images))} is an image; name image files, or folders of them"
        )
    return list(files)


def free_stem(file: Path, taken: Collection[str]) -> str:
    """Return how the names of what is written of a file begin: as its own, with a number behind it where names are `taken`."""
    stems = (file.name if number == 1 else f"{file.name}.{number}" for number in range(1, len(taken) + 2))
    return next(stem for stem in stems if not any(stem + ending in taken for ending in ENDINGS.values()))
