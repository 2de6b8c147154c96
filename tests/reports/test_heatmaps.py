"""Heatmaps lie where the network looked, in pictures and in the files that other programs read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import rasterio
import tifffile
import torch
from rasterio.enums import Resampling
from torch import nn

from tests.small_images import write_tiff
from widefield.cli.predict import _peak
from widefield.images import ImageFile, open_image
from widefield.modules import ImageNetClassifier
from widefield.registry import MODELS
from widefield.reports import Heatmap, cells_of, class_activation, grad_cam, save_overlay
from widefield.reports.overlay import as_rgb, overview
from widefield.streaming import Cells


def positive(trunk: nn.Sequential) -> ImageNetClassifier:
    for part in trunk:
        if isinstance(part, nn.Conv2d):
            nn.init.constant_(part.weight, 1.0)
            nn.init.zeros_(part.bias)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    nn.init.constant_(head[2].weight, 1.0)
    return ImageNetClassifier(trunk, head, 64, nn.CrossEntropyLoss(), mean=None, std=None).eval()


TRUNKS = {
    "like a ResNet": lambda: nn.Sequential(nn.Conv2d(1, 2, 7, 4, 3), nn.Conv2d(2, 2, 3, 2, 1)),
    "like a ConvNeXt": lambda: nn.Sequential(nn.Conv2d(1, 2, 4, 4), nn.Conv2d(2, 2, 2, 2)),
    "like an unpadded VGG": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.MaxPool2d(4), nn.Conv2d(2, 2, 3), nn.MaxPool2d(2)
    ),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_the_peak_lies_on_the_only_mark_of_an_image(name: str) -> None:
    model = positive(TRUNKS[name]())
    for y, x in ((61, 18), (24, 45), (33, 70)):
        image = torch.zeros(1, 1, 79, 93)
        image[..., y - 2 : y + 3, x - 2 : x + 3] = 1
        _, evidence = class_activation(model, image, 0)
        heatmap = Heatmap.of(evidence, cells_of(model, image, evidence), image[0])
        assert np.hypot(heatmap.peak[0] - y, heatmap.peak[1] - x) <= 6  # half a cell of 8 pixels, each way


def test_a_map_is_not_stretched_over_what_it_does_not_cover() -> None:
    model, image = positive(TRUNKS["like a ConvNeXt"]()), torch.zeros(1, 1, 79, 64)
    _, evidence = class_activation(model, image, 0)
    heatmap = Heatmap.of(evidence, cells_of(model, image, evidence), image[0])
    assert heatmap.edges == ((0.0, 72.0), (0.0, 64.0))


def test_components_are_explained_in_their_place_at_any_layer(caplog: pytest.LogCaptureFixture) -> None:
    backbone = {
        "type": "ResNet",
        "depth": 18,
        "stem_channels": 4,
        "base_channels": 4,
        "num_stages": 2,
        "out_indices": [1],
    }
    options = {"strides": [1, 2], "dilations": [1, 1]}
    head = {"type": "LinearClsHead", "num_classes": 2, "in_channels": 8}
    neck = {"type": "GlobalAveragePooling"}
    model = MODELS.build({"type": "ImageClassifier", "backbone": {**backbone, **options}, "neck": neck, "head": head})
    image = torch.rand(3, 60, 71)
    for layer, stride in ((None, 8.0), ("backbone.layer1", 4.0)):
        _, evidence = grad_cam(model.eval(), image, layer)
        cells = cells_of(model, image, evidence, layer)
        assert (cells.size, cells.origin, cells.stride) == (tuple(evidence.shape), (0.0, 0.0), (stride, stride))
    assert "evenly" not in caplog.text
    cells = cells_of(model, image, torch.zeros(6, 10))  # of a layer that the engine knows nothing of
    assert (cells.origin, cells.stride) == ((4.5, 3.05), (10.0, 7.1))
    assert "taken to cover the image evenly" in caplog.text


def test_positions_are_those_of_the_largest_level(tmp_path: Path) -> None:
    write_tiff(tmp_path / "slide.tif", np.zeros((256, 512, 3), np.uint8))  # 0.5 micrometres per pixel
    evidence = torch.zeros(4, 8)
    evidence[2, 3] = 1
    found = [
        Heatmap.of(evidence, Cells((4, 8), origin, (stride, stride)), open_image(tmp_path / "slide.tif", level))
        for level, origin, stride in ((0, (31.5, 31.5), 64.0), (1, (15.5, 15.5), 32.0))
    ]
    for heatmap in found:
        assert heatmap.cells == found[0].cells
        assert heatmap.peak == (160, 224)
        assert heatmap.size == (256, 512)
        assert heatmap.spacing == pytest.approx((0.5, 0.5))


def spot(rows: int, columns: int, **options: Any) -> Heatmap:
    """A heatmap like that of a ResNet with a block of evidence in it."""
    evidence = np.full((rows, columns), -1.0, np.float32)
    evidence[2:5, 3:5] = 3.0
    return Heatmap(
        evidence=evidence,
        cells=Cells((rows, columns), (0.0, 0.0), (32.0, 32.0)),
        size=(32 * rows - 5, 32 * columns),
        **options,
    )


def test_a_tiff_is_a_pyramid_in_the_place_of_the_image(tmp_path: Path) -> None:
    heatmap = spot(150, 200, spacing=(0.5, 0.25))
    heatmap.save_tiff(tmp_path / "map.ome.tif", "tumor")
    opened = open_image(tmp_path / "map.ome.tif")
    assert opened.levels == ((300, 400), (150, 200))
    assert opened.spacing == pytest.approx((8.0, 4.0))
    values = opened.read(0, 0, 300, 400)[0]
    assert set(np.unique(values[:-1, :-1])) == {-1.0, 3.0}
    assert not values[-1].any() and not values[:, -1].any()  # beyond the last cells
    rows, columns = np.nonzero(values == 3)  # of rows 48.5 to 144.5 and columns 80.5 to 144.5 of the slide
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 8, 5, 8)
    with tifffile.TiffFile(tmp_path / "map.ome.tif") as file:
        assert file.is_ome
        assert 'Name="tumor"' in (file.ome_metadata or "")
    assert [path.name for path in tmp_path.iterdir()] == ["map.ome.tif"]


PLACE = rasterio.Affine(9.5, 1.25, 500_000, -1.5, -10.5, 5_000_000)  # turned


def write_map(path: Path, pixels: np.ndarray, factors: list[int], **options: Any) -> None:
    shape = {"height": pixels.shape[0], "width": pixels.shape[1], "count": 1, "dtype": pixels.dtype}
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:32632", transform=PLACE, **shape, **layout, **options
    ) as file:
        file.write(pixels, 1)
        file.build_overviews(factors, Resampling.nearest)


@pytest.mark.parametrize(("level", "cells"), [(0, ((0.5, 0.5), (2.0, 2.0))), (1, ((0.0, 0.0), (1.0, 1.0)))])
def test_a_geotiff_lies_where_the_network_looked_on_the_map(
    tmp_path: Path, level: int, cells: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    write_map(tmp_path / "scene.tif", np.zeros((600, 560), np.uint8), [2])
    evidence = torch.rand(300, 280)
    heatmap = Heatmap.of(evidence, Cells((300, 280), *cells), open_image(tmp_path / "scene.tif", level))
    heatmap.save_geotiff(tmp_path / "map.tif", "water")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "scene.tif"]
    with rasterio.open(tmp_path / "map.tif") as file:
        np.testing.assert_array_equal(file.read(1), evidence)
        assert file.xy(0, 0) == pytest.approx(PLACE @ (1.0, 1.0))  # of pixels 0 and 1 each way
        assert file.xy(299, 7) == pytest.approx(PLACE @ (15.0, 599.0))
        greatest = np.unravel_index(int(evidence.argmax()), (300, 280))
        peak = _peak(heatmap)
        assert file.index(float(peak["peak_x_map"]), float(peak["peak_y_map"])) == greatest
        assert (file.crs, file.descriptions) == ("EPSG:32632", ("water",)) and np.isnan(file.nodata)
        assert file.overviews(1) == [2] and file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_an_image_that_is_no_map_has_no_geotiff(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place on a map"):
        spot(5, 5).save_geotiff(tmp_path / "map.tif", "tumor")
    assert not list(tmp_path.iterdir())


def test_there_is_no_evidence_where_an_image_holds_no_data(tmp_path: Path) -> None:
    pixels = np.zeros((512, 512), np.float32)
    pixels[:, :256] = np.nan
    np.save(tmp_path / "image.npy", pixels)
    evidence = torch.full((16, 16), 3.0)
    evidence[3, 9] = 4.0
    evidence[:, 2:5] = 9.0
    image = open_image(tmp_path / "image.npy", fill=0.0)
    heatmap = Heatmap.of(evidence, Cells((16, 16), (0.0, 0.0), (32.0, 32.0)), image)
    np.testing.assert_array_equal(np.isnan(heatmap.evidence), np.broadcast_to(np.arange(16) < 8, (16, 16)))
    assert heatmap.peak == (96, 288)
    assert heatmap.resampled((16.0, 16.0))[:, :15].max() == 0
    ((outline,),) = heatmap.regions(2.0)
    assert 240.5 <= outline[:, 0].min() <= 256.5  # of 240.5, where the cells with data begin
    assert not heatmap.regions(5.0)
    save_overlay(tmp_path / "map.png", image, heatmap, "")
    picture = pyvips.Image.new_from_file(str(tmp_path / "map.png")).numpy()[:900, :900, :3].astype(int)
    columns = np.nonzero((picture[..., 1] - picture[..., 0] > 60).any(0))[0]
    black = np.nonzero((picture.sum(2) == 0).any(0))[0]
    assert columns.min() > black.min() + 300  # beyond the half without data


def test_an_image_without_any_data_has_no_peak(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.full((600, 600), np.nan, np.float32))
    image = open_image(tmp_path / "image.npy", fill=0.0)
    heatmap = Heatmap.of(torch.ones(3, 3), Cells((3, 3), (0.0, 0.0), (200.0, 200.0)), image)
    assert heatmap.peak is None and set(_peak(heatmap).values()) == {""}
    heatmap.save_geojson(tmp_path / "map.geojson", "tumor", (0.5,))
    assert json.loads((tmp_path / "map.geojson").read_text())["features"] == []
    save_overlay(tmp_path / "map.png", image, heatmap, "")
    assert (tmp_path / "map.png").stat().st_size > 0


def test_data_are_looked_for_at_a_coarse_level_and_only_where_some_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.ones((1024, 1024), np.uint8)
    pixels[512:] = 7
    for name, options in (("some.tif", {"nodata": 7}), ("none.tif", {})):
        write_map(tmp_path / name, pixels, [2, 4, 8, 16], **options)
    read, levels = ImageFile.read, []
    monkeypatch.setattr(ImageFile, "read", lambda image, *region: levels.append(image.level) or read(image, *region))
    some, none = (
        Heatmap.of(torch.ones(32, 32), Cells((32, 32), (15.5, 15.5), (32.0, 32.0)), open_image(tmp_path / name))
        for name in ("some.tif", "none.tif")
    )
    assert levels == [3]  # of 128 x 128 pixels
    assert np.isnan(some.evidence).any(1).tolist() == [False] * 16 + [True] * 16
    assert not np.isnan(none.evidence).any()


def test_contours_are_annotations_of_qupath(tmp_path: Path) -> None:
    heatmap = spot(12, 10, spacing=(0.5, 0.5))
    heatmap.save_geojson(tmp_path / "map.geojson", "tumor", (0.5, 0.9))
    found = json.loads((tmp_path / "map.geojson").read_text())
    assert found["type"] == "FeatureCollection"
    for feature, share in zip(found["features"], (0.5, 0.9), strict=True):
        assert feature["properties"]["classification"]["name"] == "tumor"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        reach = 32 * (3 - share * 3) / 4  # from the middles of the outermost cells, along the fall from 3 to -1
        assert np.min(ring, axis=0) == pytest.approx([96.5 - reach, 64.5 - reach], abs=0.01)
        assert np.max(ring, axis=0) == pytest.approx([128.5 + reach, 128.5 + reach], abs=0.01)
        area = feature["properties"]["measurements"]["area µm^2"]
        assert 0.9 * (32 + 2 * reach) * (64 + 2 * reach) / 4 < area <= (32 + 2 * reach) * (64 + 2 * reach) / 4


def test_contours_end_at_the_image_and_have_holes() -> None:
    evidence = np.ones((5, 5), np.float32)
    evidence[2, 2] = -1
    heatmap = Heatmap(evidence=evidence, cells=Cells((5, 5), (-4.0, 3.5), (8.0, 8.0)), size=(32, 40))
    ((outline, hole),) = heatmap.regions(0.0)
    assert (outline.min(0).tolist(), outline.max(0).tolist()) == ([0.0, 0.0], [40.0, 32.0])
    assert hole.mean(0) == pytest.approx([20.0, 12.5], abs=1)
    assert Heatmap(evidence=evidence[:1, :1], cells=Cells((1, 1), (3.5, 3.5), (8, 8)), size=(8, 8)).regions(0.5)


def test_evidence_that_is_nowhere_positive_has_no_contours(tmp_path: Path) -> None:
    heatmap = Heatmap(evidence=np.full((3, 3), -1.0), cells=Cells((3, 3), (0.0, 0.0), (8.0, 8.0)), size=(24, 24))
    heatmap.save_geojson(tmp_path / "map.geojson", "tumor", (0.5,))
    assert json.loads((tmp_path / "map.geojson").read_text())["features"] == []


def test_an_overlay_colours_cells_alone_and_shows_their_peak_uncovered(tmp_path: Path) -> None:
    pixels = np.full((600, 500, 3), 200, np.uint8)
    pixels[228:252, 180:204] = (255, 0, 0)  # where the evidence is greatest
    write_tiff(tmp_path / "slide.tif", pixels)
    evidence = torch.full((18, 15), -1.0)
    evidence[7:8, 6:7] = 1
    image = open_image(tmp_path / "slide.tif")
    save_overlay(
        tmp_path / "map.png", image, Heatmap.of(evidence, Cells((18, 15), (16.0, 16.0), (32.0, 32.0)), image), ""
    )
    picture = pyvips.Image.new_from_file(str(tmp_path / "map.png")).numpy()[..., :3].astype(int)
    red = (np.abs(picture - (255, 0, 0)).max(2) < 5).sum()
    assert red > 3000  # in the detail; in the whole it is covered
    grey = (np.abs(picture - 200).max(2) < 3).sum()
    assert grey > 0.3 * picture.shape[0] * picture.shape[1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["map.png", "slide.tif"]


def test_a_single_cell_of_very_many_is_seen(tmp_path: Path) -> None:
    evidence = torch.full((3001, 3001), -1.0)
    evidence[1503, 2002] = 1
    np.save(tmp_path / "slide.npy", np.full((3001, 3001), 90, np.uint8))
    image = open_image(tmp_path / "slide.npy")
    heatmap = Heatmap.of(evidence, Cells((3001, 3001), (0.0, 0.0), (1.0, 1.0)), image)
    save_overlay(tmp_path / "map.png", image, heatmap, "")
    picture = pyvips.Image.new_from_file(str(tmp_path / "map.png")).numpy()[..., :3].astype(int)
    assert (picture[:900, :900, 1] - picture[:900, :900, 0] > 60).sum() in range(1, 20)  # green, in the whole image


@pytest.mark.parametrize("evidence", [torch.linspace(-1, 1, 12).reshape(3, 4), torch.full((1, 1), -2.0)])
def test_an_overlay_of_a_small_picture_has_no_detail(tmp_path: Path, evidence: torch.Tensor) -> None:
    cells = Cells((evidence.shape[0], evidence.shape[1]), (3.5, 3.5), (8.0, 8.0))
    image = torch.rand(3, 30, 40)
    save_overlay(tmp_path / "overlay.png", image, Heatmap.of(evidence, cells, image), "title")
    picture = pyvips.Image.new_from_file(str(tmp_path / "overlay.png")).numpy()
    assert picture.shape[0] > 300
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (2, np.uint8), (2, np.float32), (13, np.uint16)])
def test_images_of_any_channels_and_values_are_seen(tmp_path: Path, channels: int, dtype: Any) -> None:
    ramp = np.linspace(100, 200, 150).astype(dtype)
    pixels = np.broadcast_to(ramp, (channels, 1200, 150)).copy()
    if dtype != np.uint8:
        pixels[:, 7, 7] = 60_000  # one pixel that is far brighter than all others
    if dtype == np.float32:
        pixels[:, 9, 9] = np.nan
    np.save(tmp_path / "image.npy", pixels)
    whole = overview(open_image(tmp_path / "image.npy", channel_axis="first"), 1024)
    assert whole.shape == (600, 75, 3)
    assert whole[300, 60].min() > whole[300, 10].min() + 40
    assert as_rgb(pixels).shape == (1200, 150, 3)


def test_two_channels_are_magenta_and_green() -> None:
    pixels = np.zeros((2, 4, 8), np.uint16)
    pixels[0, :, 2:4], pixels[1, :, 4:6], pixels[:, :, 6:] = 900, 70, [[[900]], [[70]]]
    assert as_rgb(pixels)[0, ::2].tolist() == [[0, 0, 0], [255, 0, 255], [0, 255, 0], [255, 255, 255]]
