"""Leaving out parts of the image."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pyvips

from widefield.transforms.base import Change, Transform
from widefield.transforms.values import Fill, background


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
