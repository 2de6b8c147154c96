"""The inputs that an op would read if the image went on beyond its borders: one axis, plain integers.

An `AxisMap` stops at the border of the whole image. For a tile cut out of a larger image, or for a receptive field, what counts
is where the windows would lie without borders, and that is a straight line for every op.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from widefield.streaming.extents import (
    AdaptiveWindow,
    AxisMap,
    Behind,
    BorderPad,
    Mirrored,
    Piece,
    Resample,
    Rolled,
    Sampled,
    Transposed,
    Window,
)


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


def receptive_field_of(axis: AxisMap) -> ReceptiveField:
    """The receptive field of an op along an axis. Padding by reflection or repetition reads what lies beyond the border instead."""
    match axis:
        case Rolled():
            return receptive_field_of(axis.inner)
        case Mirrored():
            inner = receptive_field_of(axis.inner)
            both = inner.den * (axis.n_in - 1) - inner.num * (axis.n_out - 1)
            return ReceptiveField(inner.num, inner.den, both - inner.high, both - inner.low)
        case Behind() | Piece():  # the same rows again, one turn later; for joined maps see `layers`
            return IDENTITY
        case Window():
            return ReceptiveField(axis.stride, 1, -axis.padding, axis.extent - 1 - axis.padding)
        case Transposed():
            extent = max(axis.extent, axis.up)  # a gap after a window counts as part of it: all outputs read something
            return ReceptiveField(1, axis.up, axis.padding - extent + 1, axis.padding)
        case BorderPad():
            return ReceptiveField(1, 1, -axis.before, -axis.before)
        case AdaptiveWindow():
            scale = Fraction(axis.n_in, axis.n_out)
            return ReceptiveField(scale.numerator, scale.denominator, 1 - scale.denominator, scale.numerator - 1)
        case Resample():
            return _resampling(axis)
        case Sampled():
            scale, low, high = (Fraction(x).limit_denominator(1 << 10) for x in (axis.scale, axis.low, axis.high))
            den = math.lcm(scale.denominator, low.denominator, high.denominator)
            ends = (low * den - den + 1, high * den)  # both are rounded down
            return ReceptiveField(int(scale * den) or axis.n_in * den, den, *map(int, ends))
    raise TypeError(f"no receptive field is known of {type(axis).__name__}")


def _resampling(axis: Resample) -> ReceptiveField:
    """Inputs less than 1 (linear) or 2 (cubic) away from the source position; the nearest one otherwise."""
    scale = Fraction(axis.scale).limit_denominator(1 << 20) or Fraction(axis.n_in)  # 0: corners aligned, and one output
    num, den = 2 * scale.numerator, 2 * scale.denominator
    half = scale.numerator  # source positions are num * o / den + half / den - 1 / 2, but for aligned corners
    if axis.mode.startswith("nearest"):
        shift = half if axis.mode == "nearest-exact" else 0
        return ReceptiveField(num, den, shift - den + 1, shift)
    shift = 0 if axis.align_corners else half - scale.denominator
    distance = int(den * Fraction(axis.support).limit_denominator(1 << 20))
    return ReceptiveField(num, den, shift - distance + 1, shift + distance - 1)
