"""Which background is left out of an image, by which mask, and what stands there."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.slides import write_blank_slide
from widefield.images import ForegroundChoice, ImageFile, foreground, open_image


@pytest.mark.parametrize(
    ("case", "is_left_out"),
    [
        ({}, True),
        ({"spacing": None, "levels": 2}, True),
        ({"spacing": None}, False),
        ({"side": 4032}, False),
        ({"tissue": slice(0, 4096)}, False),
        ({"tissue": slice(0, 0)}, False),
        ({"crs": "EPSG:32632"}, False),
    ],
    ids=["a slide", "levels say so too", "a picture", "small", "full of tissue", "blank", "a map"],
)
def test_only_slides_that_are_mostly_blank_have_a_background_by_default(
    tmp_path: Path, case: dict[str, Any], is_left_out: bool
) -> None:
    crs = case.pop("crs", None)
    image = open_image(write_blank_slide(tmp_path / "a.tif", **case))
    image.crs = crs
    found = ForegroundChoice().of(image)
    assert (found is not None) == is_left_out
    if found is not None:
        assert not found.required
        assert (found.mask.cells == foreground(image, "otsu").cells).all()
        assert found.mask.cells[:, 60:120].mean() > 0.9 and not found.mask.cells[:, 130:].any()
    assert ForegroundChoice("none").of(image) is None


def test_whether_a_slide_has_a_background_does_not_depend_on_the_level_that_is_read(tmp_path: Path) -> None:
    image = open_image(write_blank_slide(tmp_path / "a.tif", levels=2), level=1)
    assert image.shape[2] == 2048
    assert ForegroundChoice().of(image) is not None


@pytest.mark.parametrize(
    ("pixels", "fill"),
    [
        (np.full((3, 20, 40), [[[250]], [[240]], [[7]]], np.uint8), (250, 240, 7)),
        (np.full((1, 20, 40), 300, np.uint16), (300,)),
        (np.full((2, 20, 40), [[[0.25]], [[-1.5]]], np.float32), (0.25, -1.5)),
    ],
)
def test_the_background_counts_as_its_median_in_the_type_of_the_image(
    tmp_path: Path, pixels: np.ndarray, fill: tuple[float, ...]
) -> None:
    pixels[:, 3, 24] = 12  # dust
    pixels[:, :, :10] = 99
    square = [[0, 0], [10, 0], [10, 20], [0, 20], [0, 0]]
    (tmp_path / "a.json").write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    found = ForegroundChoice(str(tmp_path / "a.json")).of(open_image(pixels))
    assert found is not None and found.fill == fill


def test_a_background_without_data_counts_as_what_takes_the_place_of_missing_data(tmp_path: Path) -> None:
    pixels = np.full((2, 20, 40), np.nan, np.float32)
    pixels[:, 5:10] = 3
    square = [[0, 5], [40, 5], [40, 10], [0, 10], [0, 5]]
    (tmp_path / "a.json").write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
    for given, fill in ((None, 0), (7.0, 7)):
        found = ForegroundChoice(str(tmp_path / "a.json")).of(open_image(pixels, fill=given))
        assert found is not None and found.fill == (fill, fill)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("otsuu", ValueError, r"foreground='otsuu' is neither one of auto, none, otsu, hsv, nor a GeoJSON"),
        ("missing.geojson", FileNotFoundError, "missing.geojson"),
        ("otsu", ValueError, "blank.tif has no foreground by otsu; leave it out"),
        ("empty", FileNotFoundError, "neither blank.tif.geojson nor blank.geojson"),
    ],
)
def test_a_mask_that_was_asked_for_and_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    image = open_image(write_blank_slide(tmp_path / "blank.tif", tissue=slice(0, 0)))
    with pytest.raises(error, match=message):
        ForegroundChoice(method).of(image)


def test_a_folder_holds_the_polygons_of_each_image_by_its_name(tmp_path: Path) -> None:
    path = write_blank_slide(tmp_path / "a.ome.tif", levels=5)
    image = open_image(path, level=4)  # of fewer pixels than a mask has cells
    for name, right in (("a.geojson", 512), ("a.ome.geojson", 1024), ("a.ome.tif.geojson", 2048)):
        square = [[0, 0], [right, 0], [right, 64], [0, 64], [0, 0]]
        (tmp_path / name).write_text(json.dumps({"type": "Polygon", "coordinates": [square]}))
        found = ForegroundChoice(str(tmp_path)).of(image)
        assert found is not None and found.required
        assert found.mask.share == pytest.approx(right / 4096, abs=0.01)
        assert all(cells <= pixels for cells, pixels in zip(found.mask.cells.shape, image.shape[1:], strict=True))
    ForegroundChoice(str(tmp_path)).check_count(2)
    with pytest.raises(ValueError, match="is the foreground of one image, and there are 2"):
        ForegroundChoice(str(tmp_path / "a.geojson")).check_count(2)


def test_a_background_goes_with_its_image_into_other_processes(tmp_path: Path) -> None:
    image = open_image(write_blank_slide(tmp_path / "a.tif"))
    image.background = ForegroundChoice().of(image)
    copied: ImageFile = pickle.loads(pickle.dumps(image))
    assert (copied.background.mask.cells == image.background.mask.cells).all()
    assert copied.background.fill == image.background.fill == (240, 240, 240)
