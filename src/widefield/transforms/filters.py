"""Blurring, sharpening, noise and holes. Types of pixels stay; floats are not clipped; masks stay, but for holes where asked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

import pyvips

from widefield.transforms.base import Change, Transform
from widefield.transforms.values import Fill, Limit, Within, as_format, background, full_scale, interval


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


@dataclass(frozen=True)
class CoarseDropout(Transform):
    """Fills rectangles at random places (cutout; DeVries and Taylor, 2017).

    Args:
        max_holes: Most rectangles.
        max_height, max_width: Their largest size: in pixels if integers, as a fraction of the image if floats.
        min_holes, min_height, min_width: The least, in the same units; None for as many and as large as the most.
        fill_value: Of filled pixels, in the image's own units, for all channels or one each.
        mask_fill_value: The same for masks; None leaves masks.

    Raises:
        ValueError: An argument out of range. When called: a rectangle larger than the image, or as many values as fit no image.
    """

    max_holes: int = 8
    max_height: float = 8
    max_width: float = 8
    min_holes: int | None = None
    min_height: float | None = None
    min_width: float | None = None
    fill_value: Fill = 0
    mask_fill_value: Fill | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (low, high) in self._limits().items():
            pixels = isinstance(low, int) and isinstance(high, int)
            fractions = name != "holes" and isinstance(low, float) and isinstance(high, float) and high < 1
            if not (pixels or fractions) or not 0 < low <= high:
                raise ValueError(
                    f"min_{name}={low!r} and max_{name}={high!r}; expected 0 < min <= max, both integers or, for "
                    "height and width, both fractions below 1"
                )

    def _limits(self) -> dict[str, tuple[float, float]]:
        pairs = {
            name: (getattr(self, f"min_{name}"), getattr(self, f"max_{name}")) for name in ("holes", "height", "width")
        }
        return {name: (high if low is None else low, high) for name, (low, high) in pairs.items()}

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        limits = self._limits()
        holes = [
            (
                _side(random, "height", limits["height"], image.height),
                _side(random, "width", limits["width"], image.width),
            )
            for _ in range(random.randint(*map(int, limits["holes"])))
        ]
        placed = [
            (random.randint(0, image.height - height), random.randint(0, image.width - width), height, width)
            for height, width in holes
        ]

        def fill(image: pyvips.Image, value: Fill) -> pyvips.Image:
            colour = background(value, image, 0)
            for y, x, height, width in placed:
                hole = (pyvips.Image.black(width, height) + colour).cast(image.format)
                image = image.insert(hole, x, y)
            return image

        mask_fill = self.mask_fill_value
        return Change(
            lambda image: fill(image, self.fill_value),
            None if mask_fill is None else lambda mask: fill(mask, mask_fill),
        )


@dataclass(frozen=True)
class ChannelDropout(Transform):
    """Fills whole channels.

    Args:
        channel_drop_range: (lowest, highest) number of channels.
        fill_value: Of filled channels, in the image's own units.

    Raises:
        ValueError: An argument out of range. When called: no channel of the image might be left.
    """

    channel_drop_range: Sequence[int] = (1, 1)
    fill_value: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.channel_drop_range) != 2 or not 1 <= self.channel_drop_range[0] <= self.channel_drop_range[1]:
            raise ValueError(f"channel_drop_range={self.channel_drop_range!r}; expected (lowest, highest), from 1 on")

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        lowest, highest = self.channel_drop_range
        if highest >= image.bands:
            raise ValueError(
                f"channel_drop_range={self.channel_drop_range!r} may leave no channel of the image, which has {image.bands}; "
                "drop fewer, or leave this transform out"
            )
        dropped = random.sample(range(image.bands), random.randint(lowest, highest))

        def drop(image: pyvips.Image) -> pyvips.Image:
            bands = [
                (image[band] * 0 + self.fill_value).cast(image.format) if band in dropped else image[band]
                for band in range(image.bands)
            ]
            return bands[0].bandjoin(bands[1:]).copy(interpretation=image.interpretation)

        return Change(drop)


def _side(random: Random, name: str, limits: tuple[float, float], size: int) -> int:
    """Height or width of a rectangle, in pixels."""
    low, high = limits
    side = (
        random.randint(int(low), int(high)) if isinstance(high, int) else max(1, int(size * random.uniform(low, high)))
    )
    if side > size:
        raise ValueError(
            f"CoarseDropout has rectangles of {name} {side} and the image has {name} {size}; give smaller ones, or fractions"
        )
    return side
