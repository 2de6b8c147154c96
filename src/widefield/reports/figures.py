"""Figures that are written as PNG files: confusion matrices, learning rates, points (t-SNE)."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from widefield.modules.optimization import make_optimizer, make_schedule
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
