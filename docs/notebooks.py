"""Make the notebooks of the tutorials: each page of `docs/tutorials` is run, and written beside it as NAME.ipynb with its pictures.

    uv run python -m docs.notebooks [NAME ...]

A block of Python is a cell, and the text between two blocks another. A picture on a page, `![...](NAME-PICTURE.jpg)`, is what
the block before it saves as `PICTURE.jpg`; in the notebook it is the output of that cell. Nothing is told twice.
"""

import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "tutorials"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", flags=re.S | re.M)
PICTURE = re.compile(r"^!\[[^\]]*\]\((?P<file>[\w-]+\.jpg)\)\n", flags=re.M)
HERE = re.compile(r"\[As a notebook\]\([\w-]+\.ipynb\); ")
SAVED = re.compile(r"savefig\(\"([\w-]+\.jpg)\"")


def cells_of(page: Path) -> list[dict[str, Any]]:
    """Return the cells of a page, without outputs: a block of Python is one, the text between two blocks another."""
    cells: list[dict[str, Any]] = []
    for index, text in enumerate(BLOCK.split(page.read_text(encoding="utf-8"))):
        code = index % 2 == 1
        text = (text if code else HERE.sub("", PICTURE.sub("", text))).strip("\n")
        if text:
            more = {"execution_count": None, "outputs": []} if code else {}
            cell = {"cell_type": "code" if code else "markdown", "id": f"{page.stem}-{index}", "metadata": {}, **more}
            cells.append(cell | {"source": text.splitlines(keepends=True)})
    return cells


def run(page: Path) -> dict[str, Any]:
    """Run a page in an empty folder; its notebook, and the pictures of the page are made anew."""
    cells, scope = cells_of(page), {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for count, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
            code, printed = "".join(cell["source"]), io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"{page.stem}, block {count}", "exec"), scope)
            cell["execution_count"] = count
            if printed.getvalue():
                lines = printed.getvalue().splitlines(keepends=True)
                cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": lines})
            for name in SAVED.findall(code):
                pixels = Path(name).read_bytes()
                (PAGES / f"{page.stem}-{name}").write_bytes(pixels)
                data = {"image/jpeg": base64.b64encode(pixels).decode(), "text/plain": [f"<{name}>"]}
                cell["outputs"].append({"output_type": "display_data", "data": data, "metadata": {}})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    for page in sorted(PAGES.glob("*.md")):
        if page.stem in sys.argv[1:] or not sys.argv[1:]:
            text = json.dumps(run(page), indent=1, ensure_ascii=False)
            page.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")
