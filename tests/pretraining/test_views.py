"""Views: sizes, ranges, what they depend on, and the operations against torchvision's."""

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data
from torchvision.transforms.v2 import functional as F

from widefield.pretraining import METHODS
from widefield.pretraining.changes import blur, shift_hue
from widefield.pretraining.optimizers import SGD
from widefield.pretraining.settings import Errors, updated
from widefield.pretraining.transform_args import (
    ChannelDrop,
    GaussianBlur,
    Normalize,
    RandomFlip,
    RandomResize,
    Solarize,
    TransformArgs,
)
from widefield.pretraining.views import Views, to_unit

PICTURE = torch.from_numpy(data.astronaut()[:120, :160].copy()).permute(2, 0, 1)
PLAIN = TransformArgs(
    image_size=32,
    random_resize=None,
    random_flip=None,
    color_jitter=None,
    random_gray_scale=None,
    gaussian_blur=None,
    num_views=1,
)


def args_of(method: str) -> TransformArgs:
    return METHODS.get(method).transforms


def test_the_methods_have_their_numbers_and_sizes_of_views() -> None:
    sizes = {name: Views(args_of(name)).sizes for name in METHODS.index}
    assert sizes["simclr"] == ((224, 224),) * 2
    assert sizes["dino"] == ((224, 224),) * 2 + ((96, 96),) * 6
    assert sizes["distillation"] == ((224, 224),)
    args = replace(args_of("dino"), image_size=(40, 56))
    assert [tuple(view.shape) for view in Views(args)(PICTURE, Random(0))] == [(3, 40, 56)] * 2 + [(3, 96, 96)] * 6


def test_views_depend_on_the_generator_alone() -> None:
    views = Views(replace(args_of("dino"), image_size=48))
    torch.manual_seed(0)
    first = views(PICTURE, Random(3))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, views(PICTURE, Random(3)), strict=True))
    assert not torch.equal(first[0], views(PICTURE, Random(4))[0])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.0, 0.13, 0.5])
def test_hue_is_turned_as_torchvision_does(shift: float) -> None:
    image = torch.rand(3, 40, 30)
    image[:, :5] = 0.3  # grey
    turned = shift_hue(image[None], torch.tensor([[[[shift]]]]))[0]
    torch.testing.assert_close(turned, F.adjust_hue(image, shift), rtol=0, atol=3e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_blur_is_that_of_torchvision(sigma: float) -> None:
    image, side = torch.rand(4, 40, 30), 2 * int(np.ceil(3 * sigma)) + 1
    blurred = blur(torch.stack([image, image]), [sigma, 1.7])
    torch.testing.assert_close(blurred[0], F.gaussian_blur(image, [side, side], [sigma, sigma]))
    torch.testing.assert_close(blurred[1], blur(image[None], [1.7])[0])
    assert blur(torch.rand(1, 1, 1, 1), [sigma]).shape == (1, 1, 1, 1)


def test_without_changes_a_view_is_the_resized_image() -> None:
    (view,) = Views(PLAIN)(PICTURE, Random(0))
    assert view.dtype == torch.uint8
    assert torch.equal(view, F.resize(PICTURE, [32, 32], antialias=True))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.float32, torch.float64])
def test_other_types_become_floats_from_0_to_1_and_look_the_same(dtype: torch.dtype) -> None:
    unit = PICTURE.double() / 255
    image = unit.to(dtype) if dtype.is_floating_point else (unit * torch.iinfo(dtype).max).to(dtype)
    for k in range(20):
        args = replace(args_of("simclr"), image_size=32)
        left, right = (Views(args)(one, Random(k))[0] for one in (PICTURE, image))
        assert right.dtype == torch.float32 and right.min() >= 0 and right.max() <= 1
        torch.testing.assert_close(right, to_unit(left, None), rtol=0, atol=0.02)


def test_a_value_range_says_what_0_and_1_are() -> None:
    image = PICTURE.float() * 10 - 50
    args = replace(PLAIN, value_range=(-50.0, 2500.0))
    torch.testing.assert_close(
        Views(args)(image, Random(0))[0], to_unit(Views(PLAIN)(PICTURE, Random(0))[0], None), rtol=0, atol=0.004
    )


def test_crops_have_the_scale_and_ratio_that_were_asked_for() -> None:
    rows, columns = torch.meshgrid(torch.arange(200.0), torch.arange(300.0), indexing="ij")
    image = torch.stack([rows / 200, columns / 300, rows * 0])
    args = replace(PLAIN, image_size=16, random_resize=RandomResize(0.2, 0.4, 0.5, 2.0))
    shares, ratios = [], []
    for k in range(200):
        (view,) = Views(args)(image, Random(k))
        height = float(view[0, -1].mean() - view[0, 0].mean()) * 200 * 16 / 15
        width = float(view[1, :, -1].mean() - view[1, :, 0].mean()) * 300 * 16 / 15
        shares.append(height * width / 60_000)
        ratios.append(width / height)
    assert 0.18 < min(shares) < 0.23 and 0.37 < max(shares) < 0.42
    assert 0.45 < min(ratios) < 0.6 and 1.7 < max(ratios) < 2.1


def test_flips_solarisation_and_removed_channels() -> None:
    flipped = replace(PLAIN, random_flip=RandomFlip(1.0, 1.0))
    assert torch.equal(Views(flipped)(PICTURE, Random(0))[0], Views(PLAIN)(PICTURE, Random(0))[0].flip(-1, -2))
    (solarised,) = Views(replace(PLAIN, solarize=Solarize(1.0, 0.5)))(PICTURE, Random(0))
    assert solarised.max() <= 128
    many = torch.rand(5, 20, 20)
    whole = Views(replace(PLAIN, num_channels=5))(many, Random(0))[0].tolist()
    drop = replace(PLAIN, channel_drop=ChannelDrop(2, (0.0, 1.0, 1.0, 1.0, 0.0)))
    assert (drop.channels, drop.image_channels) == (2, 5)
    assert all(Views(drop)(many, Random(k))[0].tolist() == [whole[0], whole[4]] for k in range(3))
    any_two = replace(PLAIN, channel_drop=ChannelDrop(2, (1.0, 1.0, 1.0, 1.0, 1.0)))
    kept = [[whole.index(channel) for channel in Views(any_two)(many, Random(k))[0].tolist()] for k in range(20)]
    assert all(first < second for first, second in kept) and {k for pair in kept for k in pair} == {*range(5)}


def test_other_numbers_of_channels_turn_off_what_is_for_colours() -> None:
    args = replace(args_of("byol"), num_channels=4).for_channels()
    assert args.color_jitter is args.random_gray_scale is args.solarize is None
    assert args.global_view_1 is not None and args.global_view_1.solarize is None
    assert args.gaussian_blur == GaussianBlur(1.0)
    assert args.normalize.mean == (0.485, 0.456, 0.406, 0.485)
    assert [view.shape[0] for view in Views(args)(torch.rand(4, 64, 64), Random(0))] == [4, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFlip(2), r"^horizontal_prob: got 2, expected a number, from 0 to 1$"),
        (lambda: SGD(lr=math.inf), "lr: got inf, expected a number, at least 0"),
        (lambda: GaussianBlur(sigmas=(2.0, 1.0)), "low <= high"),
        (lambda: TransformArgs(num_channels=0, num_views=0), "num_channels: got 0.*; num_views: got 0"),
    ],
)
def test_settings_made_in_python_are_checked_too(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def change(method: str, changes: dict[str, Any]) -> tuple[TransformArgs, list[str]]:
    errors = Errors()
    return updated(args_of(method), changes, "transform_args", errors), errors


def test_a_dictionary_changes_only_what_it_names_and_none_turns_off() -> None:
    args, errors = change(
        "dino",
        {"color_jitter": {"strength": 0.2}, "local_view": {"num_views": 3}, "solarize": None, "image_size": [32, 48]},
    )
    assert not errors
    assert args.color_jitter == replace(args_of("dino").color_jitter, strength=0.2)
    assert args.local_view == replace(args_of("dino").local_view, num_views=3)
    assert args.image_size == (32, 48)
    assert change("simclr", {"color_jitter": None})[0].color_jitter is None
    rotated = change("simclr", {"random_rotation": {"degrees": 20}})[0].random_rotation
    assert rotated is not None and rotated.degrees == 20 and rotated.prob == 0.5
    assert change("simclr", {"normalize": {"mean": [0.5], "std": [1]}})[0].normalize == Normalize((0.5,), (1.0,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"imagesize": 3},
            "transform_args.imagesize: TransformArgs has no argument 'imagesize'; did you mean image_size?",
        ),
        (
            {"image_size": "224"},
            "transform_args.image_size: got '224', expected int, at least 1 or a list of 2 (int",
        ),
        ({"image_size": True}, "transform_args.image_size: got True, expected int"),
        (
            {"random_flip": 0.5},
            "transform_args.random_flip: got 0.5, expected a dictionary with keys among horizontal_prob, vertical_prob or None",
        ),
        (
            {"random_flip": {"horizontal_prob": 2}},
            "transform_args.random_flip.horizontal_prob: got 2, expected a number, from 0 to 1",
        ),
        ({"normalize": None}, "transform_args.normalize: got None, expected a dictionary with keys among mean, std"),
        ({"normalize": {"std": [0.1, 0.2]}}, "mean has 3 and std 2 values"),
        ({"channel_drop": {"num_channels_keep": 1}}, "transform_args.channel_drop: ChannelDrop needs weight_drop"),
    ],
)
def test_errors_say_where(changes: dict[str, Any], message: str) -> None:
    _, errors = change("simclr", changes)
    assert len(errors) == 1 and message in errors[0]
