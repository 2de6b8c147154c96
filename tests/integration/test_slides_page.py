"""The pages on slides and on formats run from top to bottom; the first on small slides and for one epoch."""

import csv
import re
from pathlib import Path

from tests.slides import run_page, write_slides

DOCS = Path(__file__).parents[2] / "docs"


def test_from_slides_to_heatmaps(tmp_path: Path) -> None:
    write_slides(tmp_path, 2, 512)
    (tmp_path / "images").rename(tmp_path / "slides")
    with (tmp_path / "evaluation" / "reference.csv").open() as file:
        rows = [(row["image"], row["class"]) for row in csv.DictReader(file)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *map(",".join, rows)]), encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "slides.md").read_text(encoding="utf-8"), flags=re.S))
    assert "max_epochs=20" in code
    printed = run_page(code.replace("max_epochs=20", "max_epochs=1"), tmp_path)
    assert "(3, 512, 512)" in printed and "tile" in printed
    assert len(list((tmp_path / "runs/first/heatmaps").glob("*.png"))) == len(rows)


def test_formats(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / "formats.md").read_text(encoding="utf-8"), flags=re.S))
    (tmp_path / "a.square").write_bytes(b"SQUARE" + bytes(range(9)))
    printed = run_page(code + '\nprint(wf.open_image("a.square").read(0, 1, 1, 2).tolist())', tmp_path)
    said = [line.partition("#")[2].strip() for line in code.splitlines() if line.startswith("print(")]
    assert printed.splitlines() == [*said, "[[[1, 2]]]"]
