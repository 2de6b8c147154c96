"""A spacing, channels and formats of one's own are chosen when an image is opened."""

import pickle

import numpy as np
import pytest
import tifffile
import torch

from widefield.images import (
    Mask,
    foreground,
    formats,
    image_endings,
    images_below,
    is_image_name,
    open_image,
    thumbnail,
)
from widefield.images.arrays import ArrayPixels
from widefield.images.formats import Contents, image_format


@pytest.fixture
def slide(tmp_path, rgb):
    """Three levels of spacing 0.25, 0.5 and 1 micrometres per pixel."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2, 4):
            options = (
                {"resolution": (40_000, 40_000), "resolutionunit": "centimeter"} if step == 1 else {"subfiletype": 1}
            )
            pixels = np.ascontiguousarray(rgb[:200:step, :332:step])
            file.write(pixels, photometric="rgb", tile=(32, 32), metadata=None, **options)
    return path


@pytest.mark.parametrize(("spacing", "level"), [(0.25, 0), (0.254, 0), (0.5, 1), (0.496, 1), (1.0, 2)])
def test_a_level_of_the_spacing_is_taken_as_it_is(slide, spacing, level):
    image, expected = open_image(slide, spacing=spacing), open_image(slide, level)
    assert (image.level, image.shape, image.spacing) == (level, expected.shape, expected.spacing)
    np.testing.assert_array_equal(image.read(1, 2, 40, 60), expected.read(1, 2, 40, 60))


def _shares(full, size):
    """Of each pixel of the result, the share that each pixel has in it, by cutting pixels into `size` parts."""
    shares = np.zeros((size, full))
    np.add.at(shares, (np.arange(size)[:, None], np.repeat(np.arange(full), size).reshape(size, full)), 1 / full)
    return shares


@pytest.mark.parametrize(("spacing", "level"), [(0.3, 0), (0.75, 1), (0.7, 1), (3.7, 2), (1000.0, 2)])
def test_between_levels_each_pixel_is_the_mean_of_the_area_it_covers(slide, spacing, level):
    image, source = open_image(slide, spacing=spacing), open_image(slide, level)
    _, height, width = source.shape
    rows, columns = (max(1, round(n * 0.25 / spacing)) for n in (200, 332))
    assert (image.level, image.shape) == (level, (3, rows, columns))
    assert image.spacing == pytest.approx((0.25 * 200 / rows, 0.25 * 332 / columns))
    # each pixel cut into rows x columns parts, of which a pixel of the result takes height x width
    fine = _shares(height, rows) @ source.read(0, 0, height, width).astype(float) @ _shares(width, columns).T
    whole = image.read(0, 0, rows, columns)
    assert np.abs(whole - fine).max() <= 0.5 + 1e-9
    y, x = rows // 3, columns // 2
    np.testing.assert_array_equal(image.read(y, x, rows - y, columns - x), whole[:, y:, x:])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(image)).read(0, 0, 1, 1), whole[:, :1, :1])


def test_pixels_without_data_do_not_count_in_a_mean(tmp_path):
    pixels = np.full((8, 8), -99, np.int16)
    pixels[:, 3:] = 10
    tags = [(42113, "s", 0, "-99", True)]
    resolution = {"resolution": (10_000, 10_000), "resolutionunit": "centimeter"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", extratags=tags, metadata=None, **resolution)
    image = open_image(tmp_path / "a.tif", spacing=2)
    np.testing.assert_array_equal(image.read(0, 0, 4, 4)[0], np.tile([-99, 10, 10, 10], (4, 1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": 0.2}, "whose finest is 0.25 micrometres per pixel"),
        ({"spacing": -1}, "spacing=-1 .* above 0"),
        ({"spacing": 0.5, "level": 1}, "both given"),
        ({"channels": [3]}, r"channel 3 of .*a\.tif does not exist; its channels are 0 to 2, without names"),
        ({"channels": "rgb"}, r"channels='rgb' .* expected a list"),
        ({"channels": []}, r"channels=\[\] .* expected a list"),
        ({"series": 4}, "series=4 .* does not exist"),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(slide, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_image(slide, **arguments)


def test_a_spacing_of_a_file_that_says_none_is_refused(tmp_path, rgb):
    np.save(tmp_path / "a.npy", rgb)
    with pytest.raises(
        ValueError, match=r"spacing=0.5 was asked for of .*a\.npy, which does not say its own; give level="
    ):
        open_image(tmp_path / "a.npy", spacing=0.5)


@pytest.mark.parametrize("density", [72, 96, 100, 150, 300, 600, 1200, 2400])
@pytest.mark.parametrize("unit", ["inch", "centimeter"])
def test_a_density_of_print_is_no_spacing(tmp_path, rgb, density, unit):
    value = density if unit == "inch" else round(density / 2.54, 2)
    tifffile.imwrite(
        tmp_path / "a.tif", rgb, photometric="rgb", resolution=(value, value), resolutionunit=unit, metadata=None
    )
    assert open_image(tmp_path / "a.tif").spacing is None


@pytest.mark.parametrize("spacing", [0.1, 0.2264, 0.25, 0.5, 0.5034, 1.0, 2.0, 3.45, 5.0])
def test_a_spacing_of_a_microscope_is_one(tmp_path, rgb, spacing):
    value = (100_000_000, round(10_000 * spacing))  # a fraction, as older versions of tifffile round what is none
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", resolution=(value, value), resolutionunit="centimeter")
    assert open_image(tmp_path / "a.tif").spacing == pytest.approx((spacing, spacing), rel=1e-6)


def test_a_format_of_another_package_is_read_found_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_FORMATS", list(formats.image_formats()))

    @image_format(
        "raw squares", endings=(".square", ".zvi"), recognises=lambda path, start: start.startswith(b"SQUARE")
    )
    def open_square(path, choice):
        pixels = ArrayPixels(np.frombuffer(path.read_bytes()[6:], np.uint8).reshape(3, 3), "YX")
        return Contents(levels=((3, 3),), pixels=lambda level: pixels)

    (tmp_path / "a.square").write_bytes(b"SQUARE" + bytes(range(9)))
    try:
        assert ".square" in image_endings()
        np.testing.assert_array_equal(open_image(tmp_path / "a.square").read(1, 1, 2, 2), [[[4, 5], [7, 8]]])
        tifffile.imwrite(tmp_path / "a.zvi", np.zeros((5, 6), np.uint8))  # an ending that a format has is not refused
        assert open_image(tmp_path / "a.zvi").shape == (1, 5, 6)
    finally:
        formats.image_formats.cache_clear()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_an_array_is_an_image_too(rgb, chw, kind):
    image = open_image(kind(rgb), channels=[2, 0], fill=0)
    assert (image.shape, image.dtype, image.levels) == ((2, 201, 333), np.uint8, ((201, 333),))
    for one in (image, pickle.loads(pickle.dumps(image))):
        np.testing.assert_array_equal(one.read(5, 6, 70, 80), chw[[2, 0], 5:75, 6:86])
    with pytest.raises(ValueError, match=r"the shape \(5, 6, 5\) of an array of shape .* does not tell"):
        open_image(np.ones((5, 6, 5)))
    with pytest.raises(OSError, match=r"cannot read an array of shape .*complex128"):
        open_image(np.ones((5, 6), complex))


def test_pixels_that_are_nan_do_not_count_at_a_spacing_between_levels_nor_beside_them(tmp_path):
    pixels = np.ones((8, 8), "f4")
    pixels[2:4, 2:4] = pixels[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels, resolution=(20_000, 20_000), resolutionunit=3, metadata=None)
    expected = np.ones((4, 4), "f4")
    expected[1, 1] = np.nan
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", spacing=1).read(0, 0, 4, 4)[0], expected)


def test_means_of_the_greatest_integers_do_not_wrap(tmp_path):
    for dtype in ("u8", "i8", "u4"):
        pixels = np.full((8, 8), np.iinfo(dtype).max, dtype)
        tifffile.imwrite(tmp_path / "a.tif", pixels, resolution=(20_000, 20_000), resolutionunit=3, metadata=None)
        assert open_image(tmp_path / "a.tif", spacing=1).read(0, 0, 4, 4).min() > np.iinfo(dtype).max * 0.999


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("level", "1", "a whole number"),
        ("level", 1.0, "a whole number"),
        ("level", [], "a whole number"),
        ("level", True, "a whole number"),
        ("spacing", "0.5", "micrometres per pixel, above 0"),
        ("spacing", [0.5], "micrometres per pixel, above 0"),
        ("spacing", float("nan"), "micrometres per pixel, above 0"),
        ("series", 1.5, "does not exist; its images are 0"),
        ("series", True, "does not exist; its images are 0"),
        ("channels", 1, "a list of channels"),
        ("channels", b"red", "a list of channels"),
        ("channels", {}, "a list of channels"),
        ("channels", [None], "channel None of .* its channels are 0 to 2"),
        ("channels", [True], "channel True of .* its channels are 0 to 2"),
        ("fill", "0", "a value of its type uint8, from 0 to 255"),
        ("fill", -1, "a value of its type uint8, from 0 to 255"),
        ("fill", float("nan"), "a value of its type uint8, from 0 to 255"),
    ],
)
def test_arguments_of_wrong_types_are_named(slide, argument, value, expected):
    with pytest.raises(ValueError, match=expected):
        open_image(slide, **{argument: value})


def test_numbers_of_numpy_and_torch_are_taken(slide):
    image = open_image(slide, np.int64(1), series=np.int64(0), channels=np.array([2, 0]), fill=np.float32(0))
    assert open_image(slide, spacing=np.float32(0.5)).level == torch.tensor(1)
    assert image.read(np.uint8(1), torch.tensor(2), np.array(3), 4).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: image.read("1", 0, 2, 2), "y='1' for a region of .*a.tif; expected a whole number"),
        (lambda image: image.read(0, 0, 2, 2.0), "width=2.0 for a region of .*a.tif; expected a whole number"),
        (lambda image: image.at_level("1"), "level='1' for .*a.tif; expected a whole number"),
        (
            lambda image: thumbnail(image, "9"),
            "size='9' for a thumbnail of .*a.tif; expected a whole number of at least 1",
        ),
        (lambda image: thumbnail("a.tif", 9), "image='a.tif'; expected an image that open_image returned"),
        (lambda image: foreground("a.tif"), "image='a.tif'; expected an image that open_image returned"),
        (lambda image: foreground(image, 3), "foreground method 3; expected otsu, hsv"),
        (
            lambda image: foreground(image, spacing="8"),
            "spacing='8' for a mask of .*a.tif; expected micrometres per cell",
        ),
        (lambda image: Mask([[True]]), r"cells=\[\[True\]\] of a mask; expected a boolean array"),
        (lambda image: images_below(None), "folder=None; expected the path of a folder"),
        (lambda image: images_below(".", ".tif"), "endings='.tif'; expected a list such as"),
        (lambda image: is_image_name(3), "name=3; expected the name of a file"),
        (lambda image: is_image_name("a.tif", [1]), r"endings=\[1\]; expected a list such as"),
    ],
)
def test_other_functions_name_arguments_of_wrong_types_too(slide, call, message):
    with pytest.raises(ValueError, match=message):
        call(open_image(slide))
