"""Changing the number of pixels. Masks take the nearest pixel, so that no new values come about."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

import pyvips

from widefield.transforms.base import Change, Transform
from widefield.transforms.values import Choice, Limit, Pixels, Within, interval

Kernel = Annotated[str, Choice(("nearest", "linear", "cubic", "mitchell", "lanczos2", "lanczos3"))]


@dataclass(frozen=True)
class Resize(Transform, p=1.0):
    """Resizes to a height and width; shrinking averages, as far as the kernel goes.

    Args:
        height, width: Size of the result, in pixels.
        interpolation: Kernel for images, of `pyvips.enums.Kernel`: "nearest", "linear", "cubic", "mitchell", "lanczos2",
            "lanczos3".

    Raises:
        ValueError: An argument out of range.
    """

    height: Annotated[int, Pixels()]
    width: Annotated[int, Pixels()]
    interpolation: Kernel = "linear"

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return _resize_to(self.height, self.width, self.interpolation)


@dataclass(frozen=True)
class RandomScale(Transform):
    """Scales both axes by one factor.

    Args:
        scale_limit: Range (lowest, highest) of the factor minus 1; a number v stands for (-v, v).
        interpolation: Kernel for images, as for `Resize`.

    Raises:
        ValueError: An argument out of range.
    """

    scale_limit: Annotated[Limit, Within()] = 0.1
    interpolation: Kernel = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if interval("scale_limit", self.scale_limit)[0] <= -1:
            raise ValueError(f"scale_limit={self.scale_limit!r}; expected above -1, as the factor is 1 more")

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return _scale(image, 1 + self.drawn(random, "scale_limit"), self.interpolation)


@dataclass(frozen=True)
class LongestMaxSize(Transform, p=1.0):
    """Resizes so that the longer side has a given length, with the aspect kept.

    Args:
        max_size: The length in pixels, or several of which one is drawn.
        interpolation: Kernel for images, as for `Resize`.

    Raises:
        ValueError: An argument out of range.
    """

    max_size: int | Sequence[int] = 1024
    interpolation: Kernel = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        _lengths(self.max_size)

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        length = random.choice(_lengths(self.max_size))
        return _scale(image, length / max(image.height, image.width), self.interpolation)


@dataclass(frozen=True)
class SmallestMaxSize(LongestMaxSize):
    """Resizes so that the shorter side has a given length; arguments and errors are those of `LongestMaxSize`."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        length = random.choice(_lengths(self.max_size))
        return _scale(image, length / min(image.height, image.width), self.interpolation)


def _lengths(max_size: int | Sequence[int]) -> list[int]:
    lengths = list(max_size) if isinstance(max_size, Sequence) else [max_size]
    if not lengths:
        raise ValueError(f"max_size={max_size!r}; expected a length in pixels, or a list of them")
    for length in lengths:
        Pixels().checked("max_size", length)
    return lengths


def _scale(image: pyvips.Image, factor: float, kernel: str) -> Change:
    height, width = (max(1, round(size * factor)) for size in (image.height, image.width))
    return _resize_to(height, width, kernel)


def _resize_to(height: int, width: int, kernel: str) -> Change:
    def resize(image: pyvips.Image, kernel: str) -> pyvips.Image:
        if (height, width) == (image.height, image.width):
            return image
        return image.resize(width / image.width, vscale=height / image.height, kernel=kernel)

    return Change(lambda image: resize(image, kernel), lambda mask: resize(mask, "nearest"))
