"""The table that says which image has which label."""

import csv
import io
import logging
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from widefield.errors import WidefieldError
from widefield.images import image_endings, images_below, is_image_name

_log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
COLUMNS = {
    "image": ("image", "slide_id", "slide", "filename", "file_name", "file", "image_path", "path", "image_id"),
    "label": ("label", "class", "target", "diagnosis", "category"),
    "split": ("split",),
    "patient": ("patient", "patient_id", "case_id", "case", "subject", "subject_id"),
}
"""Names by which a column is known unless the caller says its name; in any case, and the first that is there."""

_MISSING = ("", "nan", "<na>", "null")
_SHOWN = 10
"""Names listed in an error before "and N more"."""


class LabelError(WidefieldError, ValueError):
    """A label table that cannot be used; the message names the file, the row or the images, and what to do."""


@dataclass(frozen=True)
class LabelledImage:
    """One row: the file, the index of its class, the split it was assigned to and the patient, if the table says them."""

    path: Path
    label: int
    split: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class LabelTable:
    """Every labelled image and the class names, where the label of an image indexes `class_names`."""

    images: tuple[LabelledImage, ...]
    class_names: tuple[str, ...]


def read_labels(labels: str | Path, images: str | Path, columns: Mapping[str, str] | None = None) -> LabelTable:
    """Read a table with a column of images and one of labels, and optionally of splits and patients; others are ignored.

    The image is a file name inside the folder `images` (subfolders are written with slashes), with or without its ending
    (`scan` may be `scan.ome.tif`), or a path. Where no file has that name in the folder itself, one in a subfolder counts. The
    label is any name or number; class names are sorted, as numbers if all are numbers, and the label of an image is its position
    in that order. The split is one of train, val and test.

    Args:
        labels: A CSV file (comma, semicolon or tab; UTF-8, or UTF-16 with a byte order mark) with one header row, or Parquet.
        images: The folder of the images.
        columns: The names of columns, such as `{"image": "Slide", "label": "Grade", "patient": "MRN"}`. One that is not named is
            guessed, see `COLUMNS`.

    Raises:
        FileNotFoundError: The file or the folder does not exist.
        NotADirectoryError: `images` is not a folder.
        LabelError: The folder is empty, a column is missing, a row is incomplete or double, an image is missing or
            ambiguous, or there are fewer than two classes.
    """
    labels, images = Path(labels), Path(images)
    every = _files_in(images)
    files = FilesByName(every, images)
    rows = read_rows(labels, columns=columns)
    found = [(row, path) for row in rows if (path := _only_match(labels, row, files)) is not None]
    without = sorted({path for path in every if is_image_name(path.name)} - {path for _, path in found})
    if len(found) < len(rows):
        matched = {row.number for row, _ in found}
        missing = [f"{row.image} (line {row.number})" for row in rows if row.number not in matched]
        beside = (
            f". No row names {len(without)} image(s) there: {some_of([p.name for p in without])}" if without else ""
        )
        raise LabelError(f"{labels} names {len(missing)} image(s) that are not in {images}: {some_of(missing)}{beside}")
    _refuse_duplicates(labels, found)
    if without:
        _log.warning(
            "%s names no label of %d image(s): %s", labels, len(without), some_of([path.name for path in without])
        )
    class_names = _class_names(labels, {row.label for row in rows})
    index = {name: position for position, name in enumerate(class_names)}
    return LabelTable(
        tuple(LabelledImage(path, index[row.label], row.split, row.patient) for row, path in found), class_names
    )


class LabelRow(NamedTuple):
    """A row of a label table: the number of its line, and its entries."""

    number: int
    image: str
    label: str
    split: str | None
    patient: str | None


class FilesByName:
    """Files by their path and by their path without ending.

    Args:
        files: The files.
        folder: The folder from which their paths count; None takes them as they are.
    """

    def __init__(self, files: Iterable[Path], folder: Path | None) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] = {}
        self._in_subfolders: dict[str, list[Path]] = {}
        for file in files:
            path = _normal(file if folder is None else file.relative_to(folder))
            for key in _names(path):
                self._by_name.setdefault(key, []).append(file)
                self._in_subfolders.setdefault(PurePosixPath(key).name, []).append(file)

    def matches(self, name: str) -> list[Path]:
        """Return the files that `name` may mean: one of exactly that name, else image files that share the stem, else others."""
        wanted = _normal(PurePosixPath(name.replace("\\", "/")))
        if self._folder is not None and PurePosixPath(wanted).is_absolute():
            folder = _normal(self._folder.absolute())
            wanted = wanted.removeprefix(folder).lstrip("/") if wanted.startswith(folder + "/") else wanted
        candidates = self._by_name.get(wanted) or ("/" not in wanted and self._in_subfolders.get(wanted)) or []
        exact = [path for path in candidates if _normal(path).endswith(wanted)]
        return exact or [path for path in candidates if is_image_name(path.name)] or candidates


def _normal(path: PurePosixPath | Path) -> str:
    """A path with slashes and composed letters: macOS writes names apart that others write together."""
    return unicodedata.normalize("NFC", os.path.normpath(path.as_posix()))


def _names(path: str) -> set[str]:
    """The path itself, and without its ending; `scan.ome.tif` is also called `scan.ome` and `scan`."""
    names = {path, path.removesuffix(PurePosixPath(path).suffix)}
    for ending in image_endings():
        if path.lower().endswith(ending):
            stem = path[: -len(ending)]
            names |= {stem, stem.removesuffix(".ome")}
    return names


def _files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, image files or not, but for hidden ones; folders that are images count as files."""
    if not folder.exists():
        raise FileNotFoundError(f"the folder of images {folder} does not exist; check --images")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder; give the folder that holds the images")
    images = images_below(folder)
    inside = {path for path in images if path.is_dir()}
    others = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = sorted({*images, *(path for path in others if not inside.intersection(path.parents))})
    if not files:
        raise LabelError(f"the folder of images {folder} is empty; check --images")
    return files


def read_rows(labels: Path, unlabelled: bool = False, columns: Mapping[str, str] | None = None) -> list[LabelRow]:
    """Return the rows of a label table, see `read_labels`.

    Args:
        labels: The CSV or Parquet file.
        unlabelled: Leave out rows whose label is empty, which are an error otherwise.
        columns: Names of its columns, see `read_labels`.

    Raises:
        FileNotFoundError: The file does not exist.
        LabelError: A column is missing, a row is incomplete, or there are no rows.
    """
    if not labels.is_file():
        raise FileNotFoundError(
            f"{labels} does not exist; give a label table, a CSV file with the columns image and label"
        )
    header, records = _parquet(labels) if labels.suffix.lower() == ".parquet" else _csv(labels)
    places = _places(labels, header, columns or {})
    if not records:
        raise LabelError(f"{labels} has a header but no rows; add one row per image")
    rows, incomplete = [], []
    for number, record in records:
        entries = {kind: record[place].strip() if place < len(record) else "" for kind, place in places.items()}
        if entries["label"].lower() in _MISSING and unlabelled:
            continue
        lacking = [kind for kind in ("image", "label") if entries[kind].lower() in _MISSING]
        incomplete += [
            f"line {number}: the {kind} is empty" + (f" ({v!r})" if (v := entries[kind]) else "") for kind in lacking
        ]
        split = entries.get("split") or None
        if split is not None and split not in SPLITS:
            raise LabelError(f"{labels}, line {number}: the split is {split!r}; it must be one of {', '.join(SPLITS)}")
        rows.append(LabelRow(number, entries["image"], entries["label"], split, entries.get("patient") or None))
    if incomplete:
        raise LabelError(f"{labels}, {some_of(incomplete)}; fill it in or remove the row")
    if not rows:
        raise LabelError(f"{labels} has no row with a label")
    return rows


def _csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows of a CSV file, each with the number of its line; whatever separates the columns and ends the lines."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise LabelError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')} text ({error.reason}); save it as a UTF-8 CSV file"
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    first = text.partition("\n")[0]
    separator = max(",;\t|", key=lambda one: len(_known(first.split(one)))) if first else ","
    if len(_known(first.split(separator))) < 2:
        separator = max(",;\t|", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        return header, [(reader.line_num, record) for record in reader if any(entry.strip() for entry in record)]
    except csv.Error as error:
        raise LabelError(f"{path}, line {reader.line_num}: it is no CSV file ({error})") from None


def _known(names: Iterable[str]) -> set[str]:
    given = {name.strip().strip('"').lower() for name in names}
    return {kind for kind, known in COLUMNS.items() if given.intersection(known)}


def _parquet(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ModuleNotFoundError:
        raise LabelError(
            f"{path} needs pyarrow, which is not installed; pip install 'widefield[parquet]', or save it as CSV"
        ) from None
    try:
        table = parquet.read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise LabelError(f"{path} is no Parquet file ({error})") from None
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    texts = [["" if entry is None else str(entry) for entry in row] for row in rows]
    return table.column_names, list(enumerate(texts, start=1))


def _places(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """Where each kind of column stands in a row."""
    there = f"its columns are {', '.join(header) or '(none)'}"
    if unknown := set(columns) - set(COLUMNS):
        raise LabelError(f"columns: {', '.join(sorted(unknown))} is no kind of column; those are {', '.join(COLUMNS)}")
    places, lower = {}, [name.lower() for name in header]
    for kind, names in COLUMNS.items():
        if kind in columns:
            if columns[kind] not in header:
                raise LabelError(f"{path} has no column {columns[kind]!r}, which is to be the {kind}; {there}")
            places[kind] = header.index(columns[kind])
        elif guessed := [name for name in names if name in lower]:
            places[kind] = lower.index(guessed[0])
        elif kind in ("image", "label"):
            known = f"it may also be called {', '.join(names[1:])}"
            raise LabelError(f"{path} has no column {kind!r} ({known}); {there}. Rename it, or say its name in columns")
    return places


def _only_match(labels: Path, row: LabelRow, files: FilesByName) -> Path | None:
    matches = files.matches(row.image)
    if len(matches) > 1:
        distinct = len({path.name for path in matches}) == len(matches)
        names = some_of([path.name if distinct else path.as_posix() for path in matches])
        raise LabelError(
            f"{labels}, line {row.number}: {row.image!r} may be {names}; write the name with its extension"
        )
    elsewhere = Path(row.image)
    return matches[0] if matches else elsewhere if elsewhere.is_absolute() and elsewhere.exists() else None


def _refuse_duplicates(labels: Path, found: Sequence[tuple[LabelRow, Path]]) -> None:
    path, count = Counter(path for _, path in found).most_common(1)[0]
    if count > 1:
        numbers = ", ".join(str(row.number) for row, other in found if other == path)
        raise LabelError(f"{labels} names {path.name} {count} times, in lines {numbers}; keep one of them")


def _class_names(labels: Path, names: set[str]) -> tuple[str, ...]:
    if len(names) < 2:
        raise LabelError(f"{labels}: every image has the label {min(names)!r}; training needs at least two classes")
    for name in sorted(names):
        parts = name.replace("|", ";").split(";")
        if len(parts) > 1 and names.issuperset(part.strip() for part in parts):
            raise LabelError(
                f"{labels}: {name!r} names several classes, and an image has one; keep one of them in each row"
            )
    numbers = {name: _number(name) for name in names}
    if any(map(math.isnan, numbers.values())):
        return tuple(sorted(names))
    same = [name for name, number in numbers.items() if list(numbers.values()).count(number) > 1]
    if same:
        raise LabelError(
            f"{labels}: the labels {', '.join(map(repr, sorted(same)))} are the same number; write it in one way"
        )
    return tuple(sorted(names, key=numbers.__getitem__))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def some_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
