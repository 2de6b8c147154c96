"""Labels of images, if there are any: training does not see them, they tell how good its embeddings are."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from widefield.data.labels import FilesByName, read_rows
from widefield.data.tables import LabelError
from widefield.pretraining.source import ImageSource, Items

Labels = tuple[str | None, ...]
"""The label of every number of a source; None where there is none."""


def labels_of(source: ImageSource, data: Any, table: Path | None) -> Labels | None:
    """The labels of `source`, None if there are none.

    Args:
        source: The images.
        data: What names them. Of a folder whose images all lie in folders below, the first of these is the label, if there are
            at least two, with two images each on average; of a dataset its `targets`, as those of torchvision have it.
        table: A label table instead, see `widefield.data.read_labels`; an image is a path in the folder, or as it was given.

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
    try:
        rows = read_rows(table)
    except (LabelError, OSError) as error:
        raise ValueError(f"callbacks.quality.labels: {error}") from error
    places = [FilesByName(paths, place) for place in {None, folder}]
    labels = {path: row.labels[0] for row in rows for files in places for path in files.matches(row.image)}
    if len(set(labels.values())) < 2:
        raise ValueError(
            f"callbacks.quality.labels: {table} has labels of {len(labels)} of the {len(paths)} images, and two classes "
            "are needed; its images must be paths in the folder of the data"
        )
    return tuple(labels.get(path) for path in paths)
