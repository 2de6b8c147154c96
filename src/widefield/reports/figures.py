"""Figures that are written as PNG files: confusion matrices, learning rates, points (t-SNE), heatmaps over thumbnails."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from widefield.modules.optimization import make_optimizer, make_schedule
from widefield.reports.grad_cam import peak
from widefield.writing import replacing

_MOST_NUMBERS = 20
"""Classes up to which the counts are written into a confusion matrix."""
_MOST_NAMES = 20
"""Classes up to which points have a legend."""


def new_figure(width: float = 6.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches with one pair of axes, which needs no display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file; whole or not at all."""
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def save_confusion_matrix(path: str | Path, matrix: np.ndarray, class_names: Sequence[str] | None = None) -> None:
    """Write a PNG: counts, coloured by their share of the true class.

    Args:
        path: Of the PNG file.
        matrix: Counts (C, C), with true classes as rows and predicted ones as columns.
        class_names: C names; None numbers the classes.

    Raises:
        ValueError: The matrix is not square, or there is another number of names.
    """
    matrix = np.asarray(matrix)
    count = len(matrix)
    names = [str(index) for index in range(count)] if class_names is None else list(class_names)
    if matrix.shape != (count, count) or len(names) != count:
        raise ValueError(
            f"a confusion matrix of shape {matrix.shape} with {len(names)} class names; expected (C, C) with C names"
        )
    side = max(4.5, 0.35 * min(count, 60) + 2)
    figure, axes = new_figure(side + 1, side)
    totals = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    axes.set_xticks(range(count), names, rotation=90 if count > 5 else 0)
    axes.set_yticks(range(count), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if count <= _MOST_NUMBERS:
        for row, column in np.ndindex(count, count):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.annotate(str(matrix[row, column]), (column, row), ha="center", va="center", color=colour, fontsize=8)
    save(figure, path)


def learning_rates(
    optimizer: dict[str, Any],
    lr_scheduler: dict[str, Any] | list[dict[str, Any]] | None,
    epochs: int,
    steps_per_epoch: int | None = None,
) -> list[float]:
    """The learning rate at the beginning of each epoch of `widefield fit`.

    Args:
        optimizer: `{type: SGD, lr: 0.1}`, or with `class_path` and `init_args`, a class of `torch.optim` or an import path.
        lr_scheduler: Likewise, of `torch.optim.lr_scheduler`, or several, see `make_schedule`; None keeps the rate.
        epochs: How many.
        steps_per_epoch: Optimizer steps of each epoch, for a schedule that counts them.

    Raises:
        ValueError: The schedule depends on what is measured in training, or on the number of steps, or has an unknown name.
        TypeError: Arguments that the classes do not take.
    """
    made = make_optimizer(optimizer, nn.Linear(1, 1, bias=False))
    if not lr_scheduler:
        return [float(made.param_groups[0]["lr"])] * epochs
    schedule, interval = make_schedule(lr_scheduler, made, steps_per_epoch or 1)
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            f"{type(schedule).__name__} depends on what is measured in training, so it has no curve beforehand"
        )
    if interval == "step" and steps_per_epoch is None:
        raise ValueError("the schedule goes on with each step; say how many an epoch has, with --steps-per-epoch N")
    rates = []
    for _ in range(epochs):
        rates.append(float(made.param_groups[0]["lr"]))
        for _ in range(steps_per_epoch or 1 if interval == "step" else 1):
            made.step()
            schedule.step()
    return rates


def save_schedule(path: str | Path, rates: list[float]) -> None:
    """Write a PNG: learning rates by epoch, from 1."""
    figure, axes = new_figure()
    axes.step(range(1, len(rates) + 1), rates, where="mid")
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    save(figure, path)


def tsne(features: np.ndarray, perplexity: float | None = None, seed: int = 0) -> np.ndarray:
    """Points (N, 2) whose neighbours are those of the features (N, C) (van der Maaten and Hinton, 2008).

    Needs scikit-learn, which does the work.

    Args:
        features: One row for each image.
        perplexity: About how many neighbours count; None is 30, or less where there are few images.
        seed: Of the random start.

    Raises:
        ValueError: Fewer than three images, or a perplexity that is not below their number.
    """
    from sklearn.manifold import TSNE

    count = len(features)
    if count < 3:
        raise ValueError(f"t-SNE of {count} images shows nothing; give at least three")
    perplexity = min(30.0, (count - 1) / 3) if perplexity is None else perplexity
    if not 0 < perplexity < count:
        raise ValueError(f"perplexity={perplexity} must be positive and below {count}, the number of images")
    found: np.ndarray = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(
        np.asarray(features, np.float32)
    )
    return found


def save_points(
    path: str | Path, points: np.ndarray, labels: Sequence[int], class_names: Sequence[str] | None = None
) -> None:
    """Write a PNG: points (N, 2), coloured by their class.

    Args:
        path: Of the PNG file.
        points: See `tsne`.
        labels: The class of each point.
        class_names: Names for the legend; None numbers the classes.
    """
    save(points_figure(points, labels, class_names), path)


def points_figure(
    points: np.ndarray, labels: Sequence[int], class_names: Sequence[str] | None = None, title: str = ""
) -> Figure:
    """The figure that `save_points` writes."""
    figure, axes = new_figure(7, 6)
    axes.set_title(title)
    classes = np.asarray(labels)
    for label in np.unique(classes):
        name = str(label) if class_names is None else class_names[label]
        x, y = points[classes == label].T
        axes.scatter(x, y, s=12, label=name)
    axes.set_axis_off()
    if len(np.unique(classes)) <= _MOST_NAMES:
        axes.legend(fontsize=8)
    return figure


_DPI = 150
_HEIGHT_INCHES = 6.0


def save_overlay(
    path: str | Path,
    thumbnail: np.ndarray,
    evidence: np.ndarray,
    size: tuple[int, int],
    spacing: tuple[float, float] | None,
    title: str,
) -> None:
    """Write a PNG: the thumbnail, the positive evidence over it, a scale bar and a colour bar.

    Where the evidence is at or below zero the thumbnail shows through; the colour bar starts there. A circle shows where
    the evidence is greatest, which is a point in the thumbnail of a large image.

    Args:
        path: Of the PNG file; its folder must exist.
        thumbnail: uint8 (h, w, 3) of the whole image.
        evidence: (h, w) of the whole image, any resolution; see `class_activation`.
        size: (height, width) of the image in pixels.
        spacing: Micrometres per pixel (y, x), or None: then the scale bar is in pixels.
        title: Above the picture.
    """
    height, width = size
    figure = Figure(
        figsize=(max(4.0, _HEIGHT_INCHES * width / height) + 1.2, _HEIGHT_INCHES), dpi=_DPI, layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    extent = (0, width, height, 0)
    axes.imshow(thumbnail, extent=extent, interpolation="bilinear")
    top = max(float(evidence.max()), float(np.finfo(np.float32).tiny))
    positive = np.clip(evidence, 0.0, top)  # evidence far below a tiny top would overflow
    heat = axes.imshow(
        positive,
        extent=extent,
        cmap="inferno",
        vmin=0.0,
        vmax=top,
        alpha=0.75 * positive / top,
        interpolation="nearest",
    )
    colours = figure.colorbar(heat, ax=axes, shrink=0.8, label="evidence for the class (logit)")
    if colours.solids is not None:
        colours.solids.set_alpha(1.0)
    _circle_peak(axes, evidence, size)
    _draw_scale_bar(axes, height, width, spacing)
    figure.savefig(path, pil_kwargs={"compress_level": 1})  # at the default of 6, half of the time goes into this


def _circle_peak(axes: Axes, evidence: np.ndarray, size: tuple[int, int]) -> None:
    y, x = peak(evidence, size)
    circle = Circle((x, y), 0.03 * max(size), fill=False, edgecolor="white", linewidth=1.5)
    circle.set_path_effects([withStroke(linewidth=3, foreground="black")])
    axes.add_patch(circle)


def _draw_scale_bar(axes: Axes, height: int, width: int, spacing: tuple[float, float] | None) -> None:
    bar = scale_bar(width, None if spacing is None else spacing[1])
    left, bottom, thick = 0.03 * width, 0.96 * height, 0.012 * height
    axes.add_patch(
        Rectangle((left, bottom - thick), bar.pixels, thick, facecolor="white", edgecolor="black", linewidth=0.8)
    )
    axes.annotate(
        bar.text,
        (left + bar.pixels / 2, bottom - 1.5 * thick),
        ha="center",
        va="bottom",
        fontsize=9,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.5, "linewidth": 0},
    )


_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class ScaleBar:
    """A bar of `pixels` image pixels, labelled `text`."""

    pixels: float
    text: str


def scale_bar(width: int, spacing: float | None) -> ScaleBar:
    """The longest bar of 1, 2 or 5 times a power of ten that is at most a quarter of the image.

    Args:
        width: Of the image, in pixels.
        spacing: Micrometres per pixel, along x; None labels the bar in pixels.
    """
    unit = 1.0 if spacing is None else spacing
    longest = width * unit / 4
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(step * power for step in _STEPS if step * power <= longest)
    return ScaleBar(length / unit, _text(length, in_pixels=spacing is None))


def _text(length: float, in_pixels: bool) -> str:
    if in_pixels:
        return f"{length:g} px"
    if length >= 1000:
        return f"{length / 1000:g} mm"
    return f"{length:g} µm"
