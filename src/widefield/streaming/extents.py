"""The inputs that an op reads, along one axis.

Everything the engine knows about geometry is here, in plain integers. Rows and columns are treated alike and apart, so each
op carries one `AxisMap` for its rows and one for its columns. An `AxisMap` answers four questions about an op that turns
`n_in` positions into `n_out`:

- `ready(r)`: how many outputs can be computed once the first `r` inputs are there (all of them when `r == n_in`);
- `first(o)`: the first input that output `o` *or any later one* reads, so the first that must still be kept;
- `stop(o)`: one past the last input that the outputs before `o` read;
- `span(o0, o1)`: what to read, and how much padding to add, to compute exactly the outputs `[o0, o1)`.

All are non-decreasing, which is what makes a scan possible. Positions are not checked: callers stay inside `[0, n]`.
`ready_all`, `first_all` and `stop_all` answer for many positions at once. `receptive_field` says what would be read if the axis
went on beyond its ends (see `receptive_field`), None for what counts for nothing there. `rules.rolled` and `rules.flipped` have
maps of their own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from widefield.streaming.receptive_field import IDENTITY, ReceptiveField

Positions = npt.NDArray[np.int64]


def clamp(value: int, low: int, high: int) -> int:
    """`value` moved into `[low, high]`."""
    return max(low, min(value, high))


@dataclass(frozen=True, slots=True)
class Span:
    """One computation along one axis: outputs `[start, stop)` from inputs `[first, last)`.

    `low` and `high` are the padding positions to add before and after what was read: non-zero only where a window crosses
    the border of the whole image.
    """

    start: int
    stop: int
    first: int
    last: int
    low: int = 0
    high: int = 0

    @property
    def size(self) -> int:
        """Number of outputs."""
        return self.stop - self.start


class AxisMap(Protocol):
    """See the module's docstring."""

    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def receptive_field(self) -> ReceptiveField | None: ...
    def ready(self, r: int) -> int: ...
    def first(self, o: int) -> int: ...
    def stop(self, o: int) -> int: ...
    def span(self, o0: int, o1: int) -> Span: ...

    def ready_all(self, r: Positions) -> Positions: ...
    def first_all(self, o: Positions) -> Positions: ...
    def stop_all(self, o: Positions) -> Positions: ...


class _OneByOne:
    """Maps that have no closed form for many positions, and whose windows do not reach into padding."""

    def span(self: AxisMap, o0: int, o1: int) -> Span:
        return Span(o0, o1, self.first(o0), self.stop(o1))

    def ready_all(self: AxisMap, r: Positions) -> Positions:
        return _each(self.ready, r)

    def first_all(self: AxisMap, o: Positions) -> Positions:
        return _each(self.first, o)

    def stop_all(self: AxisMap, o: Positions) -> Positions:
        return _each(self.stop, o)


class AllAtOnce:
    """Maps that answer for one position as for many."""

    def ready(self: AxisMap, r: int) -> int:
        return int(self.ready_all(np.array([r]))[0])

    def first(self: AxisMap, o: int) -> int:
        return int(self.first_all(np.array([o]))[0])

    def stop(self: AxisMap, o: int) -> int:
        return int(self.stop_all(np.array([o]))[0])


def _each(function: Callable[[int], int], positions: Positions) -> Positions:
    different, where = np.unique(positions, return_inverse=True)
    results = np.array([function(n) for n in different.tolist()], dtype=np.int64)
    return results[where].reshape(positions.shape)


@dataclass(frozen=True, slots=True)
class Window:
    """Output `o` reads `[o * stride - padding, o * stride - padding + extent)`; what lies outside of the axis is padding.

    Convolutions and poolings (`extent = (kernel - 1) * dilation + 1`), constant padding and cropping (`extent` 1, the
    padding before as `padding`, negative to crop), strided slices, and space-to-depth (`extent == stride`).
    """

    n_in: int
    n_out: int
    extent: int = 1
    stride: int = 1
    padding: int = 0

    @property
    def receptive_field(self) -> ReceptiveField:
        return ReceptiveField(self.stride, 1, -self.padding, self.extent - 1 - self.padding)

    def ready(self, r: int) -> int:
        if r <= 0:
            return 0
        if r >= self.n_in:
            return self.n_out
        return clamp((r + self.padding - self.extent) // self.stride + 1, 0, self.n_out)

    def ready_all(self, r: Positions) -> Positions:
        ready = (r + (self.padding - self.extent)) // self.stride + 1
        ready = np.minimum(np.maximum(ready, 0), self.n_out)
        ready[r >= self.n_in] = self.n_out
        ready[r <= 0] = 0
        return ready

    def first_all(self, o: Positions) -> Positions:
        first = np.minimum(np.maximum(o * self.stride - self.padding, 0), self.n_in)
        first[o >= self.n_out] = self.n_in
        return first

    def stop_all(self, o: Positions) -> Positions:
        stop = np.minimum(np.maximum((o - 1) * self.stride - self.padding + self.extent, 0), self.n_in)
        stop[o <= 0] = 0
        return stop

    def first(self, o: int) -> int:
        return self.n_in if o >= self.n_out else clamp(o * self.stride - self.padding, 0, self.n_in)

    def stop(self, o: int) -> int:
        return 0 if o <= 0 else clamp((o - 1) * self.stride - self.padding + self.extent, 0, self.n_in)

    def span(self, o0: int, o1: int) -> Span:
        begin = o0 * self.stride - self.padding
        end = (o1 - 1) * self.stride - self.padding + self.extent
        low = clamp(-begin, 0, end - begin)
        high = clamp(end - self.n_in, 0, end - begin)
        first = clamp(begin, 0, self.n_in)
        return Span(o0, o1, first, max(first, clamp(end, 0, self.n_in)), low, high)


def identity(n: int) -> Window:
    """Output `o` reads input `o`: every pointwise op."""
    return Window(n, n)


@dataclass(frozen=True)
class Transposed(_OneByOne):
    """Input `i` contributes to outputs `[i * stride - padding, i * stride - padding + extent)`.

    Transposed convolutions, and repetition by a whole factor (`extent == up`): nearest upsampling, depth-to-space. An output that
    no input reaches (between the windows where `up > extent`, or behind the last one) counts as read from the input before it,
    so that no step reads nothing.
    """

    n_in: int
    n_out: int
    extent: int
    up: int
    padding: int = 0
    stride: int = 1

    @property
    def receptive_field(self) -> ReceptiveField:
        extent = max(self.extent, self.up)  # a gap after a window counts as part of it: all outputs read something
        return ReceptiveField(1, self.up, self.padding - extent + 1, self.padding)

    def ready(self, r: int) -> int:
        if r <= 0:
            return 0
        if r >= self.n_in:
            return self.n_out
        return clamp(r * self.up - self.padding, 0, self.n_out)

    def first(self, o: int) -> int:
        if o >= self.n_out:
            return self.n_in
        extent = max(self.extent, self.up)
        return clamp(-((extent - 1 - o - self.padding) // self.up), 0, self.n_in - 1)

    def stop(self, o: int) -> int:
        return 0 if o <= 0 else clamp((o - 1 + self.padding) // self.up + 1, 0, self.n_in)


def repeat(n: int, factor: int) -> Transposed:
    """Output `o` reads input `o // factor`."""
    return Transposed(n, n * factor, factor, factor)


@dataclass(frozen=True)
class BorderPad(_OneByOne):
    """Padding with what stands near the border: `reflect` (without the border itself) or `replicate`.

    `before` and `after` are the positions added at either end (negative to crop). Output `o` reads input `source(o)`.
    """

    n_in: int
    before: int
    after: int
    reflect: bool
    stride: int = 1

    @property
    def n_out(self) -> int:
        return self.n_in + self.before + self.after

    @property
    def receptive_field(self) -> ReceptiveField:
        return ReceptiveField(1, 1, -self.before, -self.before)

    def source(self, o: int) -> int:
        i = o - self.before
        if not self.reflect:
            return clamp(i, 0, self.n_in - 1)
        return -i if i < 0 else 2 * (self.n_in - 1) - i if i >= self.n_in else i

    def ready(self, r: int) -> int:
        if r >= self.n_in:
            return self.n_out
        if r <= 0 or (self.reflect and r <= self.before):  # the first output is the reflection of input `before`
            return 0
        return clamp(r + self.before, 0, self.n_out)

    def first(self, o: int) -> int:
        if o >= self.n_out:
            return self.n_in
        kept_for_the_end = self.n_in - 1 - max(self.after, 0) if self.reflect else self.n_in - 1
        return clamp(o - self.before, 0, kept_for_the_end)

    def stop(self, o: int) -> int:
        if o <= 0:
            return 0
        last = o - 1 - self.before
        if self.reflect and self.before > 0:
            last = max(last, self.before)
        return clamp(last + 1, 1, self.n_in)


def cell(i: int, size: int, count: int) -> tuple[int, int]:
    """The positions [low, high) of cell `i`, of `count` cells of adaptive pooling, which may overlap."""
    return i * size // count, -(-(i + 1) * size // count)


@dataclass(frozen=True)
class AdaptiveWindow(_OneByOne):
    """Output `o` reads the positions of its `cell`."""

    n_in: int
    n_out: int

    @property
    def stride(self) -> int:
        return max(1, self.n_in // self.n_out)

    @property
    def receptive_field(self) -> ReceptiveField:
        scale = Fraction(self.n_in, self.n_out)
        return ReceptiveField(scale.numerator, scale.denominator, 1 - scale.denominator, scale.numerator - 1)

    def ready(self, r: int) -> int:
        return clamp(r * self.n_out // self.n_in, 0, self.n_out)

    def first(self, o: int) -> int:
        return self.n_in if o >= self.n_out else cell(o, self.n_in, self.n_out)[0]

    def stop(self, o: int) -> int:
        return 0 if o <= 0 else cell(o - 1, self.n_in, self.n_out)[1]


@dataclass(frozen=True)
class Resample(_OneByOne):
    """Interpolation: output `o` is a weighted sum of the inputs around `source(o)`.

    `mode` is "linear" or "cubic", with `scale` input positions per output position and the source position of PyTorch's
    `area_pixel_compute_source_index`; or "nearest" or "nearest-exact", without rounding errors. With `antialias` the kernel of
    "linear" or "cubic" is as much wider as positions become fewer.
    """

    n_in: int
    n_out: int
    scale: float
    mode: str
    align_corners: bool = False
    antialias: bool = False

    @property
    def stride(self) -> int:
        return max(1, int(self.scale))

    @property
    def receptive_field(self) -> ReceptiveField:
        """Inputs less than 1 (linear) or 2 (cubic) away from the source position; the nearest one otherwise."""
        scale = Fraction(self.scale).limit_denominator(1 << 20) or Fraction(self.n_in)  # 0: corners aligned, one output
        num, den = 2 * scale.numerator, 2 * scale.denominator
        half = scale.numerator  # source positions are num * o / den + half / den - 1 / 2, but for aligned corners
        if self.mode.startswith("nearest"):
            shift = half if self.mode == "nearest-exact" else 0
            return ReceptiveField(num, den, shift - den + 1, shift)
        shift = 0 if self.align_corners else half - scale.denominator
        distance = int(den * Fraction(self.support).limit_denominator(1 << 20))
        return ReceptiveField(num, den, shift - distance + 1, shift + distance - 1)

    @property
    def support(self) -> float:
        """Half the width of the kernel, in inputs."""
        return (1 if self.mode == "linear" else 2) * (max(self.scale, 1.0) if self.antialias else 1.0)

    def taps(self, o: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The inputs that output `o` reads (clamped to the axis) and their weights."""
        last = self.n_in - 1
        if self.antialias:
            return self._antialiased(o)
        if self.mode.startswith("nearest"):
            half = int(self.mode == "nearest-exact")
            by_sizes = self.scale == self.n_in / self.n_out
            at = (2 * o + half) * self.n_in // (2 * self.n_out) if by_sizes else int((o + half / 2) * self.scale)
            return (min(at, last),), (1.0,)
        source = o * self.scale if self.align_corners else (o + 0.5) * self.scale - 0.5
        if self.mode == "linear":
            source = max(source, 0.0)
        at = int(np.float32(source) // 1)  # PyTorch rounds so for float64 maps too
        part = max(0.0, min(source - at, 1.0))
        if self.mode == "linear":
            at = min(at, last)
            return (at, min(at + 1, last)), (1.0 - part, part)
        weights = (cubic(part + 1.0), cubic(part), cubic(1.0 - part), cubic(2.0 - part))
        return tuple(clamp(at + k, 0, last) for k in (-1, 0, 1, 2)), weights

    def _antialiased(self, o: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """As PyTorch's `_compute_indices_min_size_weights_aa`: as many inputs for each output, some with the weight 0."""
        middle = self.scale * (o + 0.5)
        first, stop = max(int(middle - self.support + 0.5), 0), min(int(middle + self.support + 0.5), self.n_in)
        wide = max(self.scale, 1.0)
        distances = [abs(i - middle + 0.5) / wide for i in range(first, stop)]
        weights = [max(0.0, 1.0 - d) if self.mode == "linear" else cubic(d, -0.5) for d in distances]
        total, most = sum(weights), 2 * int(self.support + 1) + 1
        weights = [weight / total for weight in weights] + [0.0] * (most - len(weights))
        return tuple(min(first + k, stop - 1) for k in range(most)), tuple(weights)

    def ready(self, r: int) -> int:
        if r >= self.n_in:
            return self.n_out
        low, high = 0, self.n_out  # the first output that reads beyond r, by bisection: the last tap never decreases
        while low < high:
            middle = (low + high) // 2
            if self.taps(middle)[0][-1] >= r:
                high = middle
            else:
                low = middle + 1
        return low

    def first(self, o: int) -> int:
        return self.n_in if o >= self.n_out else self.taps(o)[0][0]

    def stop(self, o: int) -> int:
        return 0 if o <= 0 else self.taps(o - 1)[0][-1] + 1


@dataclass(frozen=True)
class Sampled(_OneByOne):
    """Output `o` reads inputs near a line: from `o * scale + low` to `o * scale + high`, both rounded down.

    What lies outside of the axis is padding, but for the input next to it, which every output reads.
    """

    n_in: int
    n_out: int
    scale: float
    low: float
    high: float

    @property
    def stride(self) -> int:
        return max(1, int(self.scale))

    @property
    def receptive_field(self) -> ReceptiveField:
        scale, low, high = (Fraction(x).limit_denominator(1 << 10) for x in (self.scale, self.low, self.high))
        den = math.lcm(scale.denominator, low.denominator, high.denominator)
        ends = (low * den - den + 1, high * den)  # both are rounded down
        return ReceptiveField(int(scale * den) or self.n_in * den, den, *map(int, ends))

    @cached_property
    def _reads(self) -> tuple[Positions, Positions]:
        """The first input that each output reads, and one past the last."""
        line = np.arange(self.n_out) * self.scale
        first, last = (np.floor(line + end).astype(np.int64).clip(0, self.n_in - 1) for end in (self.low, self.high))
        return first, last + 1

    def ready(self, r: int) -> int:
        return self.n_out if r >= self.n_in else int(np.searchsorted(self._reads[1], r, side="right"))

    def first(self, o: int) -> int:
        return self.n_in if o >= self.n_out else int(self._reads[0][o])

    def stop(self, o: int) -> int:
        return 0 if o <= 0 else int(self._reads[1][o - 1])

    def span(self, o0: int, o1: int) -> Span:
        begin, end = math.floor(o0 * self.scale + self.low), math.floor((o1 - 1) * self.scale + self.high) + 1
        return Span(o0, o1, self.first(o0), self.stop(o1), max(0, -begin), max(0, end - self.n_in))


@dataclass(frozen=True)
class Piece(_OneByOne):
    """Output `o` is input `o - offset`: of one of several maps that are joined along an axis.

    Outputs before and after it read nothing of it, and do not wait for it.
    """

    n_in: int
    n_out: int
    offset: int
    stride: int = 1

    @property
    def receptive_field(self) -> ReceptiveField | None:
        """None for some rows or columns that are joined to another map."""
        return None if 2 * self.n_in < self.n_out else IDENTITY

    def ready(self, r: int) -> int:
        return self.n_out if r >= self.n_in else self.offset + max(r, 0)

    def first(self, o: int) -> int:
        return clamp(o - self.offset, 0, self.n_in)

    def stop(self, o: int) -> int:
        return clamp(o - self.offset, 0, self.n_in)


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel; PyTorch's bicubic interpolation has a = -0.75, with antialiasing -0.5."""
    x = distance
    if x <= 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return ((x - 5.0) * x + 8.0) * x * a - 4.0 * a if x < 2.0 else 0.0
