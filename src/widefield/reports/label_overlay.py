"""Pictures of maps: an image with its classes in colours over it, and a legend; and maps of numbers beside what is true."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from widefield.images import ImageFile, LabelMap
from widefield.images.formats import strips
from widefield.reports.figures import new_figure, save
from widefield.reports.overlay import overview

_SIDE = 1024
"""Long side of the picture, in pixels."""
_OPACITY = 0.5
_BACKGROUND = "background"
"""The class of this name is not painted."""


def label_overlay(
    image: ImageFile | Tensor, labels: ImageFile | LabelMap, class_names: Sequence[str], title: str
) -> Figure:
    """Return a figure: an image, its classes in colours over it, and a legend of those that are there.

    Of a large label map every n-th pixel is shown. Labels that are no class, and the class "background", have no colour.

    Args:
        image: See `save_overlay`.
        labels: The label map, of one channel.
        class_names: Names of the classes.
        title: Above the picture.
    """
    shown = reduced(labels)
    picture = overview(image, _SIDE)
    colours = np.zeros((*shown.shape, 4))
    patches = []
    for k, name in enumerate(class_names):
        if name != _BACKGROUND and (at := shown == k).any():
            colour = colormaps["tab20" if len(class_names) > 10 else "tab10"](k % 20)[:3]
            colours[at] = (*colour, _OPACITY)
            patches.append(Patch(color=colour, label=name))
    height, width = shown.shape
    figure, axes = new_figure(8.0, max(2.5, min(10.0, 6.0 * height / width)) + 0.5)
    extent = (0, width, height, 0)
    axes.imshow(picture, extent=extent)
    axes.imshow(colours, extent=extent, interpolation="nearest")
    axes.set_title(title, fontsize=14)
    axes.set_axis_off()
    if patches:
        axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=14)
    return figure


def save_label_overlay(
    path: str | Path, image: ImageFile | Tensor, labels: ImageFile | LabelMap, class_names: Sequence[str], title: str
) -> None:
    """Write the figure of `label_overlay` as a PNG; whole or not at all."""
    save(label_overlay(image, labels, class_names, title), path)


def compared_maps(image: ImageFile | Tensor, true: ImageFile, predicted: ImageFile, title: str) -> Figure:
    """Return a figure: an image, the first channel of its map of numbers, and the predicted one in the same colours.

    Of large maps every n-th pixel is shown.
    """
    shown = {"target": reduced(true), "predicted": reduced(predicted)}
    low, high = np.nanpercentile(shown["target"], (0.5, 99.5))
    height, width = shown["target"].shape
    figure = Figure(figsize=(12.0, max(2.0, min(10.0, 3.6 * height / width)) + 0.6), dpi=100, layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(overview(image, _SIDE))
    axes[0].set_title(title)
    for panel, (name, values) in zip(axes[1:], shown.items(), strict=True):
        picture = panel.imshow(values, cmap="viridis", vmin=low, vmax=high)
        panel.set_title(name)
    for panel in axes:
        panel.set_axis_off()
    figure.colorbar(picture, ax=axes[1:], shrink=0.8)
    return figure


def reduced(labels: ImageFile | LabelMap) -> np.ndarray:
    """Return every n-th row and column of the first channel of a map, (height, width), with a long side of 1024 at most."""
    _, height, width = labels.shape
    step = -(-max(height, width) // _SIDE)
    read = [labels.read(y, 0, rows, width)[0, ::step, ::step] for y, rows in strips(labels, step)]
    return np.concatenate(read)
