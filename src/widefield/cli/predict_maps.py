"""`widefield predict` of a network that gives a class or numbers for each pixel: a map, the overlay of classes, and its row."""

from pathlib import Path

import torch

from widefield.cli.predictions import Row
from widefield.components.models.features import left_out
from widefield.images import ImageFile, open_image
from widefield.images.label_maps import class_counts
from widefield.inference.masks import keep_background_if_usable
from widefield.modules import DenseModule
from widefield.reports.label_overlay import save_label_overlay


def ending_of(model: DenseModule, image: ImageFile) -> str:
    """Return the ending of the map of an image: a GeoTIFF for one with a place on the earth, else an OME-TIFF.

    A word stands before it, so that its name is not that of an image.
    """
    word = "labels" if model.task == "segmentation" else "map"
    return f".{word}.tif" if image.transform is not None else f".{word}.ome.tif"


@torch.no_grad()
def predict_map(model: DenseModule, image: ImageFile, to: Path, overlay: Path | None = None) -> Row:
    """Write the map of an image, while it is computed, and the overlay of labels; return the cells of its row.

    The cells are the share of the pixels of each class, `share_NAME`; of numbers there are none.
    """
    model.stream_network.normalisation.check_channels(image.shape[0])
    keep_background_if_usable(model, image)
    segments = model.task == "segmentation"
    model.stream_network.write(image, to, postprocess="argmax" if segments else None, **left_out(image.background))
    if not segments:
        return {}
    written = open_image(to)
    counts = class_counts(written, len(model.class_names))
    if overlay is not None:
        save_label_overlay(overlay, image, written, model.class_names, image.path.name)
    shares = counts / max(1, counts.sum())
    return {f"share_{name}": f"{share:.6g}" for name, share in zip(model.class_names, shares, strict=True)}
