"""Tables on disk as rows of text: CSV of any dialect, and Parquet."""

import codecs
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from widefield.errors import MissingExtraError, WidefieldError

_DELIMITERS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SHOWN = 10
"""Names listed in an error before "and N more"."""


class LabelError(WidefieldError, ValueError):
    """A label table that cannot be used; the message names the file, the row or the images, and what to do."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        number: Number of its line in a text file, and of the row, from 1, in a Parquet file.
        cells: The text of each cell by the name of its column, without spaces around it; missing values are empty.
    """

    number: int
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        path: Its file.
        columns: Names of its columns, in order.
        rows: Its rows, one at least; those without any text are left out.
        unit: The word for what `Row.number` counts, "line" or "row".
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    unit: str

    def places(self, numbers: Sequence[int]) -> str:
        """Return words for the rows of these numbers, such as "line 3" or "lines 3, 7, 9"."""
        return f"{self.unit}{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


class Problems:
    """Faults of a table, collected so that one error says all of it.

    Attributes:
        table: The table.
        found: A message for each kind of problem.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.found: list[str] = []

    def add(self, message: str) -> None:
        """Add a message about the whole table."""
        self.found.append(message)

    def add_rows(self, numbers: Sequence[int], message: str) -> None:
        """Add what is wrong with the rows of these numbers, if there are any."""
        if numbers:
            self.found.append(f"{self.table.places(numbers)}: {message}")

    def refuse(self) -> None:
        """Raise LabelError if anything was added."""
        if self.found:
            between = "\n  " if len(self.found) > 1 else " "
            raise LabelError(between.join([f"{self.table.path}:", *self.found]))


def listed(items: Iterable[object]) -> str:
    """Return the first items, separated by commas, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def read_table(path: Path) -> Table:
    """Read a table whose first row has the names of the columns.

    Text may be UTF-8, or UTF-16 or UTF-32 with a byte order mark or mostly of ASCII characters, its cells separated by commas,
    semicolons, tabs or bars, whichever the first row has most of, and its lines may end in any way. A line `sep=;` before the
    first row, as Excel writes it, is obeyed. The content tells a Parquet file, not the name; its columns of lists and structures
    are left out.

    Raises:
        FileNotFoundError: The file does not exist.
        MissingExtraError: A Parquet file is read by pyarrow, which is not installed.
        LabelError: It is no such table, has no rows, a row has more cells than there are columns, or two columns one name.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give a label table, a CSV file with the columns image and label"
        )
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        columns, rows, unit = *_parquet(path), "row"
    else:
        columns, rows, unit = *_text(path, content), "line"
    columns = [name.strip() for name in columns]
    double = sorted({name for name in columns if name and columns.count(name) > 1})
    if double:
        raise LabelError(f"{path} has several columns named {listed(double)}; give each a name of its own")
    table: list[Row] = []
    for number, cells in rows:
        stripped = [cell.strip() for cell in cells]
        if any(stripped[len(columns) :]):
            raise LabelError(
                f"{path}, {unit} {number} has {len(cells)} cells and the first row {len(columns)}; "
                "write a cell that holds the separator in quotes"
            )
        if any(stripped):
            stripped += [""] * (len(columns) - len(stripped))
            table.append(Row(number, dict(zip(columns, stripped, strict=False))))
    if not table:
        found = "a header but no rows" if any(columns) else "no header and no rows"
        raise LabelError(f"{path} has {found}; add one row per image below the names of the columns")
    return Table(path, tuple(columns), tuple(table), unit)


def _text(path: Path, content: bytes) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the first row, and the others with the numbers of their lines."""
    text = _decoded(path, content)
    first = next((line for line in text.splitlines() if line.strip()), "")
    marked = first.lower().startswith("sep=") and len(first) == 5
    delimiter = (
        first[-1] if marked else max(_DELIMITERS, key=lambda one: len(next(csv.reader([first], delimiter=one), ())))
    )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise LabelError(f"{path}, line {reader.line_num}: {error}; save the table as a UTF-8 CSV file") from error
    (_, header), *others = rows[1 if marked else 0 :] or [(0, [])]
    return header, others


def _decoded(path: Path, content: bytes) -> str:
    if content.startswith(b"PK\3\4"):
        raise LabelError(f"{path} is an Excel workbook or another archive; save the sheet as a UTF-8 CSV file")
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content[:2]:  # UTF-16 without a mark: every second byte of ASCII text is 0
        encoding = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LabelError(
            f"{path}, line {line}, is not {encoding.upper()} text ({error.reason}); save it as a UTF-8 CSV file"
        ) from None


def _parquet(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the names of the columns, and the rows with their numbers."""
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise MissingExtraError("a Parquet table", "pyarrow", "parquet") from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise LabelError(f"{path} cannot be read as a Parquet file: {error}") from error
    names = [field.name for field in table.schema if not types.is_nested(field.type)]
    columns = [["" if value is None else str(value) for value in table[name].to_pylist()] for name in names]
    return names, [(number, list(cells)) for number, cells in enumerate(zip(*columns), start=1)]
