"""Label maps: the indices of label images, and polygons drawn region by region as others draw them whole."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import rasterio.features
import tifffile

from tests.label_files import write_label_map
from widefield.images import ImageReadError, LabelMapError, open_image, open_labels

SIZE = (90, 110)
LABELS = np.random.default_rng(0).integers(0, 5, SIZE, dtype=np.uint8)
IMAGE = open_image(np.zeros((*SIZE, 3), np.uint8))


def feature(name: Any, *rings: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [np.asarray(ring).tolist() for ring in rings]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def write_geojson(path: Path, *features: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.png", "palette.png", "palette.bmp", "palette.gif", "palette.tif", "lzw.tif"])
def test_a_label_image_gives_the_indices_that_are_stored(tmp_path: Path, name: str) -> None:
    if name == "lzw.tif":
        colours = {"photometric": "palette", "colormap": np.arange(768, dtype=np.uint16).reshape(3, 256) * 85}
        tifffile.imwrite(tmp_path / name, LABELS, tile=(16, 16), compression="lzw", metadata=None, **colours)
    else:
        write_label_map(tmp_path / name, LABELS, palette=name.startswith("palette"))
    found = open_labels(tmp_path / name, IMAGE)
    assert found.shape == (1, *SIZE) and found.dtype == np.uint8
    np.testing.assert_array_equal(found.read(7, 3, 30, 40)[0], LABELS[7:37, 3:43])


@pytest.mark.parametrize(
    "options",
    [{"compression": "lzw", "tile": (32, 32)}, {}, {"compression": "deflate", "rowsperstrip": 7}, {"dtype": "u2"}],
    ids=["tiles", "plain", "strips", "16 bits"],
)
def test_of_a_tiff_with_a_palette_the_indices_are_the_labels(tmp_path: Path, options: dict[str, Any]) -> None:
    stored = LABELS.astype(options.pop("dtype", "u1"))
    table = np.random.default_rng(0).integers(0, 2**16, (3, 2 ** (8 * stored.itemsize)), dtype=np.uint16)
    described = {"extratags": [(42113, "s", 0, "3", True)], "metadata": None}  # 3 is no data
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="palette", colormap=table, **described, **options)
    labels = open_labels(tmp_path / "a.tif", IMAGE)
    assert labels.dtype == stored.dtype
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(labels)).read(7, 3, 30, 40)[0], LABELS[7:37, 3:43])
    image = open_image(tmp_path / "a.tif")
    assert (image.shape, image.nodata) == ((3, *SIZE), None)
    indices = open_image(tmp_path / "a.tif", palette="indices")
    assert (indices.shape, indices.nodata) == ((1, *SIZE), 3)


@pytest.mark.parametrize("ending", [".bmp", ".gif"])
def test_pictures_with_a_palette_give_their_indices_when_asked(tmp_path: Path, ending: str) -> None:
    picture = PIL.Image.fromarray(LABELS, "P")
    picture.putpalette(np.arange(768) % 251)
    picture.save(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(open_labels(tmp_path / f"a{ending}", IMAGE).read(0, 0, *SIZE)[0], LABELS)
    with pytest.raises(ValueError, match=r'palette=True for .*; expected "colours" or "indices"'):
        open_image(tmp_path / f"a{ending}", palette=True)


def test_a_tiff_of_16_bits_is_a_label_image(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", LABELS.astype(np.uint16) * 100)
    np.testing.assert_array_equal(open_labels(tmp_path / "a.tif", IMAGE).read(0, 0, *SIZE)[0], LABELS * np.uint16(100))


def test_polygons_are_drawn_as_by_gdal_whatever_the_regions(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    rings = []
    for _ in range(6):
        middle, radius = random.uniform(0, 110, 2), random.uniform(5, 50, 20)
        outer = middle + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        rings.append([outer, middle + 0.4 * (outer - middle)])
    names = ["a", "b", "a", "c", "b", "c"]
    path = write_geojson(tmp_path / "x.geojson", *(feature(name, *one) for name, one in zip(names, rings, strict=True)))
    found = open_labels(path, IMAGE, ["ground", "a", "b", "c"])
    shapes = [
        ({"type": "Polygon", "coordinates": [[*map(tuple, r), tuple(r[0])] for r in one]}, " abc".index(name))
        for name, one in zip(names, rings, strict=True)
    ]
    expected = rasterio.features.rasterize(shapes, out_shape=SIZE, dtype="uint8")
    whole = found.read(0, 0, *SIZE)[0]
    np.testing.assert_array_equal(whole, expected)
    for y, x, height, width in ((0, 0, 1, 1), (13, 27, 31, 8), (60, 100, 30, 10), (40, 0, 2, 110)):
        np.testing.assert_array_equal(
            found.read(y, x, height, width)[0], whole[y : y + height, x : x + width], strict=True
        )


def test_polygons_are_in_pixels_of_the_largest_level(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        file.write(np.zeros((64, 64, 3), np.uint8), photometric="rgb", tile=(16, 16), subifds=1)
        file.write(np.zeros((32, 32, 3), np.uint8), photometric="rgb", tile=(16, 16), subfiletype=1)
    path = write_geojson(tmp_path / "x.geojson", feature("a", [(8, 16), (24, 16), (24, 40), (8, 40)]))
    labels = open_labels(path, open_image(tmp_path / "slide.tif", level=1), ["ground", "a"]).read(0, 0, 32, 32)[0]
    assert labels[8:20, 4:12].all() and labels.sum() == 12 * 8


def test_what_is_no_label_map_of_the_image_is_refused_by_name(tmp_path: Path) -> None:
    write_label_map(tmp_path / "small.png", LABELS[:80])
    with pytest.raises(LabelMapError, match=r"small.png has 80 x 110 pixels, and its image .* 90 x 110; give one of"):
        open_labels(tmp_path / "small.png", IMAGE)
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((*SIZE, 3), np.uint8), photometric="rgb")
    with pytest.raises(LabelMapError, match=r"rgb.tif has 3 channel\(s\) of uint8; a label image has one channel"):
        open_labels(tmp_path / "rgb.tif", IMAGE)
    tifffile.imwrite(tmp_path / "float.tif", np.zeros(SIZE, np.float32))
    with pytest.raises(LabelMapError, match=r"1 channel\(s\) of float32"):
        open_labels(tmp_path / "float.tif", IMAGE)
    path = write_geojson(tmp_path / "x.geojson", feature("tree", [(0, 0), (9, 0), (9, 9)]))
    with pytest.raises(LabelMapError, match="a polygon of the class 'tree', expected one of ground, a"):
        open_labels(path, IMAGE, ["ground", "a"])
    (tmp_path / "y.geojson").write_text("[1", encoding="utf-8")
    with pytest.raises(ImageReadError, match="it is no GeoJSON"):
        open_labels(tmp_path / "y.geojson", IMAGE, ["ground"])
    (tmp_path / "z.png").write_bytes((tmp_path / "small.png").read_bytes()[:30])
    with pytest.raises(ImageReadError):
        open_labels(tmp_path / "z.png", IMAGE)
