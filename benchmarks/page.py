"""Writes docs/benchmarks.md: benchmarks/page.md, with tables of the files in benchmarks/results.

    uv run python benchmarks/page.py

A line `<!-- results/NAME.json -->` is replaced by the tables of that file, which `widefield bench --json` or benchmarks/gpu.py
wrote.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from widefield.cli.bench import HEADER, table_row
from widefield.streaming.budget import format_bytes

FOLDER = Path(__file__).parent
RESULTS = re.compile(r"<!-- (results/\w+\.json) -->")
PAGE = FOLDER.parent / "docs" / "benchmarks.md"


def page() -> str:
    """Return the page as it should be."""
    text = (FOLDER / "page.md").read_text(encoding="utf-8")
    return RESULTS.sub(lambda found: tables(FOLDER / found[1]), text)


def tables(file: Path) -> str:
    """Return the tables of a file of results, in Markdown, below what it was measured with."""
    data = json.loads(file.read_text(encoding="utf-8"))
    places = ", ".join(str(data[key]) for key in ("device", "machine") if data[key] != "CPU")
    lines = [f"`{data['command']}`", f"{data['date']}, {places}, {data['threads']} threads, torch {data['torch']}."]
    rows = [row for row in data["rows"] if "way" in row]
    lines += ["", *HEADER, *(table_row(row) for row in rows if row["what"] != "largest")]
    return "\n".join([*lines, *_largest([row for row in rows if row["what"] == "largest"])])


def _largest(rows: list[dict[str, Any]]) -> Iterator[str]:
    if rows:
        yield from (
            "",
            "| largest step | dtype | way | memory | pixels | s | planned MiB |",
            "|---|---|---|---|---|---|---|",
        )
    for row in rows:
        fits = "" if row.get("fits", True) else " does not fit"
        planned = f"{row['predicted_bytes'] / 2**20:.0f}" if "predicted_bytes" in row else ""
        seconds = "" if row.get("seconds") is None else f"{row['seconds']:.1f}"
        memory = format_bytes(row["cap"]) if "cap" in row else ""
        cells = (row["model"], row["dtype"], row["way"], memory, f"{row['size']}{fits}", seconds, planned)
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
