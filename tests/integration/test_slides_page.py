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


def test_from_monai(tmp_path: Path) -> None:
    """With a small network of the same name in the place of MONAI's, which is no dependency of the tests."""
    write_slides(tmp_path, 1, 512)
    (tmp_path / "images" / "tumor_001.tif").rename(tmp_path / "slide.tif")
    (tmp_path / "monai.py").write_text(
        "from torch import nn\n"
        "def BasicUNet(spatial_dims, in_channels, out_channels, features):\n"
        "    layers = nn.Conv2d(in_channels, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.Conv2d(8, out_channels, 3, padding=1)\n"
        "    return nn.Sequential(*layers)\n"
    )
    code = "\n".join(
        re.findall(r"```python\n(.*?)```", (DOCS / "from-monai.md").read_text(encoding="utf-8"), flags=re.S)
    )
    printed = run_page(code.replace("monai.networks.nets", "monai"), tmp_path)
    assert [line for line in printed.splitlines() if "pixels" not in line] == ["True", "(1, 512, 512)", "True"]
