"""Transforms that are made of others, and the user's own."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import pyvips
import torch

import widefield.transforms as A
from tests.transforms.pictures import array, noise, vips


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def added(transform, runs=1):
    """How often each value is added to a black image."""
    black = vips(np.zeros((2, 2, 1), np.uint8))
    return Counter(int(array(transform(image=black)["image"])[0, 0, 0]) for _ in range(runs))


def plus(value):
    """A function for `Lambda`."""
    return lambda image: (image + value).cast("uchar")


def test_the_lines_of_the_tutorial_run():
    image_size = 64
    transforms = A.Compose(
        [A.CropOrPad(image_size, image_size), A.Flip(p=0.5), A.ToDtype("float", scale=True), A.ToTensor()]
    )
    image = transforms(image=vips(noise()))["image"]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert image.min() == 0 and image.max() == 1


def test_compose_applies_all_in_order():
    double = A.Lambda(image=lambda image: (image * 2).cast("uchar"))
    assert added(A.Compose([A.Lambda(image=plus(3)), double])) == {6: 1}
    assert added(A.Compose([double, A.Lambda(image=plus(3))])) == {3: 1}


def test_compose_that_is_not_applied_applies_what_always_is():
    always = A.Lambda(image=plus(1), always_apply=True)
    group = A.Compose([A.Lambda(image=plus(10)), A.OneOf([always, A.NoOp()])], p=0)
    assert added(group) == {1: 1}
    assert isinstance(A.Compose([A.Flip(), A.ToTensor()], p=0)(image=vips(noise()))["image"], torch.Tensor)


def test_one_of_draws_by_the_weights():
    counts = added(A.OneOf([A.Lambda(image=plus(1), p=0.9), A.Lambda(image=plus(2), p=0.3)], p=0.8), 500)
    assert sum(counts.values()) - counts[0] == pytest.approx(400, abs=30)
    assert counts[1] / counts[2] == pytest.approx(3, rel=0.3)


def test_some_of_applies_n_with_or_without_repeats():
    ones = [A.Lambda(image=plus(10**i), p=0.5) for i in range(3)]
    assert set(added(A.SomeOf(ones, 2, replace=False), 100)) == {11, 101, 110}
    assert set(added(A.SomeOf(ones, 2), 200)) == {2, 11, 20, 101, 110, 200}


def test_one_or_other_applies_either():
    assert set(added(A.OneOrOther(A.Lambda(image=plus(1)), A.Lambda(image=plus(2))), 50)) == {1, 2}
    assert added(A.OneOrOther(transforms=[A.Lambda(image=plus(1)), A.Lambda(image=plus(2))], p=1), 9) == {1: 9}


def test_sequential_is_one_entry_of_a_draw():
    sequence = A.Sequential([A.Lambda(image=plus(1)), A.Lambda(image=plus(2))])
    assert set(added(A.OneOf([sequence, A.Lambda(image=plus(9), p=0.5)], p=1), 50)) == {3, 9}


def test_further_images_and_masks_move_with_the_first():
    pixels = noise()
    names = {"image2": "image", "mask2": "mask"}
    compose = A.Compose([A.OneOf([A.Flip(), A.RandomRotate90()], p=1), A.RandomGamma(p=1)], additional_targets=names)
    for _ in range(10):
        out = compose(image=vips(pixels), image2=vips(pixels), mask=vips(pixels), mask2=vips(pixels))
        np.testing.assert_array_equal(array(out["image"]), array(out["image2"]))
        np.testing.assert_array_equal(array(out["mask"]), array(out["mask2"]))


class Invert:
    """A transform of the user's own."""

    def __call__(self, **data):
        return {**data, "image": data["image"].invert()}


def test_any_callable_that_takes_data_by_name_is_a_transform():
    pixels = noise()
    for group in (A.Compose([Invert()]), A.OneOf([Invert()], p=1), A.SomeOf([Invert()], 1), A.Sequential([Invert()])):
        out = group(image=vips(pixels), label=7)
        np.testing.assert_array_equal(array(out["image"]), 255 - pixels)
        assert out["label"] == 7


def test_lambda_changes_what_it_was_given_a_function_for():
    pixels = noise()
    out = A.Lambda(mask=pyvips.Image.invert)(image=vips(pixels), mask=vips(pixels))
    np.testing.assert_array_equal(array(out["image"]), pixels)
    np.testing.assert_array_equal(array(out["mask"]), 255 - pixels)


def test_data_that_is_none_stays_none():
    out = A.Compose([A.Flip(p=1), A.ToTensor()])(image=vips(noise()), mask=None, masks=None)
    assert out["mask"] is None and out["masks"] is None


def test_torch_s_seed_alone_makes_draws_repeat():
    compose = A.Compose(
        [A.RandomCrop(20, 20), A.Affine(p=0.9), A.GaussNoise(p=0.9), A.CoarseDropout(p=0.9), A.ToTensor()]
    )
    image = vips(noise())
    state = random.getstate(), np.random.get_state()[1].tolist()
    runs = []
    for python_seed in (0, 1):
        random.seed(python_seed)
        torch.manual_seed(5)
        runs.append([compose(image=image)["image"] for _ in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])
    random.setstate(state[0])
    compose(image=image)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state


def test_repr_shows_the_arguments_over_lines():
    text = repr(A.Compose([A.OneOf([A.Flip(), A.CropOrPad(8, 9)]), A.ToTensor()]))
    assert text.splitlines() == [
        "Compose([",
        "  OneOf([",
        "    Flip(always_apply=False, p=0.5),",
        "    CropOrPad(height=8, width=9, direction='centre', always_apply=False, p=1.0),",
        "  ], p=0.5),",
        "  ToTensor(transpose_mask=False, always_apply=True, p=1.0),",
        "], bbox_params=None, keypoint_params=None, additional_targets=None, p=1.0, is_check_shapes=True)",
    ]


def test_groups_have_a_length_and_entries():
    compose = A.Compose([A.Flip(), A.ToTensor()])
    assert len(compose) == 2 and compose[1] == A.ToTensor()


def test_importing_the_transforms_does_not_import_lightning():
    code = "import sys, widefield.transforms; print('lightning' in sys.modules or 'pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
