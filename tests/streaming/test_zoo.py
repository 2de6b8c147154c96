"""Some rows of the zoo (`benchmarks/zoo.py`), one for each kind of network; all rows take about an hour."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import zoo
import zoo_rows

FAST = {
    "timm/test_resnet": "exact",
    "timm/test_convnext": "exact",
    "timm/resnetblur18": "exact",
    "timm/repghostnet_050": "exact with stages",
    "timm/test_byobnet": "exact with stages",
    "timm/lcnet_035": "exact with stages",
    "timm/test_nfnet": "exact with stages",
    "timm/convnextv2_atto": "exact with stages",
    "features/ghostnet_100": "exact with stages",
    "torchvision/squeezenet1_1": "exact",
}


SLOW = ("timm/test_convnext", "features/ghostnet_100", "timm/repghostnet_050", "timm/lcnet_035", "timm/test_nfnet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAST])
def test_a_row_is_exact(name: str) -> None:
    row = next(row for row in zoo_rows.rows() if row.name == name)
    result = zoo.check_row(row, seed=0)
    assert result["verdict"] == FAST[name], result


def test_every_module_of_timm_has_a_row_or_a_reason_to_be_left_out() -> None:
    assert zoo_rows.uncovered() == []


def test_the_page_has_a_line_per_row_and_counts() -> None:
    results: list[dict[str, Any]] = [
        {
            "model": "timm/a",
            "verdict": "partly",
            "image_shape": [1, 3, 5, 6],
            "stages": 2,
            "streamed_fraction": 0.5,
            "worst_error": 1e-15,
            "refused": [{"module_path": "x", "op": "aten.cumsum"}],
        },
        {"model": "timm/b", "verdict": "timed out", "reason": "took more than 1 s"},
    ]
    here = {"date": "2026-01-01", "machine": "m", "versions": "v", "commit": "c"}
    page = zoo.page(results, [here], "command")
    assert "| `timm/a` | 5x6 | partly | 2 | 50.0% | 1.0e-15 | `x`: aten.cumsum |" in page
    assert "| `timm/b` |  | timed out |  |  |  | took more than 1 s |" in page
    assert "timm: 0 of 2 exact (1 partly, 1 timed out)" in page
