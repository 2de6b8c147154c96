"""Changes of colour and brightness. Floats are taken to be 0..1 and are clipped to it; masks stay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

import numpy as np
import pyvips

from widefield.transforms.base import Change, Transform
from widefield.transforms.reading import mean, shared
from widefield.transforms.values import Limit, Within, as_colour, as_format, full_scale

RGB_OF_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density in red, green and blue of haematoxylin, eosin and DAB (Ruifrok and Johnston, 2001)."""

DARKEST = 1e-6
"""Intensity that black counts as: its logarithm is finite, and the unit of the amounts of stain."""


@dataclass(frozen=True)
class RandomBrightnessContrast(Transform):
    """Multiplies by a contrast factor and adds a brightness.

    Args:
        brightness_limit: Range (lowest, highest) of what is added, as a fraction of full scale; a number v stands for (-v, v).
        contrast_limit: Range of the factor minus 1; a number v stands for (-v, v).
        brightness_by_max: False: the brightness is a fraction of the mean of the image instead, which is read for it.

    Raises:
        ValueError: An argument out of range.
    """

    brightness_limit: Annotated[Limit, Within()] = 0.2
    contrast_limit: Annotated[Limit, Within(-1)] = 0.2
    brightness_by_max: bool = True

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        factor = 1 + self.drawn(random, "contrast_limit")
        brightness = self.drawn(random, "brightness_limit")

        def adjust(image: pyvips.Image) -> pyvips.Image:
            added = brightness * (full_scale(image) if self.brightness_by_max else factor * mean(image))
            return as_colour(image.linear([factor], [added]), image.format)

        return Change(adjust)


@dataclass(frozen=True)
class RandomGamma(Transform):
    """Raises intensities, from 0 to 1, to a power.

    Args:
        gamma_limit: Range (lowest, highest) of the power in percent: 100 changes nothing, more darkens.
        eps: Without effect.

    Raises:
        ValueError: An argument out of range.
    """

    gamma_limit: Annotated[Sequence[float], Within(1)] = (80, 120)
    eps: None = None

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        power = self.drawn(random, "gamma_limit") / 100

        def darken(image: pyvips.Image) -> pyvips.Image:
            scale = full_scale(image)
            fraction = image.linear([1 / scale], [0]).clamp(min=0, max=1)
            return as_format((fraction**power).linear([scale], [0]), image.format)

        return Change(darken)


@dataclass(frozen=True)
class HueSaturationValue(Transform):
    """Shifts hue, saturation and value of RGB images, each from 0 to 255; the hue goes round.

    The shift is computed with 8 bits; other types add its effect to their own values. Of grey images only the value is shifted.

    Args:
        hue_shift_limit: Range (lowest, highest) of the shift; a number v stands for (-v, v).
        sat_shift_limit, val_shift_limit: The same for saturation and value.

    Raises:
        ValueError: An argument out of range. When called: an image that has neither 1 nor 3 channels.
    """

    hue_shift_limit: Annotated[Limit, Within(-255, 255)] = 20
    sat_shift_limit: Annotated[Limit, Within(-255, 255)] = 30
    val_shift_limit: Annotated[Limit, Within(-255, 255)] = 20

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        hue, saturation, value = (round(self.drawn(random, f"{name}_shift_limit")) for name in ("hue", "sat", "val"))

        def shift(image: pyvips.Image) -> pyvips.Image:
            scale = full_scale(image) / 255
            if image.bands == 1:
                return as_colour(image.linear([1], [value * scale]), image.format)
            _check_rgb(self, image)
            if image.format == "uchar":
                return _shift_hsv(image, hue, saturation, value)
            image = shared(image)
            before = as_format(image.linear([1 / scale], [0]), "uchar")
            # against the same way there and back with no shift, so that what it rounds is not part of the change
            change = _shift_hsv(before, hue, saturation, value) - _shift_hsv(before, 0, 0, 0)
            return as_colour(image + change * scale, image.format)

        return Change(shift)


@dataclass(frozen=True)
class HEDShift(Transform):
    """Changes the amounts of haematoxylin, eosin and DAB that would stain a slide like this (Tellez et al., 2018).

    Amounts are optical densities divided by that of black, from 0 for none to 1.

    Args:
        h_shift_limit: Range (lowest, highest) of what is added to haematoxylin; a number v stands for (-v, v).
        e_shift_limit, d_shift_limit: The same for eosin and DAB.

    Raises:
        ValueError: An argument out of range. When called: an image that has not 3 channels.
    """

    h_shift_limit: Annotated[Limit, Within()] = 0.03
    e_shift_limit: Annotated[Limit, Within()] = 0.03
    d_shift_limit: Annotated[Limit, Within()] = 0.03

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        added = [self.drawn(random, f"{stain}_shift_limit") for stain in "hed"]

        def stain(image: pyvips.Image) -> pyvips.Image:
            _check_rgb(self, image)
            scale = full_scale(image)
            # libvips' matrices multiply a column of bands from the left
            density = image.linear([1 / scale], [0]).clamp(min=DARKEST, max=1).log() / math.log(DARKEST)
            stains = density.recomb(np.linalg.inv(RGB_OF_HED).T.tolist()).clamp(min=0, max=math.inf)
            changed = stains.linear([1, 1, 1], added).recomb((RGB_OF_HED.T * math.log(DARKEST)).tolist())
            return as_colour(changed.exp().clamp(min=0, max=1) * scale, image.format)

        return Change(stain)


def _check_rgb(transform: Transform, image: pyvips.Image) -> None:
    if image.bands != 3:
        raise ValueError(
            f"{type(transform).__name__} is for RGB: the image has {image.bands} channels, expected 3; "
            "take them with image[0:3], or leave this transform out"
        )


def _shift_hsv(image: pyvips.Image, hue: int, saturation: int, value: int) -> pyvips.Image:
    """8-bit RGB with its hue, saturation and value shifted, each from 0 to 255."""
    levels = np.arange(256)
    tables = [(levels + hue) % 256, np.clip(levels + saturation, 0, 255), np.clip(levels + value, 0, 255)]
    table = pyvips.Image.new_from_array(np.stack(tables, axis=-1).astype(np.uint8)[None])
    hsv = image.copy(interpretation="srgb").sRGB2HSV()
    return hsv.maplut(table).copy(interpretation="hsv").HSV2sRGB().copy(interpretation=image.interpretation)
