"""Formats of pixels, and arguments that users give as a number or as a pair."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


Limit = float | Sequence[float]
"""A range (lowest, highest), or a number that stands for one."""


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


class Mark(Protocol):
    """Limits of an argument of a transform: the metadata of its annotation, `Annotated[int, Pixels()]`."""

    def checked(self, name: str, value: Any) -> Any:
        """The value to keep. Raises ValueError for another than expected."""


@dataclass(frozen=True)
class Within:
    """A number or a pair that stands for a range, see `interval`, inside of `lowest` and `highest`."""

    lowest: float = -math.inf
    highest: float = math.inf
    low: float | None = None

    def checked(self, name: str, value: Any) -> Any:
        least, most = interval(name, value, self.low)
        if least < self.lowest or most > self.highest:
            lowest, highest = f"{self.lowest:g}", f"{self.highest:g}"
            allowed = f"at least {lowest}" if self.highest == math.inf else f"between {lowest} and {highest}"
            raise ValueError(f"{name}={value!r} stands for values from {least:g} to {most:g}; expected {allowed}")
        return value


@dataclass(frozen=True)
class Pixels:
    """A size in pixels."""

    def checked(self, name: str, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; expected a positive integer, in pixels")
        return value


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def checked(self, name: str, value: Any) -> Any:
        if value not in self.names:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, self.names))}")
        return value
