"""Blurring, sharpening and noise. Types of pixels stay; floats are not clipped; masks stay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

import pyvips

from widefield.transforms.base import Change, Transform
from widefield.transforms.values import Limit, Within, as_format, full_scale, interval


@dataclass(frozen=True)
class Blur(Transform):
    """Means over a square of odd side.

    Args:
        blur_limit: Range (lowest, highest) of the side in pixels, drawn in steps of 2; a number v stands for (3, v).

    Raises:
        ValueError: An argument out of range.
    """

    blur_limit: int | Sequence[int] = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        _sides(self.blur_limit)

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        side = random.choice(_sides(self.blur_limit))
        box = pyvips.Image.new_from_list([[1] * side], scale=side)

        def blur(image: pyvips.Image) -> pyvips.Image:
            return as_format(image.convsep(box, precision=_precision(image)), image.format)

        return Change(blur)


@dataclass(frozen=True)
class MedianBlur(Blur):
    """Medians over a square of odd side, per channel; arguments and errors are those of `Blur`."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        side = random.choice(_sides(self.blur_limit))
        return Change(lambda image: image.median(side))


@dataclass(frozen=True)
class GaussianBlur(Transform):
    """Smooths with a Gaussian.

    Args:
        sigma_limit: Range (lowest, highest) of its standard deviation in pixels; a number v stands for (0, v). The default does
            nothing.
        min_amplitude: The Gaussian is cut off where it falls below this fraction of its peak.

    Raises:
        ValueError: An argument out of range.
    """

    sigma_limit: Annotated[Limit, Within(0, 1000, low=0)] = 0
    min_amplitude: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.001 <= self.min_amplitude <= 1:
            raise ValueError(f"min_amplitude={self.min_amplitude!r}; expected a fraction from 0.001 to 1")

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        sigma = self.drawn(random, "sigma_limit")

        def blur(image: pyvips.Image) -> pyvips.Image:
            smooth = image.gaussblur(sigma, min_ampl=self.min_amplitude, precision=_precision(image))
            return as_format(smooth, image.format)

        return Change(blur)


@dataclass(frozen=True)
class Sharpen(Transform):
    """Mixes the image with one whose differences to the 8 neighbours were added.

    Args:
        alpha: Range (lowest, highest) of the share of the sharpened image, from 0 to 1; a number v stands for (0, v).
        lightness: Range of the factor of the pixel itself in it: 1 keeps the brightness; a number v stands for (0, v).

    Raises:
        ValueError: An argument out of range.
    """

    alpha: Annotated[Limit, Within(0, 1, low=0)] = (0.2, 0.5)
    lightness: Annotated[Limit, Within(0, low=0)] = (0.5, 1.0)

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        share = self.drawn(random, "alpha")
        lightness = self.drawn(random, "lightness")
        middle, around = 1 - share + share * (8 + lightness), -share
        kernel = pyvips.Image.new_from_list([[around] * 3, [around, middle, around], [around] * 3])
        return Change(lambda image: as_format(image.conv(kernel, precision="float"), image.format))


@dataclass(frozen=True)
class GaussNoise(Transform):
    """Adds Gaussian noise.

    Args:
        var_limit: Range (lowest, highest) of its variance, for values from 0 to 255 (scaled for other types); a number v stands
            for (0, v).
        mean: Its mean, for values from 0 to 255.
        per_channel: Draw it for each channel; otherwise all channels get the same.

    Raises:
        ValueError: An argument out of range.
    """

    var_limit: Annotated[Limit, Within(0, low=0)] = (10.0, 50.0)
    mean: float = 0
    per_channel: bool = True

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        sigma = math.sqrt(self.drawn(random, "var_limit"))
        seeds = [random.randrange(2**31) for _ in range(image.bands if self.per_channel else 1)]

        def add_noise(image: pyvips.Image) -> pyvips.Image:
            scale = full_scale(image) / 255
            size = image.width, image.height
            bands = [
                pyvips.Image.gaussnoise(*size, sigma=sigma * scale, mean=self.mean * scale, seed=seed) for seed in seeds
            ]
            return as_format(image + bands[0].bandjoin(bands[1:]), image.format)

        return Change(add_noise)


def _sides(blur_limit: int | Sequence[int]) -> list[int]:
    lowest, highest = interval("blur_limit", blur_limit, low=3)
    if lowest != int(lowest) or lowest < 3 or lowest % 2 == 0:
        raise ValueError(f"blur_limit={blur_limit!r}; expected odd sides of at least 3 pixels")
    return list(range(int(lowest), int(highest) + 1, 2))


def _precision(image: pyvips.Image) -> str:
    """Integers of 8 bits are convolved as such, which is fast; more bits would not fit."""
    return "integer" if image.format == "uchar" else "float"
