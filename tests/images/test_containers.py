"""Zarr, rasters and DICOM give what their reference libraries give, and say what they know."""

import os
import pickle

import numpy as np
import pydicom
import pytest
import rasterio
import rasterio.shutil
import tifffile
import torch
import zarr
from pydicom.pixels import pixel_array
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from zarr.storage import ZipStore

from tests.dicom_files import write_dicom
from widefield.images import ImageReadError, images_below, open_image, tiff
from widefield.images.formats import has_data
from widefield.reports import Heatmap
from widefield.streaming import Cells

AXES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def _write_ome_zarr(store, array, axes, version="0.4", scale=0.5):
    """An OME-Zarr image of two levels, the second every other pixel."""
    units = {"unit": "micrometer"}
    described = [{"name": axis, "type": AXES[axis], **(units if axis in "yx" else {})} for axis in axes]
    scales = [[scale * step if axis in "yx" else 1 for axis in axes] for step in (1, 2)]
    datasets = [
        {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": one}]} for k, one in enumerate(scales)
    ]
    image = {"multiscales": [{"version": version, "axes": described, "datasets": datasets, "name": "scan"}]}
    image["omero"] = {
        "channels": [{"label": f"stain {c}"} for c in range(array.shape[axes.index("c")] if "c" in axes else 1)]
    }
    attributes = image if version == "0.4" else {"ome": {"version": version, **image}}
    group = zarr.create_group(store, zarr_format=2 if version == "0.4" else 3, attributes=attributes)
    for k, level in enumerate((array, array[..., ::2, ::2])):
        chunks = tuple(32 if axis in "yx" else 1 for axis in axes)
        options = {"shards": tuple(64 if a in "yx" else 1 for a in axes)} if version == "0.5" else {}
        group.create_array(str(k), data=level, chunks=chunks, **options)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("kind", ["folder", "zip", "memory"])
def test_an_ome_zarr_is_read_from_folder_zip_or_url(tmp_path, chw, version, kind):
    path = {"folder": tmp_path / "a.zarr", "zip": tmp_path / "a.zarr.zip", "memory": f"memory://{version}.zarr"}[kind]
    store = ZipStore(path, mode="w") if kind == "zip" else str(path)
    _write_ome_zarr(store, chw.astype("u2") * 200, "cyx", version)
    if kind == "zip":
        store.close()
    image = open_image(path, 1, channels=["stain 2", 0])
    assert image.levels == ((201, 333), (101, 167))
    assert image.channel_names == ("stain 2", "stain 0")
    assert image.spacing == pytest.approx((0.5 * 201 / 101, 0.5 * 333 / 167))
    np.testing.assert_array_equal(image.read(7, 5, 90, 150), chw[[2, 0], 14:194:2, 10:310:2].astype("u2") * 200)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(0, 0, 9, 9), image.read(0, 0, 9, 9))


def test_every_position_of_an_ome_zarr_stack_is_an_image(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 40, 50), dtype=np.uint8)
    _write_ome_zarr(str(tmp_path / "a.zarr"), array, "tczyx")
    image = open_image(tmp_path / "a.zarr", series="scan T=1 Z=2")
    np.testing.assert_array_equal(image.read(0, 0, 40, 50), array[1, :, 2])
    np.testing.assert_array_equal(
        open_image(tmp_path / "a.zarr", series=4, level=1).read(0, 0, 20, 25), array[1, :, 0, ::2, ::2]
    )
    with pytest.raises(ImageReadError, match=r"several images.*scan T=0 Z=0 40x50.*series="):
        open_image(tmp_path / "a.zarr")


def test_a_plain_zarr_array_and_a_group_of_some_are_read(tmp_path, rgb, chw):
    zarr.create_array(str(tmp_path / "a.zarr"), data=rgb)
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").read(0, 0, 201, 333), chw)
    group = zarr.create_group(str(tmp_path / "b.zarr"))
    group.create_array("one", data=chw)
    group.create_array("two", data=chw[:, ::2])
    assert open_image(tmp_path / "b.zarr", series="two").shape == (3, 101, 333)
    assert images_below(tmp_path) == [tmp_path / "a.zarr", tmp_path / "b.zarr"]


def test_a_zarr_without_an_image_and_a_damaged_one_are_named(tmp_path, chw):
    zarr.create_group(str(tmp_path / "a.zarr"))
    with pytest.raises(ImageReadError, match=r"a\.zarr: .*without an image"):
        open_image(tmp_path / "a.zarr")
    _write_ome_zarr(str(tmp_path / "b.zarr"), chw, "cyx")
    (tmp_path / "b.zarr" / "0" / ".zarray").write_text("{")
    with pytest.raises(ImageReadError, match=r"b\.zarr: .*damaged"):
        open_image(tmp_path / "b.zarr")
    (tmp_path / "c").mkdir()
    with pytest.raises(ImageReadError, match="a folder, and no Zarr"):
        open_image(tmp_path / "c")


def test_levels_of_an_ome_zarr_are_sorted_and_those_of_other_types_or_channels_left_out(tmp_path, chw):
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    arrays = [chw[:, ::4, ::4], chw[:, ::2, ::2], chw, chw[:2, ::8, ::8], chw[:, ::8, ::8].astype("f4")]
    scales = [2.0, 1.0, 0.5, 4.0, 4.0]
    for k, array in enumerate(arrays):
        group.create_array(str(k), data=array)
    datasets = [
        {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": [1, scale, scale]}]}
        for k, scale in enumerate(scales)
    ]
    axes = [{"name": axis, "unit": "micrometer"} for axis in "cyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    image = open_image(tmp_path / "a.zarr")
    assert (image.levels, image.spacing) == (((201, 333), (101, 167), (51, 84)), (0.5, 0.5))
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr", 2).read(0, 0, 51, 84), arrays[0])


def test_the_axis_of_the_channels_is_said_of_a_zarr_array_without_names_only(tmp_path):
    pixels = np.arange(3 * 40 * 3, dtype="u2").reshape(3, 40, 3)
    zarr.create_array(str(tmp_path / "a.zarr"), data=pixels)
    with pytest.raises(ValueError, match=r"a\.zarr does not tell which axis"):
        open_image(tmp_path / "a.zarr")
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr", channel_axis="first").read(0, 0, 40, 3), pixels)
    zarr.create_array(str(tmp_path / "b.zarr"), data=pixels, dimension_names=("c", "y", "x"))
    with pytest.raises(ValueError, match=r"b\.zarr, whose axes have names"):
        open_image(tmp_path / "b.zarr", channel_axis="last")


@pytest.mark.parametrize("names", [("y", "y", "x"), ("c", "z", "x"), ("t", "tile", "y", "x"), ("y", "x")])
def test_axes_of_an_ome_zarr_that_are_no_image_are_named(tmp_path, names):
    group = zarr.create_group(str(tmp_path / "a.zarr"), zarr_format=2)
    group.create_array("0", data=np.zeros((2, 3, 8, 9) if len(names) == 4 else (3, 8, 9), "u1"))
    axes = [{"name": name} for name in names]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]
    with pytest.raises(ImageReadError, match=r"a\.zarr: the names of its axes begin with"):
        open_image(tmp_path / "a.zarr")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_zip_is_opened_anew_in_a_forked_process(tmp_path, chw):
    store = ZipStore(tmp_path / "a.zarr.zip", mode="w")
    _write_ome_zarr(store, chw, "cyx")
    store.close()
    image = open_image(tmp_path / "a.zarr.zip")
    image.read(0, 0, 9, 9)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(image.read(50, 60, 70, 80), chw[:, 50:120, 60:140]) else 1)
    np.testing.assert_array_equal(image.read(50, 60, 70, 80), chw[:, 50:120, 60:140])
    assert os.waitpid(child, 0)[1] == 0


def _write_raster(path, pixels, driver="GTiff", **options):
    options = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_000_000, 10, 20), **options}
    count, height, width = pixels.shape
    with rasterio.open(
        path, "w", driver=driver, height=height, width=width, count=count, dtype=pixels.dtype, **options
    ) as file:
        file.write(pixels)
        file.descriptions = tuple(f"B{band}" for band in range(1, count + 1))
    return path


@pytest.mark.parametrize(
    ("name", "driver", "level"),
    [
        ("a.tif", "GTiff", 0),
        ("a.tif", "GTiff", 1),
        ("a.jp2", "JP2OpenJPEG", 0),
        ("a.jp2", "JP2OpenJPEG", 1),
        ("a.vrt", "VRT", 0),
    ],
)
def test_a_map_has_the_pixels_place_and_bands_that_gdal_sees(tmp_path, name, driver, level):
    pixels = np.random.default_rng(0).integers(0, 3000, (4, 200, 260), dtype=np.uint16)
    path = tmp_path / name
    if driver == "JP2OpenJPEG":
        _write_raster(path, pixels, driver, QUALITY="100", REVERSIBLE="YES")
    else:
        source = _write_raster(
            tmp_path / "a.tif", pixels, tiled=True, blockxsize=64, blockysize=64, compress="zstd", nodata=7
        )
        with rasterio.open(source, "r+") as file:
            file.build_overviews([2], Resampling.average)
        if driver == "VRT":
            rasterio.shutil.copy(source, path, driver="VRT")
    image = open_image(path, level)
    with rasterio.open(path, **({"overview_level": 0} if level else {})) as file:
        np.testing.assert_array_equal(image.read(0, 0, *image.shape[1:]), file.read())
        np.testing.assert_array_equal(image.read(11, 7, 60, 50), file.read(window=((11, 71), (7, 57))))
        assert image.crs == file.crs.to_string() == "EPSG:32632"
        assert image.transform == pytest.approx(tuple(file.transform)[:6])
        assert image.nodata == file.nodata
        if driver != "JP2OpenJPEG" and level == 0:  # GDAL tells them there only
            assert image.channel_names == file.descriptions == ("B1", "B2", "B3", "B4")
    assert image.spacing is None


@pytest.mark.parametrize("compress", ["LERC", "LERC_ZSTD"])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_what_lerc_leaves_out_is_missing_or_transparent_as_gdal_has_it(tmp_path, compress, interleave):
    options = {"compress": compress, "interleave": interleave, "tiled": True, "blockxsize": 32, "blockysize": 32}
    floats = np.random.default_rng(0).random((3, 50, 70), np.float32)
    floats[:, 5:30, 8:40] = floats[0, 40, 3] = floats[2, 45:, 60:] = np.nan
    colours = np.random.default_rng(1).integers(0, 256, (4, 50, 70), np.uint8)
    colours[3] = np.where(colours[3] > 99, 255, 0)
    for pixels, more in ((floats, {}), (colours, {"photometric": "rgb", "alpha": "yes"})):
        path = _write_raster(tmp_path / "a.tif", pixels, **options, **more)
        with rasterio.open(path) as file:  # colours below transparency are lost at writing
            np.testing.assert_array_equal(open_image(path, alpha="keep").read(0, 0, 50, 70), file.read())


@pytest.mark.parametrize("area", ["Area", "Point"])
def test_a_geotiff_lies_where_gdal_says(tmp_path, area):
    transform = rasterio.Affine(9.5, 1.25, 500_000, -1.5, -10.5, 5_000_000)
    path = tmp_path / "a.tif"
    with rasterio.Env(GTIFF_POINT_GEO_IGNORE=False):
        _write_raster(path, np.zeros((1, 20, 30), np.uint8), transform=transform)
        with rasterio.open(path, "r+") as file:
            file.update_tags(AREA_OR_POINT=area)
        with rasterio.open(path) as file:
            assert open_image(path).transform == pytest.approx(tuple(file.transform)[:6])


def test_a_fourth_band_of_a_map_is_a_band_even_if_it_is_marked_as_alpha(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 64, 64), dtype=np.uint8)
    path = _write_raster(tmp_path / "a.tif", pixels)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].extrasamples
    np.testing.assert_array_equal(open_image(path).read(0, 0, 64, 64), pixels)
    assert not caplog.records


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize(("dtype", "shape"), [("u2", (70, 90)), ("i2", (70, 90)), ("u1", (70, 90, 3))])
def test_a_dicom_image_is_read_as_pydicom_does(tmp_path, syntax, dtype, shape):
    pixels = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    path = write_dicom(tmp_path / "a.dcm", pixels, syntax=syntax, ImagerPixelSpacing=[0.07, 0.05])
    image = open_image(path)
    expected = pixel_array(path)
    np.testing.assert_array_equal(expected, pixels)
    expected = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
    assert image.dtype == pixels.dtype
    np.testing.assert_array_equal(image.read(3, 4, 60, 80), expected[:, 3:63, 4:84])
    assert image.spacing == pytest.approx((70, 50))


def test_white_is_large_in_every_dicom_image_and_frames_are_images(tmp_path):
    frames = np.random.default_rng(0).integers(0, 4096, (2, 30, 40)).astype("u2")
    path = write_dicom(tmp_path / "a.dcm", frames, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(open_image(path, series=1).read(0, 0, 30, 40), 4095 - frames[1:])
    with pytest.raises(ImageReadError, match=r"several images.*frame 0 30x40, 1: frame 1"):
        open_image(path)


def test_floats_of_dicom_come_as_floats_and_bits_at_an_unusual_place_are_refused(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((4, 6), "u4"))
    dataset, pixels = pydicom.dcmread(path), np.random.default_rng(0).random((4, 6), np.float32)
    del dataset.PixelData
    dataset.FloatPixelData = pixels.tobytes()
    dataset.save_as(path)
    with pytest.raises(ImageReadError, match=r"a\.dcm: .*its pixels are float32, where its header says uint32"):
        open_image(path).read(0, 0, 4, 6)
    for name in ("PixelRepresentation", "BitsStored", "HighBit"):
        delattr(dataset, name)
    dataset.save_as(path)
    np.testing.assert_array_equal(open_image(path).read(0, 0, 4, 6)[0], pixels)
    path = write_dicom(tmp_path / "b.dcm", np.zeros((4, 6), "u2"), BitsStored=12, HighBit=15)
    with pytest.raises(ImageReadError, match=r"b\.dcm: its 12 bits end at bit 15 of a pixel.*expected bit 11"):
        open_image(path)


def test_a_dicom_file_without_an_image_is_named(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), "u1"))
    dataset = pydicom.dcmread(path)
    del dataset.Rows, dataset.PixelData
    dataset.save_as(path)
    with pytest.raises(ImageReadError, match=r"a\.dcm: it is a DICOM file without an image \(MG\)"):
        open_image(path)


def test_a_dicom_image_may_have_a_tiff_preamble_or_be_deflated(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 250, (30, 40)).astype("u2")
    path = write_dicom(tmp_path / "a.dcm", pixels)
    path.write_bytes(b"II*\0" + path.read_bytes()[4:])
    np.testing.assert_array_equal(open_image(path).read(0, 0, 30, 40)[0], pixels)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    np.testing.assert_array_equal(open_image(path).read(0, 0, 30, 40)[0], pixels)


CRS_OF_NO_NUMBER = "+proj=laea +lat_0=50.5 +lon_0=11 +datum=WGS84 +units=m"


def _write_map(path, pixels, mask=None, crs="EPSG:32632", overviews=(), internal=True, **options):
    shape = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": pixels.dtype}
    place = {
        "crs": crs,
        "transform": from_origin(500_000, 5_000_000, 10, 10),
        "tiled": True,
        "blockxsize": 64,
        "blockysize": 64,
    }
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        with rasterio.open(path, "w", driver="GTiff", **shape, **place, **options) as file:
            file.write(pixels)
            if mask is not None:
                file.write_mask(mask)
        if overviews:
            with rasterio.open(path, "r+") as file:
                file.build_overviews(overviews, Resampling.nearest)
    return path


@pytest.mark.parametrize(
    ("dtype", "nodata", "internal", "missing"),
    [("u1", None, True, 0), ("u1", None, False, 0), ("i2", -9, False, -9), ("f4", None, True, np.nan)],
)
def test_what_the_mask_of_a_map_leaves_out_is_missing_at_every_level(tmp_path, chw, dtype, nodata, internal, missing):
    pixels, mask = chw[:, :200, :320].astype(dtype) + np.dtype(dtype).type(1), np.full((200, 320), 255, np.uint8)
    pixels[pixels == 0] = 1
    mask[:100, :160] = 0
    options = {"internal": internal, **({} if nodata is None else {"nodata": nodata})}
    path = _write_map(tmp_path / "a.tif", pixels, mask, overviews=[2] if internal else [], **options)
    image = open_image(path)
    np.testing.assert_equal(image.nodata, missing)
    expected = np.where(mask == 0, np.array(missing, dtype), pixels)
    np.testing.assert_array_equal(image.read(0, 0, 200, 320), expected)
    np.testing.assert_array_equal(open_image(path, channels=[2]).read(90, 150, 30, 40), expected[2:, 90:120, 150:190])
    if internal:
        reduced = image.at_level(1).read(0, 0, 100, 160)
        assert has_data(reduced, image.nodata)[:, :50, :80].sum() == 0
        assert has_data(reduced, image.nodata)[:, 50:].all()


def test_a_mask_is_said_where_nothing_applies_it(tmp_path, chw, monkeypatch, caplog):
    path = _write_map(tmp_path / "a.tif", chw, np.zeros(chw.shape[1:], np.uint8))
    monkeypatch.setattr(tiff, "find_spec", lambda name: None)
    np.testing.assert_array_equal(open_image(path).read(0, 0, *chw.shape[1:]), chw)
    assert "a.tif has a mask, which counts for nothing; to use it, run pip install 'widefield[geo]'" in caplog.text


def test_overviews_beside_a_map_are_levels(tmp_path, chw):
    path, small = _write_map(tmp_path / "a.tif", chw[:, :200, :320]), np.ascontiguousarray(chw[:, :100, :160])
    tifffile.imwrite(tmp_path / "a.tif.ovr", small.transpose(1, 2, 0), photometric="rgb", subfiletype=1, tile=(64, 64))
    image = open_image(path, 1)
    assert image.levels == ((200, 320), (100, 160))
    np.testing.assert_array_equal(image.read(0, 0, 100, 160), small)


def test_a_crs_without_a_number_comes_as_wkt_and_stays_in_heatmaps(tmp_path, chw):
    path = _write_map(tmp_path / "a.tif", chw, crs=CRS_OF_NO_NUMBER)
    image = open_image(path)
    with rasterio.open(path) as file:
        assert image.crs == file.crs.to_string() and image.crs.startswith("PROJCS")
        crs = file.crs
    heatmap = Heatmap.of(torch.rand(5, 5), Cells((5, 5), (0.0, 0.0), (32.0, 32.0)), image)
    heatmap.save_geotiff(tmp_path / "map.tif", "water")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.crs == crs
    np.testing.assert_array_equal(image.read(0, 0, *chw.shape[1:]), chw)
