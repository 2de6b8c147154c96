"""Rotations, affine maps and elastic deformations."""

import numpy as np
import pytest
import pyvips
import scipy.ndimage
import torch

import widefield.transforms as A
from tests.transforms.pictures import DTYPES, array, noise, smooth, vips


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def apply(transform, pixels):
    return array(transform(image=vips(pixels), force_apply=True)["image"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_quarter_turns_and_whole_shifts_only_move_pixels(dtype, channels, interpolation):
    pixels = noise(dtype, channels)
    options = {"interpolation": interpolation, "cval": 0}
    turned = apply(A.Affine(rotate=90, fit_output=True, **options), pixels)
    np.testing.assert_allclose(turned, np.rot90(pixels), rtol=1e-5, atol=1e-6)
    turned = apply(A.Rotate((90, 90), interpolation=interpolation), pixels)
    np.testing.assert_allclose(turned, np.rot90(pixels, -1), rtol=1e-5, atol=1e-6)
    shifted = apply(A.Affine(translate_px={"x": 5, "y": -3}, **options), pixels)
    np.testing.assert_array_equal(shifted, np.pad(pixels, ((0, 3), (5, 0), (0, 0)))[3:, :67])


def test_masks_are_warped_with_the_image_to_the_pixel():
    """A mask of the bright half stays one, up to the pixels that the edge goes through."""
    pixels = smooth()
    mask = (pixels > 127).astype(np.uint8)
    for transform in (
        A.Affine(rotate=(-40, 40), scale=(0.7, 1.4), shear=(-20, 20), translate_percent=0.1, cval=0),
        A.Affine(rotate=33, scale={"x": 1.5}, fit_output=True, cval=0),
        A.Rotate(80, value=0),
        A.Rotate(80, value=0, crop_border=True),
        A.ElasticTransform(alpha=400, sigma=12, value=[0]),
    ):
        for _ in range(5):
            out = transform(image=vips(pixels), mask=vips(mask), force_apply=True)
            warped, labels = array(out["image"]), array(out["mask"])
            assert set(np.unique(labels)) <= {0, 1}
            clear = np.abs(warped.astype(int) - 127) > 12  # an edge is less steep than this within half a pixel
            assert ((warped > 127) == labels)[clear].mean() > 0.997, transform


def test_an_affine_map_agrees_with_scipy():
    pixels = smooth()
    out = apply(A.Affine(scale={"x": 1.2, "y": 0.9}, rotate=25, translate_px={"x": 4, "y": 7}, cval=0), pixels)[..., 0]
    cos, sin = np.cos(np.deg2rad(25)), np.sin(np.deg2rad(25))
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.diag([0.9, 1.2])  # of (y, x); counter-clockwise
    centre = np.array([59.5, 79.5])
    moved = centre + np.array([7, 4])
    back = np.linalg.inv(forward)
    expected = scipy.ndimage.affine_transform(pixels[..., 0].astype(float), back, centre - back @ moved, order=1)
    inside = scipy.ndimage.affine_transform(np.ones((120, 160)), back, centre - back @ moved, order=0) > 0
    inside = scipy.ndimage.binary_erosion(inside, iterations=2)
    np.testing.assert_allclose(out[inside], expected[inside], atol=1.5)
    assert inside.mean() > 0.5


def test_shear_tilts_the_axes():
    pixels = np.zeros((101, 101, 1), np.uint8)
    pixels[:, 50] = 255
    out = apply(A.Affine(shear={"x": 45}, cval=0), pixels)[..., 0]
    assert out[50, 50] == 255
    assert out[70, 70] == 255 and out[30, 30] == 255


def test_the_default_affine_map_draws_anew():
    assert len({apply(A.Affine(), smooth()).tobytes() for _ in range(5)}) == 5


def test_keeping_the_ratio_scales_both_axes_alike():
    square = np.zeros((200, 200, 1), np.uint8)
    square[50:150, 50:150] = 255
    for _ in range(5):
        bright = apply(A.Affine(scale=(0.5, 1.5), keep_ratio=True, cval=0), square)[..., 0] > 127
        assert abs(int(bright.any(0).sum()) - int(bright.any(1).sum())) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_new_pixels_are_white_by_default_and_zero_in_masks(dtype, channels):
    pixels = np.zeros((40, 40, channels), dtype)
    top = 1 if dtype == "float32" else np.iinfo(dtype).max
    for transform in (A.Rotate((45, 45)), A.Affine(scale=0.5)):
        out = transform(image=vips(pixels), mask=vips(np.ones((40, 40, 1), np.uint8)), force_apply=True)
        assert (array(out["image"])[0, 0] == top).all()
        assert array(out["mask"])[0, 0] == 0


@pytest.mark.parametrize("angle", [0, 1, 17, 45, 60, 90, 133, 180])
@pytest.mark.parametrize(("height", "width"), [(100, 100), (60, 200), (200, 60)])
def test_cropping_the_border_leaves_no_new_pixels(angle, height, width):
    pixels = np.full((height, width, 1), 100, np.uint8)
    whole = apply(A.Rotate((angle, angle), value=0), pixels)
    inside = apply(A.Rotate((angle, angle), value=0, crop_border=True), pixels)
    assert (inside == 100).all()
    assert inside.size > 0.3 * min(height, width) ** 2
    assert abs(int((whole > 50).sum()) - height * width) < 3 * (height + width)  # nothing is cut off


def test_an_elastic_field_is_as_strong_as_documented():
    ramp = np.broadcast_to(np.arange(400, dtype=np.float32)[None, :, None], (300, 400, 1)).copy()
    for sigma in (4, 30):
        alpha = 20 * sigma
        moved = np.concatenate(
            [apply(A.ElasticTransform(alpha, sigma, value=[0]), ramp)[60:-60, 60:-60].ravel() for _ in range(20)]
        )
        still = np.tile(ramp[60:-60, 60:-60].ravel(), 20)
        assert (moved - still).std() == pytest.approx(0.163 * alpha / sigma, rel=0.15)


def test_an_interpolator_of_pyvips_is_taken_by_its_name():
    assert A.Rotate(interpolation=pyvips.Interpolate.new("bicubic")) == A.Rotate(interpolation="bicubic")
