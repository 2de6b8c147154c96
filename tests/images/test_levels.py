"""Pyramid levels, and the spacing that goes with them."""

import numpy as np
import pytest
import pyvips
import tifffile

from widefield.images import open_image, thumbnail


@pytest.mark.parametrize("subifd", [False, True], ids=["pages", "subifds"])
def test_every_level_of_a_pyramid_is_read(tmp_path, rgb, subifd):
    path = tmp_path / "a.tif"
    whole = pyvips.Image.new_from_array(rgb)
    whole.tiffsave(str(path), tile=True, tile_width=64, tile_height=64, pyramid=True, subifd=subifd)
    levels = open_image(path).levels
    assert levels == ((201, 333), (100, 166), (50, 83), (25, 41))
    for level, size in enumerate(levels):
        image = open_image(path, level)
        assert (image.level, image.shape) == (level, (3, *size))
        where = {} if level == 0 else {"subifd": level - 1} if subifd else {"page": level}
        expected = pyvips.Image.new_from_file(str(path), **where).numpy().transpose(2, 0, 1)
        np.testing.assert_array_equal(image.read(0, 0, *size), expected)
        np.testing.assert_array_equal(image.read(20, 11, 5, 30), expected[:, 20:25, 11:41])


def test_a_missing_level_names_those_there_are(tmp_path, rgb):
    pyvips.Image.new_from_array(rgb).tiffsave(str(tmp_path / "a.tif"), tile=True, tile_width=128, pyramid=True)
    with pytest.raises(ValueError, match=r"level 7 of .*a\.tif .* 0: 201x333, 1: 100x166"):
        open_image(tmp_path / "a.tif", level=7)
    pyvips.Image.new_from_array(rgb).pngsave(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="level -1"):
        open_image(tmp_path / "a.png", level=-1)


def _write_pyramid(path, rgb, **options):
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None, **options}
    with tifffile.TiffWriter(path, ome="ome" in path.name) as file:
        file.write(rgb, subifds=1, **options)
        file.write(rgb[:200:2, :332:2], subfiletype=1, **(options | {"metadata": None}))


@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((40_000, 20_000), "centimeter", (0.5, 0.25)),
        ((25_400, 50_800), "inch", (0.5, 1.0)),
        ((40_000, 20_000), "none", None),
        ((10, 10), "centimeter", None),
        ((72, 72), "inch", None),
    ],
)
def test_spacing_comes_from_resolution_tags_unless_they_are_made_up(tmp_path, rgb, resolution, unit, expected):
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", resolution=resolution, resolutionunit=unit)
    spacing = open_image(tmp_path / "a.tif").spacing
    assert spacing is None if expected is None else spacing == pytest.approx(expected)


def test_spacing_grows_with_the_downsampling_of_the_level(tmp_path, rgb):
    _write_pyramid(tmp_path / "a.tif", rgb, resolution=(40_000, 20_000), resolutionunit="centimeter")
    assert open_image(tmp_path / "a.tif").spacing == pytest.approx((0.5, 0.25))
    assert open_image(tmp_path / "a.tif", 1).spacing == pytest.approx((0.5 * 201 / 100, 0.25 * 333 / 166))


def test_spacing_comes_from_ome_xml(tmp_path, rgb):
    metadata = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    _write_pyramid(tmp_path / "a.ome.tif", rgb, metadata=metadata)
    assert open_image(tmp_path / "a.ome.tif").spacing == pytest.approx((0.5, 0.25))
    assert open_image(tmp_path / "a.ome.tif", 1).spacing == pytest.approx((0.5 * 201 / 100, 0.25 * 333 / 166))


def test_spacing_comes_from_aperio_and_its_thumbnail_is_no_level(tmp_path, rgb):
    description = "Aperio Image Library v1\r\n333x201 (64x64)|AppMag = 20|MPP = 0.4990|Date = 01/01/20"
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        file.write(rgb, photometric="rgb", tile=(64, 64), description=description, metadata=None)
        file.write(rgb[::3, ::3], photometric="rgb", metadata=None, description="Aperio Image Library v1")
        file.write(rgb[:200:2, :332:2], photometric="rgb", tile=(64, 64), description="Aperio Image", metadata=None)
    image = open_image(tmp_path / "a.svs", 1)
    assert image.levels == ((201, 333), (100, 166))
    assert image.spacing == pytest.approx((0.499 * 2.01, 0.499 * 333 / 166))
    np.testing.assert_array_equal(image.read(0, 0, 100, 166), rgb[:200:2, :332:2].transpose(2, 0, 1))


def test_spacing_comes_from_imagej(tmp_path, rgb):
    tifffile.imwrite(tmp_path / "a.tif", rgb[..., 0], imagej=True, resolution=(4, 2), metadata={"unit": "um"})
    assert open_image(tmp_path / "a.tif").spacing == pytest.approx((0.5, 0.25))


def test_a_thumbnail_is_the_mean_of_what_each_pixel_covers(tmp_path, rgb):
    np.save(tmp_path / "a.npy", rgb[:200, :300])
    small = thumbnail(open_image(tmp_path / "a.npy"), 30)
    expected = rgb[:200, :300].reshape(20, 10, 30, 10, 3).mean(axis=(1, 3))
    assert (small.shape, small.dtype) == ((20, 30, 3), np.uint8)
    assert np.abs(small - expected).max() <= 0.5


def test_a_thumbnail_reads_a_smaller_level_and_is_never_enlarged(tmp_path, rgb, monkeypatch):
    pyvips.Image.new_from_array(rgb).tiffsave(str(tmp_path / "a.tif"), tile=True, tile_width=64, pyramid=True)
    image = open_image(tmp_path / "a.tif")
    assert thumbnail(image, 1000).shape == (201, 333, 3)
    pixels = type(image._pixels)
    monkeypatch.setattr(pixels, "read", _refuse_more_than(166 * 100, pixels.read))
    assert thumbnail(image, 100).shape == (60, 100, 3)


def _refuse_more_than(pixels, read):
    def checked(self, y, x, height, width, channels):
        assert self.shape[1] * self.shape[2] <= pixels
        return read(self, y, x, height, width, channels)

    return checked


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_thumbnail_of_any_type_and_number_of_channels_is_rgb(tmp_path, channels):
    pixels = np.random.default_rng(0).normal(size=(channels, 90, 70)) * 1e4
    np.save(tmp_path / "a.npy", pixels)
    small = thumbnail(open_image(tmp_path / "a.npy"), 90)
    assert (small.shape, small.dtype, small.min(), small.max()) == ((90, 70, 3), np.uint8, 0, 255)


def test_a_thumbnail_shows_what_is_known_beside_nan(tmp_path):
    pixels = np.random.default_rng(0).random((3, 90, 70))
    pixels[:, :9] = np.nan
    np.save(tmp_path / "a.npy", pixels)
    small = thumbnail(open_image(tmp_path / "a.npy"), 90)
    assert (small[:9].max(), small[9:].max()) == (0, 255)
