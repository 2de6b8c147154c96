"""The page on a run of self-supervised pretraining."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from widefield.reports.charts import binned, curves
from widefield.reports.figures import as_png, points_figure, tsne
from widefield.reports.page import Page

CURVES = {
    "train_loss": "loss",
    "lr-": "learning rate",
    "knn_accuracy": "k-nearest-neighbour accuracy",
    "effective_rank": "effective rank of the embeddings",
    "embedding_spread": "spread of the embeddings",
    "images_per_second": "images per second",
}
"""Beginnings of the names of the metrics that are drawn, and what to call them."""


def write_pretraining_page(
    path: Path,
    *,
    facts: Iterable[tuple[str, object]],
    metrics: Mapping[str, Sequence[tuple[int, float]]],
    views: bytes,
    neighbours: bytes | None,
    embeddings: np.ndarray | None,
    labels: Sequence[str] | None,
) -> None:
    """Write one HTML file: curves, views, nearest neighbours, and maps of the embeddings.

    Args:
        path: The file.
        facts: Rows of the table at the top.
        metrics: (step, value) by the name of the metric.
        views: A PNG of views, a row per image.
        neighbours: A PNG of images with those nearest to them behind; None if there are none.
        embeddings: (N, D), or None.
        labels: Of the embeddings, if they have any.
    """
    page = Page("Pretraining")
    page.numbers([*facts, *_last(metrics)])
    page.heading("Curves")
    for beginning, title in CURVES.items():
        series = next((values for name, values in metrics.items() if name.startswith(beginning)), None)
        if series:
            steps, values = zip(*series, strict=True)
            page.chart(curves([binned(title, steps, values)], "step"))
    page.heading("Views")
    page.picture(views, "what the model was shown: a row per image")
    if neighbours is not None:
        page.heading("Nearest neighbours")
        page.picture(neighbours, "in each row an image, and behind it those whose embeddings are nearest")
    if embeddings is not None and len(embeddings) > 2 and np.isfinite(embeddings).all():
        page.heading("Map of the embeddings")
        classes = sorted(set(labels)) if labels is not None else ["images"]
        numbers = [0] * len(embeddings) if labels is None else [classes.index(label) for label in labels]
        maps = {"PCA": pca(embeddings)}
        if importlib.util.find_spec("sklearn") is not None:
            maps["t-SNE"] = tsne(embeddings)
        for name, points in maps.items():
            page.picture(as_png(points_figure(points, numbers, classes, name)), f"{name} of {len(points)} images")
    page.write(path)


def pca(embeddings: np.ndarray) -> np.ndarray:
    """Points (N, 2): embeddings (N, D) along the two directions in which they differ most; zeros where there is but one."""
    values = torch.as_tensor(embeddings, dtype=torch.float64)
    left, sizes, _ = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    points = torch.zeros(len(values), 2, dtype=torch.float64)
    found = (left * sizes)[:, :2]
    points[:, : found.shape[1]] = found
    return points.numpy()


def _last(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[str, float]]:
    names = ("train_loss", "knn_accuracy", "effective_rank", "embedding_spread", "images_per_second", "bad_images")
    titles = {**CURVES, "bad_images": "images that could not be read"}
    return [(titles[name], metrics[name][-1][1]) for name in names if metrics.get(name)]
