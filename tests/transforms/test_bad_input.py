"""Bad input is refused in words that say what was given, what was expected and what to do."""

import numpy as np
import pytest
import torch

import widefield.transforms as A
from tests.transforms.pictures import noise, vips

IMAGE = vips(noise())

CALLS = {
    "positional": (lambda: A.Flip()(IMAGE), TypeError, r"Flip takes its data by name: write transform\(image=image\)"),
    "positional in a group": (lambda: A.Compose([])(IMAGE), TypeError, "Compose takes its data by name"),
    "no image": (lambda: A.Flip()(mask=IMAGE), ValueError, r"no image was given, only \['mask'\]"),
    "array": (lambda: A.Flip()(image=noise()), TypeError, r"numpy array of shape \(41, 67, 3\).*new_from_array"),
    "tensor": (
        lambda: A.Compose([A.ToTensor(), A.Flip()])(image=IMAGE),
        TypeError,
        r"torch tensor of shape \(3, 41, 67\); expected a pyvips.Image: ToTensor comes last",
    ),
    "path": (lambda: A.Flip()(image="a.tif"), TypeError, r"of type str; expected .*new_from_file"),
    "mask": (lambda: A.Flip()(image=IMAGE, mask=noise()), TypeError, "mask is a numpy array"),
    "masks": (lambda: A.Flip()(image=IMAGE, masks=[IMAGE, 3]), TypeError, r"masks\[1\] is of type int"),
    "masks no list": (lambda: A.Flip()(image=IMAGE, masks=IMAGE), TypeError, "masks is of type Image; expected a list"),
    "boxes": (lambda: A.Flip()(image=IMAGE, bboxes=[]), ValueError, "bboxes are not supported"),
    "sizes": (
        lambda: A.Compose([])(image=IMAGE, mask=IMAGE.crop(0, 0, 9, 8)),
        ValueError,
        "image is 41 x 67, mask is 8 x 9",
    ),
    "complex": (lambda: A.ToTensor()(image=IMAGE.cast("complex")), TypeError, "format 'complex'"),
    "center crop": (
        lambda: A.CenterCrop(42, 10)(image=IMAGE),
        ValueError,
        "CenterCrop of height 42 and width 10 reaches outside of the image, which has height 41 and width 67.*CropOrPad",
    ),
    "random crop": (lambda: A.RandomCrop(10, 68)(image=IMAGE), ValueError, "height 10 and width 68 reaches outside"),
    "crop": (lambda: A.Crop(0, 0, 68, 1)(image=IMAGE), ValueError, "x_max=68.*reaches outside"),
    "grey stains": (lambda: A.HEDShift(p=1)(image=IMAGE[0]), ValueError, "the image has 1 channels, expected 3"),
    "hue of 5": (
        lambda: A.HueSaturationValue(p=1)(image=vips(noise(channels=5))),
        ValueError,
        "5 channels, expected 3",
    ),
    "mean": (lambda: A.Normalize([0, 0], [1, 1])(image=IMAGE), ValueError, "2 numbers and the image 3 channels"),
    "fill": (lambda: A.PadIfNeeded(value=[1, 2])(image=IMAGE), ValueError, r"\[1, 2\] has 2 entries and the image 3"),
    "hole": (
        lambda: A.CoarseDropout(max_height=50, p=1)(image=IMAGE),
        ValueError,
        "height 50 and the image has height 41",
    ),
    "all channels": (lambda: A.ChannelDropout((1, 3), p=1)(image=IMAGE), ValueError, "may leave no channel"),
    "result": (lambda: A.Compose([lambda **data: None])(image=IMAGE), TypeError, "returned NoneType; expected a dict"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_with_bad_data_say_so(case):
    call, error, message = CALLS[case]
    with pytest.raises(error, match=message):
        call()


MAKES = {
    "p": (lambda: A.Flip(p=1.5), ValueError, "p=1.5 of Flip; expected a probability from 0 to 1"),
    "p as text": (lambda: A.Compose([], p="1"), ValueError, "p='1' of Compose"),
    "dtype": (lambda: A.ToDtype("float32", scale=True), ValueError, r"""dtype='float32'; .*"float" \(float32\)"""),
    "size": (lambda: A.CropOrPad(0, 5), ValueError, "height=0; expected a positive integer, in pixels"),
    "float size": (lambda: A.Resize(5, 5.0), ValueError, "width=5.0"),
    "direction": (lambda: A.CropOrPad(5, 5, "center"), ValueError, "direction='center'; expected one of 'centre'"),
    "empty crop": (lambda: A.Crop(5, 0, 5, 1), ValueError, "empty region"),
    "least and multiple": (
        lambda: A.PadIfNeeded(pad_height_divisor=4),
        ValueError,
        "give one of min_height and pad_height_",
    ),
    "no least": (lambda: A.PadIfNeeded(min_width=None), ValueError, "neither; give one of min_width"),
    "position": (lambda: A.PadIfNeeded(position="left"), ValueError, "position='left'"),
    "border": (lambda: A.PadIfNeeded(border_mode=4), ValueError, "border_mode=4"),
    "kernel": (lambda: A.Resize(5, 5, 1), ValueError, "interpolation=1; expected one of 'nearest', 'linear'"),
    "scale limit": (lambda: A.RandomScale(1), ValueError, "expected above -1"),
    "max size": (lambda: A.LongestMaxSize([]), ValueError, "max_size="),
    "limit": (lambda: A.Rotate("90"), ValueError, "limit='90'; expected a finite number or a pair"),
    "interpolation": (lambda: A.Rotate(interpolation="linear"), ValueError, "'linear'; expected one of .*'bilinear'"),
    "scale": (lambda: A.Affine(scale=(0, 1)), ValueError, "expected factors above 0"),
    "axes": (lambda: A.Affine(shear={"z": 1}), ValueError, 'expected a dict with "x", "y" or both'),
    "shifts": (lambda: A.Affine(translate_px=1, translate_percent=1), ValueError, "exclude each other"),
    "part pixels": (lambda: A.Affine(translate_px=0.5), ValueError, "expected whole pixels"),
    "ratio": (lambda: A.Affine(scale={"x": (1, 2)}, keep_ratio=True), ValueError, "the same for x and y"),
    "sigma": (lambda: A.ElasticTransform(sigma=0), ValueError, "sigma above 0"),
    "side": (lambda: A.Blur((4, 8)), ValueError, "expected odd sides of at least 3"),
    "gamma": (lambda: A.RandomGamma(20), ValueError, "from -20 to 20; expected at least 1"),
    "alpha": (lambda: A.Sharpen(alpha=2), ValueError, "expected between 0 and 1"),
    "variance": (lambda: A.GaussNoise((-1, 4)), ValueError, "expected at least 0"),
    "std": (lambda: A.Normalize([0], [0]), ValueError, "std above 0"),
    "holes": (lambda: A.CoarseDropout(max_holes=0), ValueError, "max_holes=0"),
    "mixed holes": (lambda: A.CoarseDropout(max_height=0.5, min_height=3), ValueError, "both integers or"),
    "class": (lambda: A.Compose([A.Flip]), TypeError, "entry 0 of Compose is the class Flip"),
    "no transform": (lambda: A.Compose([A.Flip(), 3]), TypeError, "entry 1 of Compose is 3"),
    "no list": (lambda: A.Compose(A.Flip()), TypeError, r"Compose\(\[...\]\): got one of type Flip"),
    "boxes": (lambda: A.Compose([], bbox_params={"format": "coco"}), ValueError, "not supported; leave them out"),
    "targets": (lambda: A.Compose([], additional_targets={"a": "b"}), ValueError, "'a': 'b'; expected one of"),
    "no weight": (lambda: A.OneOf([A.Flip(p=0)]), ValueError, "give at least one transform with p above 0"),
    "too many": (lambda: A.SomeOf([A.Flip()], 2, replace=False), ValueError, "n=2 of SomeOf.*at most 1"),
    "one or none": (lambda: A.OneOrOther(A.Flip()), ValueError, "got 0; give first and second"),
    "boxes of lambda": (lambda: A.Lambda(bbox=max), ValueError, "not supported"),
    "lambda": (lambda: A.Lambda(image=3), TypeError, "image=3 of Lambda; expected a function"),
}


@pytest.mark.parametrize("case", MAKES)
def test_bad_arguments_are_refused_at_once(case):
    make, error, message = MAKES[case]
    with pytest.raises(error, match=message):
        make()


def test_masks_of_another_size_are_taken_if_asked_to():
    mask = vips(np.zeros((8, 9, 1), np.uint8))
    out = A.Compose([A.ToTensor()], is_check_shapes=False)(image=IMAGE, mask=mask)
    assert out["mask"].shape == (8, 9) and isinstance(out["image"], torch.Tensor)
