"""The tutorials run from top to bottom, on smaller data; their notebooks hold the same cells, and pictures."""

import base64
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from docs.notebooks import PICTURE, SAVED, cells_of
from tests.fresh import run_code

PAGES = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
SMALLER = {
    "slides": {"SIDE = 768": "SIDE = 192", "range(24)": "range(6)", "epochs=6": "epochs=1"},
    "segmentation": {
        "(448, 448, 9)": "(96, 96, 9)",
        "(1200, 1800, 40)": "(160, 240, 9)",
        "range(8)": "range(3)",
        "epochs=10": "epochs=1",
    },
    "pretraining": {"range(400)": "range(16)", "batch_size=64": "batch_size=8", "epochs=30": "epochs=1"},
    "components": {"range(12)": "range(2)", "max_epochs: 8": "max_epochs: 1", "160": "48"},
    "patches": {
        "range(24)": "range(4)",
        "epochs=6": "epochs=1",
        "512": "192",
        "704": "256",
        "(452, 644)": "(132, 196)",
    },
    "engine": {"(480, 480)": "(240, 240)", "[1000, 2000, 4000, 8000, 16000, 32000]": "[1000]"},
}
"""Of each page, what takes time and what stands in its place."""
LONG = ("segmentation", "components", "patches")
"""Pages that take more than some seconds all the same."""


def code_of(page: Path, smaller: dict[str, str]) -> str:
    code = "\n".join("".join(cell["source"]) for cell in cells_of(page) if cell["cell_type"] == "code")
    for large, small in smaller.items():
        assert large in code, large
        code = code.replace(large, small)
    return code


def test_every_page_is_run() -> None:
    assert [page.stem for page in PAGES] == sorted(SMALLER)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem in LONG)) for page in PAGES]
)
def test_a_page_runs_on_small_data(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    code = code_of(page, SMALLER[page.stem])
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    plt.close("all")
    assert all(Path(name).is_file() for name in SAVED.findall(code))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_as_printed(page: Path, tmp_path: Path) -> None:
    run_code(f"import matplotlib\nmatplotlib.use('Agg')\n{code_of(page, {})}", tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_notebook_of_a_page_has_its_cells_and_its_pictures(page: Path) -> None:
    notebook = json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))
    told = "python -m docs.notebooks makes it anew"
    assert [cell["source"] for cell in notebook["cells"]] == [cell["source"] for cell in cells_of(page)], told
    shown = [file for _, file in re.findall(r"(!\[[^\]]*\])\(([\w-]+\.jpg)\)", page.read_text(encoding="utf-8"))]
    assert shown == PICTURE.findall(page.read_text(encoding="utf-8")), "a picture is a paragraph of its own"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not any(output["output_type"] == "error" for output in outputs)
    pictures = [base64.b64decode(output["data"]["image/jpeg"]) for output in outputs if "data" in output]
    assert pictures == [(page.parent / file).read_bytes() for file in shown], told
