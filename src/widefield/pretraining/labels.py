"""Labels of images, if there are any: training does not see them, they tell how good its embeddings are."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from widefield.pretraining.source import ImageSource, Items

Labels = tuple[str | None, ...]
"""The label of every number of a source; None where there is none."""


def labels_of(source: ImageSource, data: Any, table: Path | None) -> Labels | None:
    """The labels of `source`, None if there are none.

    Args:
        source: The images.
        data: What names them. Of a folder whose images all lie in folders below, the first of these is the label, if there are
            at least two, with two images each on average; of a dataset its `targets`, as those of torchvision have it.
        table: A CSV file with the columns image and label instead; an image is a path in the folder, or as it was given.

    Raises:
        ValueError: The table cannot be used.
    """
    if isinstance(source, Items):
        if table is not None:
            raise ValueError("callbacks.quality.labels is for files; the labels of a dataset are its attribute targets")
        return _targets(source)
    paths = [Path(source.name(index)) for index in range(len(source))]
    folder = Path(data) if isinstance(data, (str, Path)) and Path(data).is_dir() else None
    if table is not None:
        return _from_table(paths, folder, table)
    if folder is None:
        return None
    parts = [path.relative_to(folder).parts for path in paths]
    if any(len(part) < 2 for part in parts):
        return None
    counts = Counter(part[0] for part in parts)
    return tuple(part[0] for part in parts) if 2 <= len(counts) <= len(parts) // 2 else None


def _targets(source: Items) -> Labels | None:
    targets = getattr(source.dataset, "targets", None)
    if targets is None or len(targets) != len(source):
        return None
    array = np.asarray(targets)
    return tuple(map(str, array.tolist())) if array.ndim == 1 else None


def _from_table(paths: list[Path], folder: Path | None, table: Path) -> Labels:
    if not table.is_file():
        raise ValueError(f"callbacks.quality.labels: {table} does not exist")
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"image", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"callbacks.quality.labels: {table} must have the columns image and label")
        labels = {Path(row["image"]): row["label"] for row in reader if row["label"]}
    found = tuple(labels.get(path) or (folder and labels.get(path.relative_to(folder))) or None for path in paths)
    if len(set(found) - {None}) < 2:
        raise ValueError(
            f"callbacks.quality.labels: {table} has labels of {sum(map(bool, found))} of the {len(paths)} images, and two classes "
            "are needed; its column image must hold paths in the folder of the data"
        )
    return found
