"""The foreground of an image is found on a thumbnail, or said in a file or an array."""

import json

import numpy as np
import pytest
import tifffile
from skimage import data

from widefield.images import ImageReadError, foreground, open_image, thumbnail


@pytest.fixture
def slide(tmp_path):
    """512x768 pixels of 0.5 micrometres, stained tissue in the quarter at the bottom right."""
    pixels = np.full((512, 768, 3), 240, np.uint8)
    pixels[256:, 384:] = data.immunohistochemistry()[:256, :384]
    resolution = {"resolution": (20_000, 20_000), "resolutionunit": "centimeter"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", metadata=None, **resolution)
    return open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("method", ["otsu", "hsv"])
def test_tissue_is_found_where_it_lies(slide, method):
    mask = foreground(slide, method, spacing=2)
    assert mask.cells.shape == (128, 192)
    assert not mask.cells[:60].any() and not mask.cells[:, :90].any()
    assert mask.cells[70:, 100:].mean() > 0.5
    assert mask.share == mask.cells.mean()


def test_a_picture_without_colours_differs_from_its_usual_grey(tmp_path):
    picture = np.zeros((40, 40), np.uint8)
    picture[10:20, 10:20] = 200
    np.save(tmp_path / "a.npy", picture)
    cells = foreground(open_image(tmp_path / "a.npy")).cells
    assert cells[10:20, 10:20].all() and cells.sum() == 100
    np.save(tmp_path / "a.npy", np.full((10, 10), 7, np.uint8))
    assert not foreground(open_image(tmp_path / "a.npy")).cells.any()


@pytest.mark.parametrize("missing", [np.nan, -99.0])
def test_what_holds_no_data_is_neither_foreground_nor_part_of_a_thumbnail(tmp_path, missing):
    pixels = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    pixels[:32] = missing
    tags = [] if np.isnan(missing) else [(42113, "s", 0, str(missing), True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", metadata=None, extratags=tags)
    image = open_image(tmp_path / "a.tif")
    cells = foreground(image, "hsv").cells
    assert not cells[:32].any() and cells[32:].any()
    filled = open_image(tmp_path / "a.tif", fill=7)
    assert (filled.read(0, 0, 40, 64)[:, :32] == 7).all() and (
        filled.read(32, 0, 8, 64) == image.read(32, 0, 8, 64)
    ).all()
    picture = thumbnail(image, 16)
    assert (picture[:8] == 0).all() and picture[8:].max() == 255


def test_polygons_of_a_geojson_file_are_the_foreground_but_for_their_holes(tmp_path, slide):
    square = [[100, 100], [500, 100], [500, 400], [100, 400], [100, 100]]
    hole = [[200, 200], [300, 200], [300, 300], [200, 300], [200, 200]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square, hole]}, "properties": {}}
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    cells = np.repeat(np.repeat(foreground(slide, str(tmp_path / "a.geojson"), spacing=1).cells, 2, 0), 2, 1)
    expected = np.zeros((512, 768), bool)
    expected[100:400, 100:500] = True
    expected[200:300, 200:300] = False
    inner = np.ones_like(expected)
    for y in (100, 200, 300, 400):  # within a cell of an edge either is right
        inner[y - 3 : y + 3] = False
    for x in (100, 200, 300, 500):
        inner[:, x - 3 : x + 3] = False
    np.testing.assert_array_equal(cells[inner], expected[inner])


@pytest.mark.parametrize(
    "content", ["{", "{}", "[1]", '{"type": "FeatureCollection", "features": []}', '{"type": "Point"}']
)
def test_a_file_that_is_no_geojson_is_named(tmp_path, slide, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ImageReadError, match=r"a\.json: it (is no GeoJSON|holds no polygon)"):
        foreground(slide, tmp_path / "a.json")


def test_wrong_arguments_of_a_mask_are_named(tmp_path, slide):
    with pytest.raises(ValueError, match="foreground method 'best'; expected otsu, hsv, a GeoJSON file or an array"):
        foreground(slide, "best")
    with pytest.raises(ValueError, match=r"shape \(3,\) and type float64; expected a boolean array"):
        foreground(slide, np.ones(3))
    np.save(tmp_path / "a.npy", np.ones((9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"needs the spacing of .*a\.npy, which has none"):
        foreground(open_image(tmp_path / "a.npy"), spacing=2)


def test_pixels_that_are_filled_hold_no_data(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 200, (64, 64, 3)).astype(np.float32)
    pixels[:, 32:] = np.nan
    np.save(tmp_path / "a.npy", pixels)
    image = open_image(tmp_path / "a.npy", fill=180.0)
    assert image.read(0, 32, 1, 1).tolist() == [[[180]]] * 3
    assert foreground(image).cells[:, :32].any() and not foreground(image).cells[:, 32:].any()
    assert thumbnail(image, 64)[:, :32].any() and not thumbnail(image, 64)[:, 32:].any()
