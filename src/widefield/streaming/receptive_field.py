"""The inputs that an op would read if the image went on beyond its borders: one axis, plain integers.

An `AxisMap` (`extents`) stops at the border of the whole image; its `receptive_field` does not. For a tile cut out of a larger
image, or for a receptive field, what counts is where the windows would lie without borders: a straight line for every op.
"""

from dataclasses import dataclass
from typing import NamedTuple


class ReceptiveField(NamedTuple):
    """Output `o` reads the inputs from `(num * o + low) / den`, rounded up, to `(num * o + high) / den`, rounded down."""

    num: int
    den: int
    low: int
    high: int

    def start_after(self, i: int) -> int:
        """The first output that reads no input before `i`."""
        return (self.den * (i - 1) - self.low) // self.num + 1

    def stop_before(self, i: int) -> int:
        """One past the last output that reads no input from `i` on."""
        return -((self.high - self.den * i) // self.num)


IDENTITY = ReceptiveField(1, 1, 0, 0)


@dataclass(frozen=True, slots=True)
class Cells:
    """Entries of a map, and the places in the image that they look at: the middle of each one's receptive field.

    That of entry (j, i) is the position `origin + stride * (j, i)`, counted in pixels from the middle of the first pixel of the
    image. It may lie beyond the border, where a network pads.

    Attributes:
        size: (rows, columns) of the map.
        origin: (y, x) of the first entry.
        stride: (down, across), the distance of two entries.
    """

    size: tuple[int, int]
    origin: tuple[float, float]
    stride: tuple[float, float]
