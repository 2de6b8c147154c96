"""Maps written tile by tile are what their reference libraries read, lie where they belong, and are there whole or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import torch
import zarr
from torch import nn

from widefield.images import map_target, open_image, polygons
from widefield.images.map_target import PathTarget, halved
from widefield.streaming import StreamingCNN
from widefield.streaming.map_writing import WrittenMap

SIZE = (601, 835)


def described(array: np.ndarray, labels: bool = False, name: str = "", stride: float = 1.0) -> WrittenMap:
    middle = (stride - 1) / 2
    return WrittenMap(name, array.shape, array.dtype, labels, (middle, middle), (stride, stride), sparse=True)


def write(to: Any, *arrays: np.ndarray, image: Any = None, tile: tuple[int, int] = (90, 400), **options: Any) -> None:
    """Write arrays as the engine would: in rows of tiles, of which those of zeros alone are left out."""
    maps = [described(array, name=str(k) if len(arrays) > 1 else "", **options) for k, array in enumerate(arrays)]
    with (to if isinstance(to, PathTarget) else map_target(to)).begin(image, maps) as sink:
        for y in range(0, max(array.shape[-2] for array in arrays), tile[0]):
            for number, array in enumerate(arrays):
                for x in range(0, array.shape[-1], tile[1]):
                    part = array[..., y : y + tile[0], x : x + tile[1]]
                    if part.any():
                        sink.write(number, y, x, part)
                sink.rows_done(number, min(y + tile[0], array.shape[-2]))


def drawn(channels: int = 2, dtype: Any = np.float32) -> np.ndarray:
    array = np.random.default_rng(0).random((channels, *SIZE)) * 100
    array[:, 250:530, :600] = 0
    return array.astype(dtype)


def levels_of(array: np.ndarray, labels: bool = False) -> list[np.ndarray]:
    levels = [array]
    while max(levels[-1].shape[1:]) > 256:
        levels.append(halved(levels[-1], labels))
    return levels


@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("int16", 2), ("float32", 2), ("float64", 1)])
def test_tifffile_reads_the_levels_of_an_ome_tiff(tmp_path: Path, dtype: str, channels: int) -> None:
    array = drawn(channels, dtype)
    write(tmp_path / "map.ome.tif", array)
    with tifffile.TiffFile(tmp_path / "map.ome.tif") as file:
        assert file.is_ome and file.is_bigtiff and len(file.series) == 1
        (series,) = file.series
        assert series.axes == ("CYX" if channels > 1 else "YX")
        for level, expected in zip(series.levels, levels_of(array), strict=True):
            assert np.array_equal(level.asarray().reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 255, "uint8"), (0, 256, "uint16"), (-1, 200, "int16"), (3, 2**31, "uint32")]
)
def test_labels_of_64_bits_get_the_smallest_type_that_holds_them(
    tmp_path: Path, low: int, high: int, dtype: str
) -> None:
    array = np.zeros((1, *SIZE), np.int64)
    array[0, 20:40, 30:500], array[0, -1, -1] = low, high
    write(tmp_path / "map.ome.tif", array, labels=True)
    with tifffile.TiffFile(tmp_path / "map.ome.tif") as file:
        for level, expected in zip(file.series[0].levels, levels_of(array, labels=True), strict=True):
            assert level.dtype == dtype and np.array_equal(level.asarray()[None], expected)


@pytest.mark.parametrize(
    ("dtype", "version"),
    [("uint8", "0.4"), ("float32", "0.4"), ("float32", "0.5"), ("float16", "0.5"), ("int64", "0.5")],
)
def test_zarr_reads_the_levels_of_an_ome_zarr(tmp_path: Path, dtype: str, version: str) -> None:
    array = drawn(dtype=dtype)
    write(map_target(tmp_path / "map.ome.zarr", ome_zarr=version), array)
    group = zarr.open_group(tmp_path / "map.ome.zarr", mode="r")
    (image,) = group.attrs["multiscales"] if version == "0.4" else group.attrs["ome"]["multiscales"]
    for dataset, expected in zip(image["datasets"], levels_of(array), strict=True):
        assert np.array_equal(group[dataset["path"]][:], expected)
    opened = open_image(tmp_path / "map.ome.zarr")
    assert opened.levels == ((601, 835), (301, 418), (151, 209))
    assert np.array_equal(opened.read(0, 0, *SIZE), array)


def test_background_takes_no_chunks_of_a_zarr_array(tmp_path: Path) -> None:
    array = drawn(1)
    array[:, :512, :] = 0
    write(tmp_path / "map.zarr", array)
    assert np.array_equal(zarr.open_array(tmp_path / "map.zarr", mode="r")[:], array)
    chunks = [path for path in (tmp_path / "map.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert len(chunks) == 4  # of 12: the last row


@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("float64", 3), ("uint32", 1)])
def test_tifffile_reads_a_plain_tiff(tmp_path: Path, dtype: str, channels: int) -> None:
    array = drawn(channels, dtype)
    write(tmp_path / "map.tif", array)
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        assert file.is_bigtiff and file.pages.first.is_tiled and len(file.pages) == 1
        assert np.array_equal(file.asarray().reshape(array.shape), array)
    assert np.array_equal(open_image(tmp_path / "map.tif").read(0, 0, *SIZE), array)


def test_labels_are_never_averaged(tmp_path: Path) -> None:
    array = (np.random.default_rng(0).random((1, *SIZE)) > 0.5).astype(np.uint8) * 9
    write(tmp_path / "map.ome.tif", array, labels=True)
    write(tmp_path / "map.ome.zarr", array, labels=True)
    expected = levels_of(array, labels=True)
    assert set(np.unique(expected[-1])) == {0, 9}
    group = zarr.open_group(tmp_path / "map.ome.zarr", mode="r")
    with tifffile.TiffFile(tmp_path / "map.ome.tif") as file:
        for number, level in enumerate(expected):
            assert np.array_equal(file.series[0].levels[number].asarray()[None], level)
            assert np.array_equal(group[str(number)][:], level)


def test_several_maps_are_files_beside_each_other_or_groups_of_one(tmp_path: Path) -> None:
    fine, coarse = drawn(2), drawn(1)[:, ::4, ::4].copy()
    write(tmp_path / "map.ome.tif", fine, coarse)
    assert np.array_equal(tifffile.imread(tmp_path / "map.1.ome.tif"), coarse[0])
    write([tmp_path / "fine.tif", tmp_path / "coarse.zarr"], fine, coarse)
    assert np.array_equal(zarr.open_array(tmp_path / "coarse.zarr", mode="r")[:], coarse)
    write(tmp_path / "both.ome.zarr", fine, coarse)
    assert np.array_equal(zarr.open_group(tmp_path / "both.ome.zarr", mode="r")["1/0"][:], coarse)
    assert np.array_equal(open_image(tmp_path / "both.ome.zarr", series="0").read(0, 0, *SIZE), fine)
    write(tmp_path / "both.zarr", fine, coarse)
    assert np.array_equal(zarr.open_group(tmp_path / "both.zarr", mode="r")["0"][:], fine)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """An image of 0.5 micrometres per pixel, with a level of half its size."""
    pixels = np.random.default_rng(1).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif", ome=True) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", subifds=1, metadata=metadata)
        file.write(pixels[::2, ::2], tile=(64, 64), photometric="rgb", subfiletype=1)
    return tmp_path / "slide.ome.tif"


def four_fold() -> StreamingCNN:
    torch.manual_seed(0)
    return StreamingCNN(nn.Conv2d(3, 2, 4, 4), (64, 96), verify=False)


def test_spacing_and_place_are_those_of_the_cells(tmp_path: Path, slide: Path) -> None:
    image, model = open_image(slide), four_fold()
    for ending in (".ome.tif", ".ome.zarr"):
        assert model.write(image, tmp_path / f"map{ending}") == tmp_path / f"map{ending}"
        assert open_image(tmp_path / f"map{ending}").spacing == pytest.approx((2.0, 2.0))
    (described_as,) = zarr.open_group(tmp_path / "map.ome.zarr", mode="r").attrs["ome"]["multiscales"]
    assert described_as["axes"][1] == {"name": "y", "type": "space", "unit": "micrometer"}
    scale, translation = described_as["datasets"][0]["coordinateTransformations"]
    assert scale == {"type": "scale", "scale": [1.0, 2.0, 2.0]}
    assert translation == {"type": "translation", "translation": [0.0, 0.75, 0.75]}  # 1.5 pixels of 0.5 micrometres
    model.write(image, tmp_path / "map.tif")
    with tifffile.TiffFile(tmp_path / "map.tif") as file:
        assert file.pages.first.get_resolution("CENTIMETER") == pytest.approx((5000, 5000))
    with torch.no_grad():
        expected = model(image)[0].numpy()
    assert np.array_equal(tifffile.imread(tmp_path / "map.ome.tif"), expected)
    assert np.array_equal(tifffile.imread(tmp_path / "map.tif"), expected)


def scene(path: Path) -> Path:
    place = rasterio.Affine(10, 0, 500_000, 0, -10, 5_200_000)
    shape = {"count": 3, "height": 600, "width": 1100, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32632", transform=place, **shape) as file:
        file.write(np.random.default_rng(1).integers(0, 255, (3, 600, 1100), dtype=np.uint8))
    return path


def test_a_scene_becomes_a_cloud_optimized_geotiff_in_its_place(tmp_path: Path) -> None:
    image, model = open_image(scene(tmp_path / "scene.tif")), four_fold()
    model.write(image, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file, torch.no_grad():
        assert file.crs.to_string() == "EPSG:32632"
        assert tuple(file.transform)[:6] == (40, 0, 500_000, 0, -40, 5_200_000)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.overviews(1) == [2]
        assert np.array_equal(file.read(), model(image)[0].numpy())
    model.write(image, tmp_path / "part.tif", region=(80, 120, 100, 160))
    with rasterio.open(tmp_path / "part.tif") as file:
        assert tuple(file.transform)[:6] == (40, 0, 501_200, 0, -40, 5_199_200)
    model.write(image, tmp_path / "map.zarr")
    assert zarr.open_array(tmp_path / "map.zarr", mode="r").attrs["crs"] == "EPSG:32632"


LABELS = np.zeros((520, 610), np.uint8)
LABELS[100:400, 50:500] = 3  # one region over many tiles and bands, with a hole that touches others' corners
LABELS[200:300, 100:200] = 0
LABELS[250:260, 150:160] = 1
LABELS[450:, 600:] = 3


def area(feature: dict[str, Any]) -> float:
    def of(ring: Any) -> float:
        x, y = np.array(ring).T
        return abs(float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))) / 2

    rings = feature["geometry"]["coordinates"]
    return of(rings[0]) - sum(map(of, rings[1:]))


def features(path: Path) -> list[dict[str, Any]]:
    return sorted(json.loads(path.read_text())["features"], key=area)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_polygons_are_merged_across_tiles_and_have_holes(tmp_path: Path, dtype: str) -> None:
    labels = LABELS.astype(dtype)
    if dtype != "uint8":
        labels[labels == 3] = 300
    write(tmp_path / "labels.geojson", labels[None], labels=True)
    found = features(tmp_path / "labels.geojson")
    assert [area(feature) for feature in found] == [100, 700, 300 * 450 - 100 * 100]
    assert [feature["properties"]["label"] for feature in found] == [1, labels[100, 50], labels[100, 50]]
    assert len(found[2]["geometry"]["coordinates"]) == 2
    corners = np.array(found[2]["geometry"]["coordinates"][0])
    assert corners.min(0).tolist() == [50, 100] and corners.max(0).tolist() == [500, 400]
    polygons(labels, tmp_path / "again.geojson")
    assert (tmp_path / "again.geojson").read_text() == (tmp_path / "labels.geojson").read_text()


def test_polygons_of_a_written_map_are_in_pixels_of_the_largest_level(tmp_path: Path, slide: Path) -> None:
    class Dark(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.avg_pool2d(x, 4)[:, :1]

    model, image = StreamingCNN(Dark(), 64, verify=False), open_image(slide, level=1)
    for name in ("labels.ome.tif", "direct.geojson"):
        model.write(image, tmp_path / name, postprocess=0.5)
    polygons(tmp_path / "labels.ome.tif", tmp_path / "later.geojson", image=open_image(slide), names=["", "dark"])
    direct, later = features(tmp_path / "direct.geojson"), features(tmp_path / "later.geojson")
    assert {feature["properties"]["classification"]["name"] for feature in later} == {"dark"}
    total = open_image(tmp_path / "labels.ome.tif").read(0, 0, 37, 50).sum() * 8 * 8
    assert sum(map(area, direct)) == sum(map(area, later)) == total > 0
    assert [feature["geometry"] for feature in direct] == [feature["geometry"] for feature in later]


def test_polygons_of_a_scene_have_its_coordinates(tmp_path: Path) -> None:
    image = open_image(scene(tmp_path / "scene.tif"))
    write(tmp_path / "labels.tif", LABELS[None], labels=True, image=image)
    write(tmp_path / "labels.geojson", LABELS[None], labels=True, image=image)
    polygons(tmp_path / "labels.tif", tmp_path / "again.geojson")
    content = json.loads((tmp_path / "labels.geojson").read_text())
    assert content == json.loads((tmp_path / "again.geojson").read_text())
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32632"
    assert [area(feature) for feature in features(tmp_path / "labels.geojson")] == [10_000, 70_000, 12_500_000]
    with rasterio.open(tmp_path / "labels.tif") as file:
        assert np.array_equal(file.read(1), LABELS) and file.overviews(1)
        assert set(np.unique(file.read(1, out_shape=(260, 305)))) == {0, 1, 3}


REFUSED = {
    "a batch": ("map.tif", np.zeros((2, 1, 9, 9)), "of one image"),
    "float16 in OME-TIFF": (
        "map.ome.tif",
        np.zeros((1, 9, 9), np.float16),
        "cannot hold float16: give dtype='float32'",
    ),
    "64 bits in OME-TIFF": (
        "map.ome.tif",
        np.full((1, 9, 9), 2**32),
        "labels of up to 32 bits, .* from 0 to 4294967296",
    ),
    "long and negative": (
        "map.ome.tif",
        np.array([[[2**33, -1]]]),
        "labels of up to 32 bits, .* from -1 to 8589934592",
    ),
    "polygons of floats": ("map.geojson", np.zeros((1, 9, 9)), "labels"),
    "polygons of channels": ("map.geojson", np.zeros((2, 9, 9), np.uint8), "one channel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_format_does_not_hold_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    file, array, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        write(tmp_path / file, array)
    assert not list(tmp_path.iterdir())


def test_a_path_is_asked_for_each_map(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 paths were given for 3 maps"):
        write([tmp_path / "a.tif", tmp_path / "b.tif"], *[drawn(1)] * 3)
    with pytest.raises(ValueError, match="is a folder"):
        (tmp_path / "folder.tif").mkdir()
        map_target(tmp_path / "folder.tif")
    with pytest.raises(ValueError, match="a path of its own"):
        map_target(["a.tif", "a.tif"])


ENDINGS = (".zarr", ".ome.zarr", ".tif", ".ome.tif", ".geojson")


@pytest.mark.parametrize("ending", [*ENDINGS, " of a scene.tif"])
def test_a_map_that_fails_leaves_the_one_before_and_nothing_else(tmp_path: Path, ending: str) -> None:
    image = open_image(scene(tmp_path / "scene.tif")) if "scene" in ending else None
    path = tmp_path / "out" / f"map{ending}"
    write(path, LABELS[None], labels=True, image=image)
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    with pytest.raises(KeyError), map_target(path).begin(image, [described(LABELS[None])]) as sink:
        sink.write(0, 0, 0, LABELS[None, :300])
        sink.rows_done(0, 300)
        raise KeyError
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before
    assert list(path.parent.iterdir()) == [path]
    write(path, LABELS[None, :300], labels=True, image=image)  # takes the place of the other
    assert list(path.parent.iterdir()) == [path]
    if ending != ".geojson":
        assert open_image(path).shape == (1, 300, 610)


IN_A_PROCESS = """
import os, resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from widefield.images import map_target, open_image

array = np.random.default_rng(0).integers(1, 255, (1, 1024, 1024), dtype=np.uint8)
described = SimpleNamespace(
    name="", shape=array.shape, dtype=array.dtype, labels=True, origin=(0.0, 0.0), stride=(1.0, 1.0), row_bytes=1024
)

def write(path, how):
    image = open_image(sys.argv[1]) if "scene" in path else None
    with map_target(path).begin(image, [described]) as sink:
        for y in range(0, 1024, 128):
            sink.write(0, y, 0, array[:, y : y + 128])
            sink.rows_done(0, y + 128)
            if how == "kill" and y == 640:
                os.kill(os.getpid(), signal.SIGKILL)

for how in ("kill", "full"):
    for path in sys.argv[2:]:
        path = path.replace("HOW", how)
        if not (child := os.fork()):
            if how == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, 2**15))
            try:
                write(path, how)
            except OSError as error:
                os._exit(3 if Path(path).name in str(error) else 4)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_killed_process_and_a_full_disk_leave_nothing_that_looks_like_a_map(tmp_path: Path) -> None:
    """A limit of the size of files stands for a full disk."""
    paths = [tmp_path / f"HOW{k}" / f"map{ending}" for k, ending in enumerate([*ENDINGS, " of a scene.tif"])]
    command = [sys.executable, "-c", IN_A_PROCESS, str(scene(tmp_path / "scene.tif")), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL] * len(paths) + [3] * len(paths)
    for k in range(len(paths)):
        assert all(file.name.startswith(".") for file in (tmp_path / f"kill{k}").iterdir())
        assert not list((tmp_path / f"full{k}").iterdir())
