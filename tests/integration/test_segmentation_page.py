"""The page on segmentation runs from top to bottom, on small images."""

import re
from pathlib import Path

from tests.label_files import write_segmented
from tests.slides import run_page

PAGE = Path(__file__).parents[2] / "docs" / "segmentation.md"


def test_segmentation(tmp_path: Path) -> None:
    write_segmented(tmp_path, 3)
    (tmp_path / "images").rename(tmp_path / "scenes")
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S))
    printed = run_page(code, tmp_path)
    assert "val_mean_iou" in printed and "tensor(True)" in printed
    assert (tmp_path / "predicted.ome.tif").is_file()
