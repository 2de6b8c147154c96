"""Flips and quarter turns, which move pixels and change none. Images and masks are moved alike."""

from dataclasses import dataclass
from random import Random

import pyvips

from widefield.transforms.base import Change, Transform, both


@dataclass(frozen=True)
class HorizontalFlip(Transform):
    """Swaps left and right."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(pyvips.Image.fliphor)


@dataclass(frozen=True)
class VerticalFlip(Transform):
    """Swaps top and bottom."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(pyvips.Image.flipver)


@dataclass(frozen=True)
class Flip(Transform):
    """Swaps left and right, or top and bottom, or both (a half turn), each as likely."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(random.choice((pyvips.Image.fliphor, pyvips.Image.flipver, pyvips.Image.rot180)))


@dataclass(frozen=True)
class Transpose(Transform):
    """Swaps rows and columns."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(lambda image: image.rot90().fliphor())


@dataclass(frozen=True)
class RandomRotate90(Transform):
    """Turns by 0, 90, 180 or 270 degrees, each as likely."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        angle = random.choice(("d0", "d90", "d180", "d270"))
        return both(lambda image: image.rot(angle))
