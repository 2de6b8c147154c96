"""The table that says which image has which label."""

import logging
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypedDict

from widefield.config import checked
from widefield.data.tables import LabelError, Problems, Table, listed, read_table
from widefield.data.targets import Label, Task, encode
from widefield.images import images_below, is_image_name
from widefield.registry import near_names, suggestion

_log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")


class Columns(TypedDict, total=False):
    """Names of the columns of a label table; those that are left out are guessed, see `read_labels`.

    Attributes:
        image: Paths of the images.
        label: Labels; several columns for several numbers, or for labels that are 0 or 1 each.
        time, event: In survival analysis, times, and 1 where the event was observed then, 0 where not until then.
        patient: Names of patients (or of sites, scenes, animals), whose images stay together when a split is drawn; None uses no
            such column.
        split: Any of train, val and test; None uses no such column.
    """

    image: str
    label: str | list[str]
    time: str
    event: str
    patient: str | None
    split: str | None


_GUESSES = {
    "image": (
        *("image", "slide_id", "slide", "filename", "file_name", "file", "path", "filepath", "file_path"),
        *("image_path", "image_id", "image_name", "name"),
    ),
    "label": ("label", "labels", "class", "target"),
    "time": ("time", "survival_time", "survival_months", "survival_days"),
    "event": ("event", "event_observed"),
    "patient": ("case_id", "patient_id", "patient", "case"),
    "split": ("split",),
}
"""Names by which a column is found where none was given; the first that there is counts."""
_OPTIONAL = ("patient", "split")
_MISSING = ("", "nan", "<na>")
"""Texts that pandas and others write for a value that is not there, in lower case."""


@dataclass(frozen=True)
class LabelledImage:
    """One row of a label table.

    Attributes:
        path: The file.
        label: Index of its class, or several numbers, see `Label`.
        split: The split that the table assigned it to, if any.
        patient: Whose image it is, if the table says so.
        cells: Names of columns and the texts that stood there, for `LabelledImages.split_rows`.
    """

    path: Path
    label: Label
    split: str | None = None
    patient: str | None = None
    cells: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LabelTable:
    """Every labelled image.

    Attributes:
        images: In the order of the table.
        class_names: Names of the classes, which the label of an image indexes; or of the labels or numbers that it holds; none in
            survival analysis.
        columns: The columns of each role in `Columns` that were used.
    """

    images: tuple[LabelledImage, ...]
    class_names: tuple[str, ...]
    columns: Mapping[str, Sequence[str]]


@checked
def read_labels(
    labels: str | Path,
    images: str | Path,
    columns: Columns | None = None,
    task: Task = "classification",
    separator: str | None = None,
) -> LabelTable:
    """Read a table with a row for each image: its name, its label, and maybe its split and whose image it is.

    The table is a CSV file of any dialect or a Parquet file, see `read_table`. Columns that `columns` does not name are found by
    usual names, in whatever case: `image`, `slide_id`, `filename`, `file`, `path` and the like; `label`, `class` or `target`;
    `case_id`, `patient_id`, `patient` or `case`; `split`; for survival analysis `time` and `event`. Other columns are ignored.

    An image is a path from the folder `images`, or from that of the table, or an absolute one, with slashes or backslashes, with
    or without its ending: `a` finds `a.svs` and `a.ome.tif`, whatever files of no image lie beside it. A name without a folder
    that is not in `images` itself may lie in any folder below. A split is one of train, val and test. A label is, by `task`,

    - classification: any name or number. Class names are sorted, as numbers if all are numbers;
    - multilabel: names with `separator` between them, `-` for none; or 0 or 1 in each of several columns, the labels;
    - regression: a number, or one in each of several columns;
    - survival: a time, and 1 if the event was observed then; 0 if the image was event-free until then (censored).

    One error lists all rows that cannot be used; if they have no image, images without a row, too. Images without a row alone
    are left out, which the log says.

    Args:
        labels: The table.
        images: The folder of the images.
        columns: Names of columns.
        task: What is to be predicted.
        separator: What stands between several labels in one cell.

    Raises:
        FileNotFoundError: The file or the folder does not exist.
        NotADirectoryError: `images` is not a folder.
        LabelError: The folder is empty, a column is missing, a row is incomplete or double, an image is missing or ambiguous, a
            label is none of the task, or all labels are equal.
        ValueError: Arguments that do not go together.
    """
    labels, images = Path(labels), Path(images)
    finder = _Images(images, labels.parent)
    table = read_table(labels)
    used = _used_columns(table, columns or {}, task)
    problems = Problems(table)
    rows = _rows(table, used, problems)
    found = finder.find_all(rows, problems)
    names = [name for role, names in used.items() if role in ("label", "time", "event") for name in names]
    texts, numbers = [row.labels for row in rows], [row.number for row in rows]
    encoded, class_names = encode(task, names, texts, numbers, separator, problems)
    problems.refuse()
    written = [name for names in used.values() for name in names]
    return LabelTable(
        images=tuple(
            LabelledImage(
                path=path,
                label=label,
                split=row.split,
                patient=row.patient,
                cells=tuple((name, row.cells[name]) for name in written),
            )
            for row, path, label in zip(rows, found, encoded, strict=True)
        ),
        class_names=class_names,
        columns=used,
    )


class LabelRow(NamedTuple):
    """A row of a label table: its number, what it says, and all its cells by column."""

    number: int
    image: str
    labels: tuple[str, ...]
    split: str | None
    patient: str | None
    cells: Mapping[str, str]


class FilesByName:
    """Files by their path and by their path without ending.

    Names are compared without regard to backslashes, `./` and the Unicode form, which differs between systems. Of `a.ome.tif` both
    `a.ome` and `a` are paths without ending.

    Args:
        files: The files.
        folder: The folder from which their paths count; None takes them as they are.
    """

    def __init__(self, files: Iterable[Path], folder: Path | None) -> None:
        self._by_path: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        self._by_bare_name: dict[str, list[Path]] = {}
        for file in files:
            path = _key(str(file if folder is None else file.relative_to(folder)))
            self._by_path.setdefault(path, []).append(file)
            for stem in stems_of(path):
                self._by_stem.setdefault(stem, []).append(file)
            for name in {file.name, *stems_of(file.name)}:
                self._by_bare_name.setdefault(_key(name), []).append(file)

    def matches(self, name: str) -> list[Path]:
        """Return the files that `name` may mean: those of exactly that name, else image files that share the stem, else others.

        Where there is none, a name without a folder means files in whatever folder.
        """
        key = _key(name)
        candidates = self._by_stem.get(key) or self._by_bare_name.get(key, [])
        return self._by_path.get(key) or [path for path in candidates if is_image_name(path.name)] or candidates


def _key(name: str) -> str:
    return PurePosixPath(unicodedata.normalize("NFC", name).replace("\\", "/")).as_posix()


def stems_of(path: str) -> Iterable[str]:
    """Yield a path without its last ending, and without those of images and `.ome` before that."""
    stem = PurePosixPath(path)
    if stem.suffix:
        stem = stem.with_suffix("")
        yield stem.as_posix()
    while stem.suffix.lower() == ".ome" or (stem.suffix and is_image_name(stem.name)):
        stem = stem.with_suffix("")
        yield stem.as_posix()


class _Images:
    """Finds the images that rows name.

    Args:
        folder: The folder of the images.
        beside: The folder of the table, from which paths may count, too.
    """

    def __init__(self, folder: Path, beside: Path) -> None:
        if not folder.exists():
            raise FileNotFoundError(f"the folder of images {folder} does not exist; check --images")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder; give the folder that holds the images")
        if next(folder.iterdir(), None) is None:
            raise LabelError(f"the folder of images {folder} is empty; check --images")
        self._folder, self._beside = folder, beside
        self._roots = (folder.absolute(), folder.resolve())
        self._files = images_below(folder)
        self._by_name = FilesByName(self._files, folder)

    def find_all(self, rows: Sequence[LabelRow], problems: Problems) -> list[Path]:
        """Return the image of each row; those that have none, or not only one, are problems."""
        found: list[Path] = []
        missing: list[LabelRow] = []
        owners: dict[Path, list[LabelRow]] = {}
        for row in rows:
            matches = self._matches(row.image)
            if len(matches) > 1:
                names = ", ".join(path.name for path in matches)
                problems.add_rows([row.number], f"{row.image!r} may be {names}; write the name with its extension")
            elif not matches:
                missing.append(row)
            for match in matches:
                owners.setdefault(match.absolute(), []).append(row)
            found += matches[:1]
        for path, several in owners.items():
            if len(several) > 1:
                where = problems.table.places([row.number for row in several])
                problems.add(f"names {path.name} {len(several)} times, in {where}; keep one of them")
        left = [path.relative_to(self._folder).as_posix() for path in self._files if path.absolute() not in owners]
        if missing:
            places = [problems.table.places([row.number]) for row in missing]
            near = [near_names(row.image, left) for row in missing[:3]]  # each a search through all of them
            hints = [f", did you mean {close[0]}?" if close else "" for close in near] + [""] * len(missing[3:])
            shown = listed(
                f"{row.image} ({place}{hint})" for row, place, hint in zip(missing, places, hints, strict=True)
            )
            others = f"; {len(left)} image(s) there have no row: {listed(left)}" if left else ""
            problems.add(
                f"names {len(missing)} image(s) that are not in {self._folder}: {shown}{others}; correct the paths in the table, "
                "or remove these rows"
            )
        elif left:
            _log.warning("%d image(s) in %s have no row and are left out: %s", len(left), self._folder, listed(left))
        return found

    def _matches(self, image: str) -> list[Path]:
        name = image.replace("\\", "/")
        for folder in (self._folder, self._beside):
            place = os.path.normpath(folder.absolute() / name)
            inside = next(
                (Path(place).relative_to(root) for root in self._roots if Path(place).is_relative_to(root)), None
            )
            if os.path.isfile(place) or (os.path.isdir(place) and is_image_name(place)):  # noqa: PTH112, PTH113  # pathlib raises for long names
                return [Path(place) if inside is None else self._folder / inside]
            if inside is not None and (matches := self._by_name.matches(str(inside))):
                return matches
        return []


def _used_columns(table: Table, given: Columns, task: Task) -> dict[str, list[str]]:
    """Return the names of the columns of each role that the table has.

    Raises:
        LabelError: A column that is needed is not there.
        ValueError: `given` has a role that there is not for it, or columns that the task does not take.
    """
    unused = ("label",) if task == "survival" else ("time", "event")
    roles = [role for role in _GUESSES if role not in unused]
    for role in given:
        if role not in roles:
            raise ValueError(f"columns.{role}: there is no {role!r} for task={task}; {suggestion(role, roles)}")
    by_name = {_simple(name): name for name in reversed(table.columns)}
    used: dict[str, list[str]] = {}
    for role in roles:
        guess = next((by_name[guess] for guess in _GUESSES[role] if guess in by_name), None)
        named = given.get(role, guess)
        if named is None and role in _OPTIONAL:
            continue
        if named is None:
            raise LabelError(
                f"{table.path} has no column {role!r}; {_columns_of(table)}. Name the one that holds the {role} as in "
                f"columns={{{role}: {table.columns[0 if role == 'image' else -1] or 'NAME'}}}; "
                f"{', '.join(_GUESSES[role][:5])} are found without that"
            )
        names = list(named) if isinstance(named, (list, tuple)) else [str(named)]
        if not names or (len(names) > 1 and (role != "label" or task == "classification")):
            raise ValueError(
                f"columns.{role} names {len(names)} columns, and task={task} takes one; several are for task=multilabel (0 or 1 "
                "in each) and task=regression"
            )
        for name in names:
            if name not in table.columns:
                raise LabelError(f"{table.path} has no column {name!r} (columns.{role}); {_columns_of(table, name)}")
        used[role] = names
    _log.info("%s: %s", table.path.name, ", ".join(f"{role} from {listed(names)}" for role, names in used.items()))
    return used


def _simple(name: str) -> str:
    """Return a name in lower case with underscores for spaces and hyphens."""
    return name.casefold().replace(" ", "_").replace("-", "_")


def _columns_of(table: Table, name: str = "") -> str:
    near = near_names(name, table.columns)
    return f"its columns are {listed(table.columns)}{f'; did you mean {near[0]!r}?' if near else ''}"


@checked
def read_rows(labels: Path, columns: Columns | None = None, task: Task = "classification") -> list[LabelRow]:
    """Return the rows of a label table, see `read_labels`, that have a label; no splits and patients.

    Raises:
        FileNotFoundError: The file does not exist.
        LabelError: A column is missing, a row is incomplete, or there are no rows.
    """
    table = read_table(labels)
    problems = Problems(table)
    used = _used_columns(table, {**(columns or {}), "patient": None, "split": None}, task)
    rows = _rows(table, used, problems, unlabelled=True)
    problems.refuse()
    return rows


def _rows(
    table: Table, used: Mapping[str, Sequence[str]], problems: Problems, unlabelled: bool = False
) -> list[LabelRow]:
    """Return the rows that can be used; with `unlabelled`, those without a label are no problem."""
    rows: list[LabelRow] = []
    empty: dict[str, list[int]] = {}
    roles = {name: role for role, names in used.items() for name in names if role != "split"}
    for row in table.rows:
        lacking = [name for name in roles if row.cells[name].casefold() in _MISSING]
        if unlabelled and any(roles[name] == "label" for name in lacking):
            continue
        for name in lacking:
            empty.setdefault(name, []).append(row.number)
        cells = {role: tuple(row.cells[name] for name in names) for role, names in used.items()}
        split = cells["split"][0].casefold() if "split" in cells else None
        if split is not None and split not in SPLITS:
            problems.add_rows([row.number], f"the split is {split!r}; it must be one of {', '.join(SPLITS)}")
        elif not lacking:
            labels = tuple(text for role in ("label", "time", "event") for text in cells.get(role, ()))
            patient = cells["patient"][0] if "patient" in cells else None
            rows.append(LabelRow(row.number, cells["image"][0], labels, split, patient, row.cells))
    for name, numbers in empty.items():
        what = f"the {roles[name]}{'' if _simple(name) == roles[name] else f' ({name})'}"
        advice = ", or give columns.patient=null" if roles[name] == "patient" else " or remove the row"
        problems.add_rows(numbers, f"{what} is empty or nan; fill it in{advice}")
    return rows
