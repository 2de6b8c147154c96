"""Every format gives the pixels that were written, region by region."""

from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile

from widefield.images import open_image, photos

REGIONS = [(0, 0, 201, 333), (0, 0, 1, 1), (200, 332, 1, 1), (63, 65, 2, 130), (64, 0, 64, 333), (17, 100, 150, 33)]


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
