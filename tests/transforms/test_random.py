"""Random changes stay within their limits, reach them, and leave masks and types alone."""

import numpy as np
import pytest
import scipy.ndimage
import skimage.color
import torch

import widefield.transforms as A
from tests.transforms.pictures import DTYPES, array, noise, smooth, vips


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def apply(transform, pixels):
    return array(transform(image=vips(pixels), force_apply=True)["image"])


def white(dtype):
    return 1.0 if dtype == "float32" else float(np.iinfo(dtype).max)


def assert_close(result, expected, dtype, levels=1):
    """Equal up to rounding: so many levels of integers, 1e-5 of floats."""
    np.testing.assert_allclose(result.astype(float), expected, atol=1e-5 if dtype == "float32" else levels, rtol=0)


IMAGE_ONLY = [
    A.RandomBrightnessContrast(),
    A.RandomGamma(),
    A.HueSaturationValue(),
    A.HEDShift(),
    A.Blur(),
    A.MedianBlur(),
    A.GaussianBlur(3),
    A.Sharpen(),
    A.GaussNoise(),
    A.CoarseDropout(),
    A.ChannelDropout(),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", IMAGE_ONLY, ids=lambda transform: type(transform).__name__)
def test_colours_and_filters_change_the_image_alone_and_keep_its_type(transform, dtype):
    pixels, labels = noise(dtype), noise(channels=1)
    out = transform(image=vips(pixels), mask=vips(labels), force_apply=True)
    result = array(out["image"])
    assert result.dtype == dtype and result.shape == pixels.shape
    assert (result != pixels).any()
    np.testing.assert_array_equal(array(out["mask"]), labels)
    assert out["image"].interpretation == vips(pixels).interpretation


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@pytest.mark.parametrize(
    "transform",
    [t for t in IMAGE_ONLY if not isinstance(t, A.HEDShift | A.HueSaturationValue | A.ChannelDropout)],
    ids=lambda transform: type(transform).__name__,
)
def test_each_channel_is_changed_as_if_alone(transform, channels):
    """No channel is taken for alpha, and none leaks into another."""
    pixels = noise("float32", channels)
    if isinstance(transform, A.GaussNoise):
        transform = A.GaussNoise(per_channel=False)
    torch.manual_seed(1)
    together = apply(transform, pixels)
    for channel in range(channels):
        torch.manual_seed(1)
        np.testing.assert_array_equal(
            apply(transform, pixels[..., channel : channel + 1])[..., 0], together[..., channel]
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_brightness_and_contrast_are_linear_and_clipped(dtype):
    pixels, top = noise(dtype), white(dtype)
    out = apply(A.RandomBrightnessContrast((0.1, 0.1), (-0.3, -0.3)), pixels)
    assert_close(out, np.clip(pixels * 0.7 + 0.1 * top, 0, top), dtype)
    out = apply(A.RandomBrightnessContrast((0.1, 0.1), (0.5, 0.5), brightness_by_max=False), pixels)
    assert_close(out, np.clip(pixels * 1.5 + 0.1 * 1.5 * pixels.mean(), 0, top), dtype)


def test_brightness_is_drawn_evenly_within_its_limit():
    grey = np.full((4, 4, 1), 0.5, np.float32)
    drawn = np.array([apply(A.RandomBrightnessContrast(0.2, 0), grey)[0, 0, 0] for _ in range(300)]) - 0.5
    assert -0.2 <= drawn.min() < -0.18 and 0.18 < drawn.max() <= 0.2
    assert abs(drawn.mean()) < 0.03


@pytest.mark.parametrize("dtype", DTYPES)
def test_gamma_is_a_power_of_the_fraction_of_white(dtype):
    pixels, top = noise(dtype), white(dtype)
    assert_close(apply(A.RandomGamma((150, 150)), pixels), (pixels / top) ** 1.5 * top, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("uint8", 12), ("uint16", 12 * 257), ("float32", 12 / 255)])
def test_hue_saturation_and_value_shift_as_in_hsv(dtype, tolerance):
    pixels, top = noise(dtype), white(dtype)
    out = apply(A.HueSaturationValue((50, 50), (-60, -60), (20, 20)), pixels)
    hsv = skimage.color.rgb2hsv(pixels / top)
    hsv = np.stack(
        [(hsv[..., 0] + 50 / 255) % 1, *np.moveaxis(np.clip(hsv[..., 1:] + [-60 / 255, 20 / 255], 0, 1), -1, 0)], -1
    )
    difference = np.abs(out - skimage.color.hsv2rgb(hsv) * top)
    assert np.percentile(difference, 99) < tolerance  # 8 bits of hue are coarse where saturation is low


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_no_shift_of_hue_changes_nothing_beyond_8_bits(dtype):
    np.testing.assert_array_equal(apply(A.HueSaturationValue(0, 0, 0), noise(dtype)), noise(dtype))


def test_of_grey_images_the_value_is_shifted():
    pixels = noise("uint8", 1)
    np.testing.assert_array_equal(
        apply(A.HueSaturationValue(50, 50, (9, 9)), pixels), np.minimum(pixels.astype(int) + 9, 255)
    )


def test_stains_shift_as_separated_by_skimage():
    pixels = np.clip(noise("float32"), 0.05, 1)
    out = apply(A.HEDShift((0.02, 0.02), (0.01, 0.01), (-0.01, -0.01)), pixels)
    expected = skimage.color.hed2rgb(skimage.color.rgb2hed(pixels) + np.array([0.02, 0.01, -0.01]))
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blurs_agree_with_scipy(dtype):
    pixels = noise(dtype)
    box = scipy.ndimage.uniform_filter(pixels.astype(float), (5, 5, 0), mode="nearest")
    assert_close(apply(A.Blur((5, 5)), pixels), box, dtype, levels=2)
    median = scipy.ndimage.median_filter(pixels, (5, 5, 1), mode="nearest")
    np.testing.assert_array_equal(apply(A.MedianBlur((5, 5)), pixels), median)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gaussian_blur_agrees_with_scipy(dtype):
    pixels = noise(dtype)
    out = apply(A.GaussianBlur((2, 2), min_amplitude=0.001), pixels)
    expected = scipy.ndimage.gaussian_filter(pixels.astype(float), (2, 2, 0), mode="nearest")
    np.testing.assert_allclose(out, expected, atol=0.02 * white(dtype) if dtype == "uint8" else 0.003 * white(dtype))


def test_the_default_gaussian_blur_does_nothing():
    np.testing.assert_array_equal(apply(A.GaussianBlur(), noise()), noise())


def test_sharpening_keeps_flat_regions_at_lightness_1_and_steepens_edges():
    step = np.full((9, 20, 1), 50, np.uint8)
    step[:, 10:] = 150
    out = apply(A.Sharpen((0.1, 0.1), (1, 1)), step)[4, :, 0]
    assert out[3] == 50 and out[16] == 150
    assert out[9] == 20 and out[10] == 180  # 3 neighbours differ by 100, times alpha


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_has_its_mean_and_variance_and_differs_by_channel(dtype):
    grey = np.full((200, 200, 3), white(dtype) / 2).astype(dtype)
    added = (apply(A.GaussNoise((25, 25), mean=4), grey).astype(float) - grey) / white(dtype) * 255
    np.testing.assert_allclose(added.mean((0, 1)), 4, atol=0.2)
    np.testing.assert_allclose(added.std((0, 1)), 5, rtol=0.05)
    assert np.abs(np.corrcoef(added.reshape(-1, 3).T) - np.eye(3)).max() < 0.05
    same = apply(A.GaussNoise(per_channel=False), grey)
    assert (same == same[..., :1]).all()


def test_random_crops_come_from_everywhere():
    pixels = np.arange(35, dtype=np.uint8).reshape(5, 7, 1)
    seen = set()
    for _ in range(300):
        crop = apply(A.RandomCrop(3, 4), pixels)[..., 0]
        y, x = divmod(int(crop[0, 0]), 7)
        np.testing.assert_array_equal(crop, pixels[y : y + 3, x : x + 4, 0])
        seen.add((y, x))
    assert seen == {(y, x) for y in range(3) for x in range(4)}


@pytest.mark.parametrize(("transform", "height", "width"), [
    (A.Resize(90, 30), 90, 30),
    (A.Resize(41, 67), 41, 67),
    (A.LongestMaxSize(134), 82, 134),
    (A.LongestMaxSize([20]), 12, 20),
    (A.SmallestMaxSize(82), 82, 134),
    (A.RandomScale((0.5, 0.5)), 62, 100),
])  # fmt: skip
def test_resizing_gives_the_size_and_masks_no_new_labels(transform, height, width):
    labels = noise("uint8", 1) // 128 * 7
    out = transform(image=vips(noise()), mask=vips(labels), force_apply=True)
    assert array(out["image"]).shape == (height, width, 3)
    assert array(out["mask"]).shape == (height, width, 1)
    assert set(np.unique(array(out["mask"]))) == {0, 7}


def test_resizing_meets_every_size():
    generator = np.random.default_rng(0)
    for height, width, new_height, new_width in generator.integers(1, 500, (300, 4)).tolist():
        out = A.Resize(new_height, new_width)(image=vips(np.zeros((height, width, 1), np.uint8)))["image"]
        assert (out.height, out.width) == (new_height, new_width), (height, width)


def test_halving_averages_and_doubling_repeats_masks():
    pixels = smooth()
    means = pixels.reshape(60, 2, 80, 2, 1).mean((1, 3))
    np.testing.assert_allclose(apply(A.Resize(60, 80), pixels)[2:-2, 2:-2], means[2:-2, 2:-2], atol=2)
    doubled = A.Resize(240, 320)(image=vips(pixels), mask=vips(pixels))["mask"]
    np.testing.assert_array_equal(array(doubled), pixels.repeat(2, 0).repeat(2, 1))


def test_dropped_rectangles_are_filled_in_the_image_and_if_asked_in_the_mask():
    pixels, labels = np.full((50, 60, 3), 9, np.uint8), np.full((50, 60, 1), 5, np.uint8)
    dropout = A.CoarseDropout(3, 8, 10, 1, 4, 5, fill_value=[1, 2, 3], mask_fill_value=0)
    counts = set()
    for _ in range(50):
        out = dropout(image=vips(pixels), mask=vips(labels), force_apply=True)
        filled = (array(out["image"]) == [1, 2, 3]).all(2)
        np.testing.assert_array_equal(filled, array(out["mask"])[..., 0] == 0)
        counts.add(filled.sum())
        assert (array(out["image"])[~filled] == 9).all()
    assert min(counts) >= 4 * 5 and 8 * 10 < max(counts) <= 3 * 8 * 10
    fractions = A.CoarseDropout(1, 0.5, 0.25, fill_value=255)
    assert (apply(fractions, pixels) == 255).all(2).sum() == 25 * 15


def test_dropped_channels_are_filled_and_each_has_its_turn():
    pixels = noise("uint16", 5) // 2 + 1
    seen = set()
    for _ in range(60):
        out = apply(A.ChannelDropout((1, 2)), pixels)
        dropped = {channel for channel in range(5) if (out[..., channel] == 0).all()}
        kept = [channel for channel in range(5) if channel not in dropped]
        np.testing.assert_array_equal(out[..., kept], pixels[..., kept])
        seen.add(frozenset(dropped))
    assert {len(dropped) for dropped in seen} == {1, 2}
    assert frozenset().union(*seen) == set(range(5))


def test_p_is_how_often_a_transform_is_applied():
    pixels = noise()
    applied = sum((array(A.HorizontalFlip(p=0.3)(image=vips(pixels))["image"]) != pixels).any() for _ in range(300))
    assert 60 < applied < 120
    never, always = A.HorizontalFlip(p=0), A.HorizontalFlip(always_apply=True, p=0)
    np.testing.assert_array_equal(array(never(image=vips(pixels))["image"]), pixels)
    np.testing.assert_array_equal(array(always(image=vips(pixels))["image"]), pixels[:, ::-1])
