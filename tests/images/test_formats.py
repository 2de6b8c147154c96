"""Every format gives the pixels that were written, region by region."""

import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import pyvips
import rasterio
import tifffile
import zarr

from widefield.images import ImageReadError, open_image, photos
from widefield.images.formats import image_formats

REGIONS = [(0, 0, 201, 333), (0, 0, 1, 1), (200, 332, 1, 1), (63, 65, 2, 130), (64, 0, 64, 333), (17, 100, 150, 33)]


FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("one", image_formats(), ids=lambda one: one.name)
def test_a_format_is_named_in_the_docs_and_asked_before_those_that_it_names(one):
    order = [other.name for other in image_formats()]
    assert one.name.lower() in FORMATS, "docs/formats.md"
    assert all(order.index(one.name) < order.index(later) for later in one.before)


def _write(path: Path, pixels: np.ndarray, **options) -> Path:
    pyvips.Image.new_from_array(pixels).write_to_file(str(path), **options)
    return path


def _assert_regions_agree(image, expected: np.ndarray) -> None:
    assert image.shape == expected.shape
    assert image.dtype == expected.dtype
    for y, x, height, width in REGIONS:
        region = image.read(y, x, height, width)
        assert region.dtype == expected.dtype
        assert region.flags.writeable
        np.testing.assert_array_equal(region, expected[:, y : y + height, x : x + width])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.png", {"interlace": True}),
        ("strips.tif", {}),
        ("strips-lzw.tif", {"compression": "lzw"}),
        ("tiles.tif", {"tile": True, "tile_width": 64, "tile_height": 32}),
        ("tiles-deflate.tif", {"tile": True, "compression": "deflate", "predictor": "horizontal"}),
        ("big.tif", {"tile": True, "bigtiff": True}),
    ],
)
def test_regions_are_those_of_the_whole_picture(tmp_path, rgb, chw, name, options):
    image = open_image(_write(tmp_path / name, rgb, **options))
    assert image.levels == ((201, 333),)
    _assert_regions_agree(image, chw)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    ("dtype", "tile"),
    [*((dtype, tile) for dtype in ("u1", "u2", "i2", "f4") for tile in (None, (64, 64))), ("f2", None), ("f8", None)],
)
def test_tiff_keeps_the_type_of_its_pixels(tmp_path, rgb, dtype, byteorder, tile):
    pixels = rgb.astype(dtype) * np.dtype(dtype).type(101)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=tile, byteorder=byteorder)
    _assert_regions_agree(open_image(tmp_path / "a.tif"), pixels.transpose(2, 0, 1))


def test_16_bit_grey_png_keeps_its_type(tmp_path, rgb):
    grey = rgb[..., 0].astype(np.uint16) * 257
    pyvips.Image.new_from_array(grey).copy(interpretation="grey16").pngsave(str(tmp_path / "a.png"))
    _assert_regions_agree(open_image(tmp_path / "a.png"), grey[None])


def test_jpeg_is_read_as_libvips_decodes_it(tmp_path, rgb):
    path = _write(tmp_path / "a.jpg", rgb, Q=90)
    expected = pyvips.Image.new_from_file(str(path)).numpy().transpose(2, 0, 1)
    _assert_regions_agree(open_image(path), expected)


def test_format_is_told_by_content_not_by_name(tmp_path, rgb, chw):
    path = _write(tmp_path / "a.png", rgb).rename(tmp_path / "a.tif")
    _assert_regions_agree(open_image(path), chw)


def test_large_decoded_pictures_go_through_a_temporary_file(tmp_path, rgb, chw, monkeypatch):
    monkeypatch.setattr(photos, "MEMORY_BYTES", 1000)
    monkeypatch.setattr(photos, "STRIP_BYTES", 10_000)
    _assert_regions_agree(open_image(_write(tmp_path / "a.png", rgb)), chw)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("bands", [1, 3])
def test_alpha_is_dropped(tmp_path, rgb, name, bands):
    colours = pyvips.Image.new_from_array(np.ascontiguousarray(rgb[..., :bands]))
    colours.bandjoin(100).write_to_file(str(tmp_path / name))
    _assert_regions_agree(open_image(tmp_path / name), rgb[..., :bands].transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [2, 4, 5])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_channels_that_are_not_alpha_stay(tmp_path, channels, tile):
    pixels = np.random.default_rng(0).integers(0, 60_000, (201, 333, channels), dtype=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig", tile=tile, compression="zlib"
    )
    _assert_regions_agree(open_image(tmp_path / "a.tif"), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_channels_stored_as_pages_are_one_image(tmp_path, chw, tile):
    tifffile.imwrite(tmp_path / "a.ome.tif", chw, photometric="minisblack", tile=tile, metadata={"axes": "CYX"})
    _assert_regions_agree(open_image(tmp_path / "a.ome.tif"), chw)


def test_palette_becomes_rgb(tmp_path, rgb):
    grey = np.ascontiguousarray(rgb[..., 0])
    palette = np.random.default_rng(1).integers(0, 256, (3, 256), dtype=np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="palette", colormap=palette, tile=(64, 64))
    _assert_regions_agree(open_image(tmp_path / "a.tif"), (palette // 257).astype(np.uint8)[:, grey])


def test_white_is_zero_becomes_black_is_zero(tmp_path, rgb):
    grey = np.ascontiguousarray(rgb[..., 0])
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric="miniswhite")
    _assert_regions_agree(open_image(tmp_path / "a.tif"), 255 - grey[None])


def test_cmyk_becomes_rgb(tmp_path, rgb):
    cmyk = pyvips.Image.new_from_array(rgb).copy(interpretation="srgb").colourspace("cmyk")
    cmyk.write_to_file(str(tmp_path / "a.jpg"), Q=100)
    image = open_image(tmp_path / "a.jpg")
    assert (image.shape, image.dtype) == ((3, 201, 333), np.uint8)
    expected = pyvips.Image.new_from_file(str(tmp_path / "a.jpg")).colourspace("srgb").numpy()
    np.testing.assert_array_equal(image.read(5, 6, 70, 80), expected[5:75, 6:86].transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "f4"])
@pytest.mark.parametrize("layout", ["hw", "hwc", "chw", "fortran"])
def test_npy_is_read_in_every_layout(tmp_path, rgb, dtype, layout):
    pixels = rgb.astype(dtype)
    stored = {
        "hw": pixels[..., 0],
        "hwc": pixels,
        "chw": np.ascontiguousarray(pixels.transpose(2, 0, 1)),
        "fortran": np.asfortranarray(pixels),
    }[layout]
    np.save(tmp_path / "a.npy", stored)
    expected = pixels.transpose(2, 0, 1)[: 1 if layout == "hw" else 3]
    _assert_regions_agree(open_image(tmp_path / "a.npy"), expected.astype(expected.dtype.newbyteorder("=")))


def test_channels_of_an_ambiguous_npy_are_said_by_the_caller(tmp_path):
    pixels = np.random.default_rng(0).random((40, 30, 40))
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(ValueError, match='channel_axis="first"'):
        open_image(tmp_path / "a.npy")
    np.testing.assert_array_equal(open_image(tmp_path / "a.npy", channel_axis="first").read(0, 0, 30, 40), pixels)
    last = open_image(tmp_path / "a.npy", channel_axis="last")
    np.testing.assert_array_equal(last.read(0, 0, 40, 30), pixels.transpose(2, 0, 1))


def test_a_file_written_anew_gives_its_new_pixels(tmp_path, rgb, chw):
    path = _write(tmp_path / "a.tif", rgb, tile=True)
    open_image(path).read(0, 0, 201, 333)
    _write(path, 255 - rgb, tile=True)
    _assert_regions_agree(open_image(path), 255 - chw)


@pytest.mark.parametrize("greatest", [1, 15, 255, 1023, 65535])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("is_text", [False, True])
def test_a_pnm_file_has_the_values_that_are_stored(tmp_path, greatest, channels, is_text):
    pixels = np.random.default_rng(0).integers(0, greatest + 1, (21, 34, channels))
    stored = pixels.astype("u1" if greatest < 256 else ">u2")
    kind = {1: 5, 3: 6}[channels] - 3 * is_text
    data = " ".join(map(str, pixels.ravel())).encode() + b" # end" if is_text else stored.tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P%d # comment\n34\n# another\n21 %d\n" % (kind, greatest) + data)
    image = open_image(tmp_path / "a.ppm")
    assert image.dtype == stored.dtype.newbyteorder("=")
    np.testing.assert_array_equal(image.read(0, 0, 21, 34), pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(image.read(20, 3, 1, 30), pixels[20:, 3:33].transpose(2, 0, 1))
    (tmp_path / "a.ppm").write_bytes(b"P%d 34 22 %d\n" % (kind, greatest) + data)
    with pytest.raises(ImageReadError, match=r"a\.ppm: it is truncated|a\.ppm: its structure is truncated"):
        open_image(tmp_path / "a.ppm")


def test_bits_are_0_for_black_and_1_for_white_in_every_format(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (21, 34)).astype(bool)
    (tmp_path / "a.pbm").write_bytes(b"P4\n34 21\n" + np.packbits(~bits, axis=1).tobytes())
    (tmp_path / "b.pbm").write_bytes(b"P1 34 21 " + "".join(map(str, (~bits).astype(int).ravel())).encode())
    for name in ("a.png", "a.bmp"):
        PIL.Image.fromarray(bits).save(tmp_path / name)
    np.save(tmp_path / "a.npy", bits)
    zarr.create_array(tmp_path / "a.zarr", data=bits)
    tifffile.imwrite(tmp_path / "a.tif", bits, photometric="minisblack")
    for path in sorted(tmp_path.iterdir()):
        image = open_image(path)
        assert (path.name, image.dtype) == (path.name, np.uint8)
        np.testing.assert_array_equal(image.read(0, 0, 21, 34)[0], bits, err_msg=path.name)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("chunk", [b"", b"tRNS\0\1"])
def test_grey_png_of_few_bits_keeps_its_values_with_and_without_a_transparent_one(tmp_path, bits, chunk):
    pixels = np.random.default_rng(0).integers(0, 2**bits, (21, 32), dtype=np.uint8)
    unpacked = (pixels[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(unpacked.reshape(21, -1), axis=1))
    header = struct.pack(">IIBBBBB", 32, 21, bits, 0, 0, 0, 0)
    chunks = [b"IHDR" + header, *([chunk] if chunk else []), b"IDAT" + zlib.compress(rows), b"IEND"]
    parts = (struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    np.testing.assert_array_equal(open_image(tmp_path / "a.png").read(0, 0, 21, 32)[0], pixels)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_tiff_palette_of_any_depth_becomes_rgb(tmp_path, bits):
    pixels = np.random.default_rng(0).integers(0, 2**bits, (21, 34), dtype=np.uint8)
    table = np.random.default_rng(1).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    options = {"height": 21, "width": 34, "count": 1, "dtype": "uint8", "photometric": "palette", "nbits": bits}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", **options) as raster:
        raster.write(pixels, 1)
        raster.write_colormap(1, {index: (*map(int, colour), 255) for index, colour in enumerate(table)})
    expected = table[pixels].transpose(2, 0, 1)
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif").read(0, 0, 21, 34), expected)


def _half_written(path: Path, dtype: str, **options) -> None:
    """A TIFF file of four tiles of ones, of which the second and the fourth have no bytes."""
    tiles = (None if index % 2 else np.ones((16, 16), dtype) for index in range(4))
    tifffile.imwrite(
        path, tiles, shape=(32, 32), dtype=dtype, tile=(16, 16), compression="deflate", metadata=None, **options
    )


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
@pytest.mark.parametrize("nodata", ["-9999", "nan", "300", "2.5", "inf", "7"])
def test_tiles_without_bytes_hold_what_gdal_makes_of_a_value_for_missing_data(tmp_path, dtype, nodata):
    _half_written(tmp_path / "a.tif", dtype, photometric="minisblack", extratags=[(42113, 2, 0, nodata, True)])
    with rasterio.open(tmp_path / "a.tif") as raster:
        np.testing.assert_array_equal(open_image(tmp_path / "a.tif").read(0, 0, 32, 32), raster.read())


def test_tiles_without_bytes_get_the_colours_of_what_they_store(tmp_path):
    table = np.full((3, 256), 257 * 9, np.uint16)
    table[:, 5] = 257 * 200
    tag = {"extratags": [(42113, 2, 0, "5", True)]}
    _half_written(tmp_path / "palette.tif", "u1", photometric="palette", colormap=table, **tag)
    _half_written(tmp_path / "white.tif", "u1", photometric="miniswhite", **tag)
    image = open_image(tmp_path / "palette.tif")
    assert (image.nodata, image.read(0, 16, 1, 1).ravel().tolist()) == (None, [200, 200, 200])
    image = open_image(tmp_path / "white.tif")
    assert (image.nodata, image.read(0, 16, 1, 1).item(), image.read(0, 0, 1, 1).item()) == (250, 250, 254)
