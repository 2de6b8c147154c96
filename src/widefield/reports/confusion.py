"""A picture of a confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from widefield.reports.figures import new_figure, save

_MOST_NUMBERS = 20
"""Classes up to which the counts are written into the picture."""


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
