"""The table that says which image has which label."""

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from widefield.errors import WidefieldError
from widefield.images import is_image_name

SPLITS = ("train", "val", "test")
_SHOWN = 10
"""Names listed in an error before "and N more"."""


class LabelError(WidefieldError, ValueError):
    """A label table that cannot be used; the message names the file, the row or the images, and what to do."""


@dataclass(frozen=True)
class LabelledImage:
    """One row: the file, the index of its class, and the split it was assigned to, if any."""

    path: Path
    label: int
    split: str | None = None


@dataclass(frozen=True)
class LabelTable:
    """Every labelled image and the class names, where the label of an image indexes `class_names`."""

    images: tuple[LabelledImage, ...]
    class_names: tuple[str, ...]


def read_labels(labels: str | Path, images: str | Path) -> LabelTable:
    """Read a CSV file with the columns `image` and `label`, and optionally `split`; others are ignored.

    `image` is a file name inside the folder `images` (subfolders are written with slashes), with or without its
    extension. `label` is any name or number; class names are sorted, as numbers if all are whole numbers, and the label
    of an image is its position in that order. `split` is one of train, val and test.

    Args:
        labels: The CSV file (UTF-8, comma separated, one header row).
        images: The folder of the images.

    Raises:
        FileNotFoundError: The file or the folder does not exist.
        NotADirectoryError: `images` is not a folder.
        LabelError: The folder is empty, a column is missing, a row is incomplete or double, an image is missing or
            ambiguous, or there are fewer than two classes.
    """
    labels, images = Path(labels), Path(images)
    files = FilesByName(_files_in(images), images)
    rows = read_rows(labels)
    _refuse_missing(labels, images, [row for row in rows if not files.matches(row.image)])
    found = [(row, _only_match(labels, row, files)) for row in rows]
    _refuse_duplicates(labels, found)
    class_names = _class_names(row.label for row in rows)
    if len(class_names) < 2:
        raise LabelError(f"{labels}: every image has the label {class_names[0]!r}; training needs at least two classes")
    index = {name: position for position, name in enumerate(class_names)}
    return LabelTable(tuple(LabelledImage(path, index[row.label], row.split) for row, path in found), class_names)


class LabelRow(NamedTuple):
    """A row of a label table: the number of its line, and its entries."""

    number: int
    image: str
    label: str
    split: str | None


class FilesByName:
    """Files by their path and by their path without extension.

    Args:
        files: The files.
        folder: The folder from which their paths count; None takes them as they are.
    """

    def __init__(self, files: Iterable[Path], folder: Path | None) -> None:
        self._by_name: dict[str, list[Path]] = {}
        for file in files:
            path = file if folder is None else file.relative_to(folder)
            for key in {path.as_posix(), path.with_suffix("").as_posix()}:
                self._by_name.setdefault(key, []).append(file)

    def matches(self, name: str) -> list[Path]:
        """Return the files that `name` may mean: one of exactly that name, else image files that share the stem, else others."""
        candidates = self._by_name.get(Path(name).as_posix(), [])
        exact = [path for path in candidates if path.name == Path(name).name]
        return exact or [path for path in candidates if is_image_name(path.name)] or candidates


def _files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, image files or not, but for hidden ones."""
    if not folder.exists():
        raise FileNotFoundError(f"the folder of images {folder} does not exist; check --images")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder that holds the images")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise LabelError(f"the folder of images {folder} is empty; check --images")
    return files


def read_rows(labels: Path, unlabelled: bool = False) -> list[LabelRow]:
    """Return the rows of a CSV file with the columns `image` and `label`, and optionally `split`; others are ignored.

    Args:
        labels: The CSV file (UTF-8, comma separated, one header row).
        unlabelled: Leave out rows whose label is empty, which are an error otherwise.

    Raises:
        FileNotFoundError: The file does not exist.
        LabelError: A column is missing, a row is incomplete, or there are no rows.
    """
    if not labels.is_file():
        raise FileNotFoundError(
            f"{labels} does not exist; give a label table, a CSV file with the columns image and label"
        )
    try:
        with labels.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            for needed in ("image", "label"):
                if needed not in columns:
                    raise LabelError(
                        f"{labels} has no column {needed!r}; its columns are {', '.join(columns) or '(none)'}. "
                        "The first row must have the columns image and label, separated by a comma"
                    )
            rows = [
                _parse_row(labels, reader.line_num, record, "split" in columns)
                for record in reader
                if not unlabelled or (record["label"] or "").strip()
            ]
    except UnicodeDecodeError as error:
        raise LabelError(f"{labels} is not UTF-8 text ({error.reason}); save it as a UTF-8 CSV file") from None
    if not rows:
        raise LabelError(f"{labels} has a header but no rows; add one row per image")
    return rows


def _parse_row(labels: Path, number: int, record: dict[str, str | None], has_split: bool) -> LabelRow:
    image, label, split = ((record.get(name) or "").strip() for name in ("image", "label", "split"))
    for name, value in (("image", image), ("label", label)):
        if not value:
            raise LabelError(f"{labels}, line {number}: the {name} is empty; fill it in or remove the row")
    if has_split and split not in SPLITS:
        raise LabelError(f"{labels}, line {number}: the split is {split!r}; it must be one of {', '.join(SPLITS)}")
    return LabelRow(number, image, label, split or None)


def _refuse_missing(labels: Path, images: Path, rows: Sequence[LabelRow]) -> None:
    if rows:
        names = ", ".join(f"{row.image} (line {row.number})" for row in rows[:_SHOWN])
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        raise LabelError(f"{labels} names {len(rows)} image(s) that are not in {images}: {names}{more}")


def _only_match(labels: Path, row: LabelRow, files: FilesByName) -> Path:
    matches = files.matches(row.image)
    if len(matches) > 1:
        names = ", ".join(path.name for path in matches)
        raise LabelError(
            f"{labels}, line {row.number}: {row.image!r} may be {names}; write the name with its extension"
        )
    return matches[0]


def _refuse_duplicates(labels: Path, found: Sequence[tuple[LabelRow, Path]]) -> None:
    path, count = Counter(path for _, path in found).most_common(1)[0]
    if count > 1:
        numbers = ", ".join(str(row.number) for row, other in found if other == path)
        raise LabelError(f"{labels} names {path.name} {count} times, in lines {numbers}; keep one of them")


def _class_names(names: Iterable[str]) -> tuple[str, ...]:
    distinct = set(names)
    if all(name.lstrip("+-").isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct))
