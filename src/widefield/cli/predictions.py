"""The table of `widefield predict`, which loses no finished row, whatever ends the run."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from widefield.writing import replacing

_log = logging.getLogger(__name__)
Row = dict[str, str]
_IMAGE, _FILES, _ERROR = "image", "overlay", "error"
"""Columns."""


class PredictionTable:
    """`predictions.csv`: a row for each image, which has reached the disk when `add` returns.

    The columns are `image`, those of the first prediction, and `error`. Failures before the first prediction wait for it.

    Attributes:
        path: The table.
        names: Names of the files that go with its rows.

    Args:
        folder: Where it is; made when there is something to write.
        settings: What decides the numbers beside the images, as plain data. It is kept in `predictions.json`.

    Raises:
        NotADirectoryError: `folder` is a file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; name a folder with --out DIR")
        self.path = folder / "predictions.csv"
        self.names: set[str] = set()
        self._settings_path, self._settings = folder / "predictions.json", dict(settings)
        self._columns: list[str] = []
        self._waiting: list[Row] = []
        self._added = 0

    def refuse_another(self) -> None:
        """Raise FileExistsError if there is a table already."""
        if self.path.exists():
            raise FileExistsError(
                f"{self.path} exists; go on with it by --resume, or name another folder with --out DIR"
            )

    def resume(self, files: Sequence[Path]) -> list[Path]:
        """Take on the table that is there, and return those of `files` that it has no prediction for.

        The rows of images that failed and are tried again go, and a last row that was not written to its end.

        Raises:
            ValueError: It was made with other settings, or is another table.
        """
        if not self.path.exists():
            return list(files)
        self._check_settings()
        text = self.path.read_text(encoding="utf-8", errors="replace")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        columns, rows = list(reader.fieldnames or (_IMAGE, _ERROR)), list(reader)
        if not {_IMAGE, _ERROR} <= set(columns):
            raise ValueError(f"{self.path} has no columns image and error; name another folder with --out DIR")
        finished = {_place(row[_IMAGE]): row for row in rows if not row[_ERROR]}
        left = [file for file in files if _place(file) not in finished]
        again = {_place(file) for file in left}
        kept = [row for row in rows if not row[_ERROR] or _place(row[_IMAGE]) not in again]
        if finished:
            self._columns = columns
            self.names = {name for row in kept for name in row.get(_FILES, "").split(";")}
            self._rewrite(kept)
        else:
            self._waiting = kept
        _log.info("%d of %d images have their prediction in %s", len(files) - len(left), len(files), self.path)
        return left

    def add(self, image: Path, cells: Row) -> None:
        """Append the prediction of an image.

        Args:
            image: Its path.
            cells: By column; `overlay` holds the names of the files that go with it, separated by semicolons.

        Raises:
            ValueError: The columns are others than those of the rows before.
            OSError: The row cannot be written.
        """
        row = {_IMAGE: str(image), **cells, _ERROR: ""}
        if not self._columns:
            self._columns = list(row)
            self._rewrite(self._waiting)
        if list(row) != self._columns:
            raise ValueError(
                f"the prediction has the columns {', '.join(row)}, and {self.path} has {', '.join(self._columns)}; "
                "name another folder with --out DIR"
            )
        self._append(row)
        self.names.update(cells[_FILES].split(";"))
        self._added += 1

    def add_failure(self, image: Path, reason: str) -> None:
        """Append an image that failed, and the reason. Raises OSError if nothing can be written."""
        row = {_IMAGE: str(image), _ERROR: " ".join(reason.split())}
        if self._columns:
            self._append(row)
        else:
            self._write_settings()  # before all others are computed it shows if nothing can be written
            self._waiting.append(row)

    def finish(self) -> None:
        """Write failures that still wait."""
        if self._waiting and not self._columns:
            self._columns = [_IMAGE, _ERROR]
            self._rewrite(self._waiting)
        if self._added:
            _log.info("%d predictions: %s", self._added, self.path)

    def _append(self, row: Row) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(self._lines([row]))
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, rows: Sequence[Row]) -> None:
        self._write_settings()
        header = dict(zip(self._columns, self._columns, strict=True))
        with replacing(self.path) as partial:
            partial.write_text(self._lines([header, *rows]), encoding="utf-8", newline="")

    def _lines(self, rows: Iterable[Row]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()

    def _write_settings(self) -> None:
        with replacing(self._settings_path) as partial:
            partial.write_text(json.dumps(self._settings, indent=2), encoding="utf-8")

    def _check_settings(self) -> None:
        if not self._settings_path.exists():
            return
        before = json.loads(self._settings_path.read_text(encoding="utf-8"))
        changed = [name for name, value in self._settings.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"{self.path} was made with another {' and another '.join(changed)}; give the same, or name another folder with "
                "--out DIR"
            )


def _place(image: str | Path) -> Path:
    """Return the path by which an image is known, however it was named."""
    return Path(image).absolute()
