"""What moves, cuts or converts pixels agrees with NumPy to the last bit, for images and masks."""

import numpy as np
import pytest
import torch

import widefield.transforms as A
from tests.transforms.pictures import DTYPES, array, noise, vips

every_format = pytest.mark.parametrize(
    "pixels",
    [pytest.param(noise(dtype, n), id=f"{dtype}-{n}") for dtype in DTYPES for n in (1, 2, 3, 4, 5)],
)
LABELS = noise("uint8", 1, seed=1)


def check(transform, pixels, expected, fill=None):
    """`expected` maps an array (H, W, C) to the result, `fill` tells the new pixels of images from those of masks (0)."""
    out = transform(image=vips(pixels), mask=vips(LABELS), masks=[vips(LABELS)], label="left alone", force_apply=True)
    white = 1.0 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    result = array(out["image"])
    np.testing.assert_array_equal(result, expected(pixels, white if fill is None else fill))
    assert result.dtype == pixels.dtype
    for mask in (out["mask"], *out["masks"]):
        np.testing.assert_array_equal(array(mask), expected(LABELS, 0))
    assert out["label"] == "left alone"


@every_format
def test_flips_and_transposing_swap_axes_and_sides(pixels):
    check(A.HorizontalFlip(), pixels, lambda a, _: a[:, ::-1])
    check(A.VerticalFlip(), pixels, lambda a, _: a[::-1])
    check(A.Transpose(), pixels, lambda a, _: a.transpose(1, 0, 2))


@every_format
def test_crops_cut_out_their_region(pixels):
    check(A.Crop(3, 5, 40, 20), pixels, lambda a, _: a[5:20, 3:40])
    check(A.CenterCrop(11, 20), pixels, lambda a, _: a[15:26, 23:43])
    check(A.RandomCrop(41, 67), pixels, lambda a, _: a)


@every_format
def test_crop_or_pad_pads_images_with_white_and_masks_with_zero(pixels):
    def wide(a, fill):
        return np.pad(a[15:26], ((0, 0), (6, 7), (0, 0)), constant_values=fill)

    check(A.CropOrPad(11, 80), pixels, wide)
    check(
        A.CropOrPad(50, 20, "north-west"),
        pixels,
        lambda a, fill: np.pad(a[:, :20], ((0, 9), (0, 0), (0, 0)), constant_values=fill),
    )


@every_format
def test_padding_goes_to_a_least_size_or_to_a_multiple(pixels):
    check(
        A.PadIfNeeded(50, 10, value=1), pixels, lambda a, f: np.pad(a, ((4, 5), (0, 0), (0, 0)), constant_values=f), 1
    )
    check(A.PadIfNeeded(41, 67), pixels, lambda a, _: a)
    multiple = A.PadIfNeeded(None, None, 16, 67, position=A.PadIfNeeded.PositionType.BOTTOM_RIGHT)
    check(multiple, pixels, lambda a, _: np.pad(a, ((7, 0), (0, 0), (0, 0))))
    check(
        A.PadIfNeeded(45, None, pad_width_divisor=70, position="north-west", border_mode="mirror"),
        pixels,
        lambda a, _: np.pad(a, ((0, 4), (0, 3), (0, 0)), mode="symmetric"),
    )


def test_one_fill_value_per_channel():
    out = A.PadIfNeeded(42, 67, value=[1, 2, 3], position="north-west")(image=vips(noise()))["image"]
    np.testing.assert_array_equal(array(out)[-1, 0], [1, 2, 3])


@every_format
def test_random_flips_and_turns_draw_each_of_theirs(pixels):
    turns = {np.rot90(pixels, turn).tobytes() for turn in range(4)}
    flips = {pixels[:, ::-1].tobytes(), pixels[::-1].tobytes(), pixels[::-1, ::-1].tobytes()}
    for transform, expected in ((A.RandomRotate90(p=1), turns), (A.Flip(p=1), flips)):
        assert {array(transform(image=vips(pixels))["image"]).tobytes() for _ in range(60)} == expected


@every_format
def test_a_tensor_has_the_pixels_channels_first(pixels):
    tensor = A.ToTensor()(image=vips(pixels))["image"]
    assert tensor.is_contiguous()
    assert tensor.dtype == getattr(torch, str(pixels.dtype))
    np.testing.assert_array_equal(tensor.numpy(), pixels.transpose(2, 0, 1))


def test_a_tensor_larger_than_a_block_is_whole():
    pixels = noise("uint8", 3, 700, 1030)
    np.testing.assert_array_equal(A.ToTensor()(image=vips(pixels))["image"].numpy(), pixels.transpose(2, 0, 1))


def test_masks_become_tensors_without_or_with_a_channel_axis():
    one, two = noise(channels=1), noise(channels=2)
    out = A.ToTensor()(image=vips(noise()), mask=vips(one), masks=[vips(two)])
    np.testing.assert_array_equal(out["mask"].numpy(), one[..., 0])
    np.testing.assert_array_equal(out["masks"][0].numpy(), two)
    out = A.ToTensor(transpose_mask=True)(image=vips(noise()), mask=vips(one), masks=[vips(two)])
    np.testing.assert_array_equal(out["mask"].numpy(), one[..., 0])
    np.testing.assert_array_equal(out["masks"][0].numpy(), two.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_scaling_to_floats_maps_the_range_to_0_and_1(dtype, channels):
    pixels = noise(dtype, channels)
    floats = array(A.ToDtype("float", scale=True)(image=vips(pixels))["image"])
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, pixels / np.float64(np.iinfo(dtype).max), rtol=2e-7)
    assert floats.min() == 0 and floats.max() == 1
    doubles = array(A.ToDtype("double", scale=True)(image=vips(pixels))["image"])
    np.testing.assert_allclose(doubles, pixels / np.float64(np.iinfo(dtype).max), rtol=1e-15)


@pytest.mark.parametrize(("name", "dtype"), [("uchar", "uint8"), ("ushort", "uint16")])
def test_scaling_there_and_back_changes_nothing(name, dtype):
    there_and_back = A.Compose([A.ToDtype("float", scale=True), A.ToDtype(name, scale=True)])
    np.testing.assert_array_equal(array(there_and_back(image=vips(noise(dtype)))["image"]), noise(dtype))


def test_scaling_between_integers_keeps_white_white():
    pixels = noise("uint16")
    out = array(A.ToDtype("uchar", scale=True)(image=vips(pixels))["image"])
    np.testing.assert_array_equal(out, np.rint(pixels / 257).astype(np.uint8))


def test_converting_without_scaling_keeps_values_and_clips_what_does_not_fit():
    pixels = noise("uint16")
    np.testing.assert_array_equal(array(A.ToDtype("float", scale=False)(image=vips(pixels))["image"]), pixels)
    out = array(A.ToDtype("uchar", scale=False)(image=vips(pixels))["image"])
    np.testing.assert_array_equal(out, np.minimum(pixels, 255))


def test_converting_leaves_masks():
    out = A.ToDtype("float", scale=True)(image=vips(noise()), mask=vips(LABELS))
    np.testing.assert_array_equal(array(out["mask"]), LABELS)


@every_format
def test_normalising_subtracts_and_divides_per_channel(pixels):
    mean, std = np.linspace(0.2, 0.6, pixels.shape[2]), np.linspace(0.1, 0.3, pixels.shape[2])
    out = array(A.Normalize(mean.tolist(), std.tolist())(image=vips(pixels))["image"])
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (pixels - mean) / std, rtol=1e-5, atol=1e-5)
