"""Charts and the page that holds them: well-formed, in the colours of the page, asking no network."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from widefield.reports import Page
from widefield.reports.charts import Line, binned, confusion, curves, memory_bars, scatter


def svg_of(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup[markup.index("<svg") :])


def test_a_line_has_a_gap_where_a_number_is_missing() -> None:
    drawn = svg_of(curves([Line("a < b", [1, 2, 3, 4], [0.5, math.nan, 0.3, 0.2])]))
    (path,) = [one for one in drawn.iter("path") if one.get("stroke-width")]
    assert re.sub(r"[^ML]", "", str(path.get("d"))) == "MML"
    assert len(list(drawn.iter("circle"))) == 3


def test_a_band_that_goes_beyond_the_lines_ends_at_the_border_of_the_chart() -> None:
    drawn = svg_of(curves([Line("loss", [1, 2], [1.0, 0.5], [0.0, 0.4], [900.0, 0.6])]))
    (band,) = drawn.iter("polygon")
    heights = [float(point.split(",")[1]) for point in str(band.get("points")).split()]
    assert len(heights) == 4 and min(heights) == 10 and max(heights) <= 210


@pytest.mark.parametrize("values", [[0.001] * 3, [0.0] * 3, [math.nan] * 3, [1e30, -1e30, 0.0]])
def test_numbers_of_any_size_can_be_drawn(values: list[float]) -> None:
    drawn = svg_of(curves([Line("rate", [1, 2, 3], values)]))
    places = [float(dot.get(key)) for dot in drawn.iter("circle") for key in ("cx", "cy")]  # type: ignore[arg-type]
    assert all(0 <= place <= 440 for place in places)


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.2, 0.97], (0.2, 1)),
        ([0.31, 0.93, 1.0], (0.2, 1)),
        ([1.0] * 3, (0.9, 1)),
        ([0.0] * 3, (0, 0.1)),
        ([0.9991, 0.9999], (0.999, 1)),
        ([0.4, 1.3], (0.4, 1.4)),
        ([-0.5, 0.5], (-0.6, 0.6)),
    ],
)
def test_an_axis_of_shares_does_not_reach_beyond_0_and_1(values: list[float], ends: tuple[float, float]) -> None:
    drawn = svg_of(curves([Line("val_mean_iou", list(range(1, len(values) + 1)), values)]))
    ticks = [float(str(one.text)) for one in drawn.iter("text") if one.get("text-anchor") == "end"]
    assert (min(ticks), max(ticks)) == pytest.approx(ends)
    heights = [float(str(dot.get("cy"))) for dot in drawn.iter("circle")]
    assert len(heights) == len(values) and all(10 <= height <= 210 for height in heights)


def test_a_line_with_other_numbers_of_points_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss: x, y, low and high have \[1, 2\] points; give as many of each"):
        Line("loss", [1, 2], [1.0])


def test_bins_have_the_mean_and_the_ends_of_their_points() -> None:
    line = binned("loss", range(6), [1.0, 3.0, 2.0, 4.0, 8.0, 6.0], count=3)
    assert (line.x, line.y) == ([0.5, 2.5, 4.5], [2.0, 3.0, 7.0])
    assert (line.low, line.high) == ([1.0, 2.0, 6.0], [3.0, 4.0, 8.0])
    assert binned("loss", [1, 2], [3.0, 4.0]).low is None


def test_bars_of_memory_are_as_long_as_their_bytes_and_the_sum_is_as_long_as_all() -> None:
    markup = memory_bars({"weights": 2**20, "maps": 0, "step": 3 * 2**20}, {"measured peak": None}, budget=8 * 2**20)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", markup)]
    assert widths == pytest.approx([12.5 / 1.02, 37.5 / 1.02, 12.5 / 1.02, 37.5 / 1.02], abs=0.01)
    assert re.findall(r"<dt>([^<]+)", markup) == ["weights", "step", "all of the plan"]
    assert "4 MiB" in markup and f"left:{1 / 1.02:.2%}" in markup


def test_a_confusion_matrix_is_coloured_by_the_share_of_the_true_class() -> None:
    table = ElementTree.fromstring(confusion(np.array([[3, 1], [0, 0]]), ["a<b", "c"]))
    cells = [(cell.text, cell.get("class"), cell.get("style")) for cell in table.iter("td")]
    assert cells[:2] == [("3", "right strong", "--share:75.0%"), ("1", "wrong", "--share:25.0%")]
    assert cells[2:] == [("0", "wrong", "--share:0.0%"), ("0", "right", "--share:0.0%")]


def test_points_lie_on_the_diagonal_where_the_numbers_are_the_same() -> None:
    drawn = svg_of(scatter([1.0, 2.0, math.nan], [1.0, 2.0, 0.0], ["a", "b", "c"], "true age", "predicted age"))
    titles = [dot[0].text for dot in drawn.iter("circle")]
    assert titles == ["a: true age 1, predicted age 1", "b: true age 2, predicted age 2"]


def test_a_page_asks_no_network_and_follows_the_scheme_of_the_reader(tmp_path: Path) -> None:
    page = Page("a < b")
    page.numbers([("accuracy", 0.98765)])
    page.chart(curves([Line("loss", [1], [0.5])]), "a <caption>")
    with page.folded("more"):
        page.table(["n"], [[1]])
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0.988" in text and "a &lt;caption&gt;" in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert not re.search(r"https?:|@import|<script|<link|url\(", text)
    assert text.index("<details>") < text.index("<table>") < text.index("</details>")
