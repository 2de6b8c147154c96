"""Formats of pixels, and arguments that users give as a number or as a pair."""

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import pyvips

FULL_SCALE = {
    "uchar": 255.0,
    "char": 127.0,
    "ushort": 65535.0,
    "short": 32767.0,
    "uint": 4294967295.0,
    "int": 2147483647.0,
    "float": 1.0,
    "double": 1.0,
}
"""By format of libvips, the value that stands for full intensity."""

FLOATS = ("float", "double")

BORDERS = ("black", "copy", "repeat", "mirror", "white", "background")
"""Ways in which libvips makes pixels outside of an image."""

Fill = float | Sequence[float]
"""Value of new pixels in the image's own units: for all channels, or one each."""


def full_scale(image: pyvips.Image) -> float:
    """The value that stands for white. Raises TypeError for complex pixels."""
    if image.format not in FULL_SCALE:
        raise TypeError(f"the pixels of the image are of format {image.format!r}; expected one of {list(FULL_SCALE)}")
    return FULL_SCALE[image.format]


def as_format(image: pyvips.Image, pixel_format: str) -> pyvips.Image:
    """`image` in another format; for integers rounded and clipped, as libvips alone would cut off the fraction."""
    return image.cast(pixel_format) if pixel_format in FLOATS else image.rint().cast(pixel_format)


def as_colour(image: pyvips.Image, pixel_format: str) -> pyvips.Image:
    """As `as_format`, and floats clipped to 0..1."""
    image = image.clamp(min=0, max=1) if pixel_format in FLOATS else image
    return as_format(image, pixel_format)


def background(fill: Fill | None, image: pyvips.Image, default: float) -> list[float]:
    """`fill` as libvips wants it, `default` if it is None. Raises ValueError if it doesn't fit the channels."""
    if fill is None:
        return [default]
    values = list(fill) if isinstance(fill, Sequence) else [fill]
    if len(values) not in (1, image.bands):
        raise ValueError(
            f"the fill value {fill} has {len(values)} entries and the image {image.bands} channels; "
            "give one number, or one per channel"
        )
    return values


def interval(name: str, value: Any, low: float | None = None) -> tuple[float, float]:
    """A limit as (lowest, highest): a pair as it is, a number v as (-v, v), or as the range between `low` and v."""
    pair = [-value if low is None else low, value] if isinstance(value, int | float) else value
    if (
        isinstance(pair, str)
        or not isinstance(pair, Sequence)
        or len(pair) != 2
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in pair)
    ):
        raise ValueError(f"{name}={value!r}; expected a finite number or a pair (lowest, highest)")
    return min(pair), max(pair)


def check_range(name: str, value: Any, limits: tuple[float, float], lowest: float, highest: float = math.inf) -> None:
    """Raises ValueError if the interval `limits`, made of the argument `value`, leaves lowest..highest."""
    if limits[0] < lowest or limits[1] > highest:
        allowed = f"at least {lowest:g}" if highest == math.inf else f"between {lowest:g} and {highest:g}"
        raise ValueError(f"{name}={value!r} stands for values from {limits[0]:g} to {limits[1]:g}; expected {allowed}")


def check_size(**sizes: Any) -> None:
    """Raises ValueError for a size, in pixels, that is no positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}={size!r}; expected a positive integer, in pixels")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError if `value` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, choices))}")


def uniform(random: Random, limits: tuple[float, float]) -> float:
    """A number drawn evenly between the two limits."""
    return random.uniform(*limits)
