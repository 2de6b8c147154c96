"""Transforms of the user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pyvips

from widefield.transforms.base import Change, Transform


@dataclass(frozen=True)
class NoOp(Transform):
    """Does nothing; an alternative within `OneOf`.

    Args:
        always_apply: Without effect.
        p: Its weight within `OneOf` and `SomeOf`.
    """

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return Change(_same)


@dataclass(frozen=True)
class Lambda(Transform, p=1.0):
    """Applies functions of the user's.

    Give functions with a name, not `lambda`, to a `DataLoader` that starts workers by spawning: they have to pickle.

    Args:
        image: Called with the pyvips image, returns one; None leaves images.
        mask: The same for masks.
        keypoint: Not supported; only None.
        bbox: Not supported; only None.
        name: Shown by `repr`.

    Raises:
        TypeError: What should be a function is none.
        ValueError: An argument out of range, or a function for boxes or keypoints.
    """

    image: Callable[[pyvips.Image], Any] | None = None
    mask: Callable[[pyvips.Image], Any] | None = None
    keypoint: None = None
    bbox: None = None
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keypoint is not None or self.bbox is not None:
            raise ValueError("keypoint and bbox of Lambda are not supported; leave them out, and give masks instead")
        for name, function in (("image", self.image), ("mask", self.mask)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}={function!r} of Lambda; expected a function of one pyvips image")

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return Change(self.image or _same, self.mask)


def _same(image: pyvips.Image) -> pyvips.Image:
    return image
