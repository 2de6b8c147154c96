"""`widefield predict` of a network that gives the class of each pixel: a label map, its overlay and its row."""

from pathlib import Path

import torch

from widefield.components.models.features import left_out
from widefield.images import ImageFile, open_image
from widefield.inference.masks import keep_background_if_usable
from widefield.modules import DenseModule
from widefield.reports.label_overlay import class_counts, save_label_overlay

LABELS = ".labels"
"""Stands before the ending of a label map, so that its name is not that of an image."""


def ending_of(image: ImageFile) -> str:
    """Return the ending of the label map of an image: a GeoTIFF for one with a place on a map, else an OME-TIFF."""
    return f"{LABELS}.tif" if image.transform is not None else f"{LABELS}.ome.tif"


@torch.no_grad()
def predict_map(model: DenseModule, image: ImageFile, labels: Path, overlay: Path | None) -> dict[str, str]:
    """Write the label map of an image, while it is computed, and its overlay; return the cells of its row.

    The cells are the share of the pixels of each class, `share_NAME`.
    """
    model.stream_network.normalisation.check_channels(image.shape[0])
    keep_background_if_usable(model, image)
    model.stream_network.write(image, labels, postprocess="argmax", **left_out(image.background))
    written = open_image(labels)
    counts = class_counts(written, len(model.class_names))
    if overlay is not None:
        save_label_overlay(overlay, image, written, model.class_names, image.path.name)
    shares = counts / max(1, counts.sum())
    return {f"share_{name}": f"{share:.6g}" for name, share in zip(model.class_names, shares, strict=True)}
