"""t-SNE: features as points in a plane."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from widefield.reports.figures import new_figure, save

_MOST_NAMES = 20
"""Classes up to which there is a legend."""


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
