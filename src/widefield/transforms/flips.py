"""Flips and quarter turns, which move pixels and change none. Images and masks are moved alike."""

from dataclasses import dataclass
from random import Random

import pyvips

from widefield.transforms.base import Change, Transform, both


@dataclass(frozen=True)
class HorizontalFlip(Transform):
    """Swaps left and right.

    Args:
        always_apply: Apply it whatever `p` is.
        p: Probability that it is applied.
    """

    always_apply: bool = False
    p: float = 0.5

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(_left_right)


@dataclass(frozen=True)
class VerticalFlip(Transform):
    """Swaps top and bottom.

    Args:
        always_apply: Apply it whatever `p` is.
        p: Probability that it is applied.
    """

    always_apply: bool = False
    p: float = 0.5

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(_top_bottom)


@dataclass(frozen=True)
class Flip(Transform):
    """Swaps left and right, or top and bottom, or both (a half turn), each as likely.

    Args:
        always_apply: Apply it whatever `p` is.
        p: Probability that it is applied.
    """

    always_apply: bool = False
    p: float = 0.5

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(random.choice((_left_right, _top_bottom, _half_turn)))


@dataclass(frozen=True)
class Transpose(Transform):
    """Swaps rows and columns.

    Args:
        always_apply: Apply it whatever `p` is.
        p: Probability that it is applied.
    """

    always_apply: bool = False
    p: float = 0.5

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return both(lambda image: image.rot90().fliphor())


@dataclass(frozen=True)
class RandomRotate90(Transform):
    """Turns by 0, 90, 180 or 270 degrees, each as likely.

    Args:
        always_apply: Apply it whatever `p` is.
        p: Probability that it is applied.
    """

    always_apply: bool = False
    p: float = 0.5

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        angle = random.choice(("d0", "d90", "d180", "d270"))
        return both(lambda image: image.rot(angle))


def _left_right(image: pyvips.Image) -> pyvips.Image:
    return image.fliphor()


def _top_bottom(image: pyvips.Image) -> pyvips.Image:
    return image.flipver()


def _half_turn(image: pyvips.Image) -> pyvips.Image:
    return image.rot180()
