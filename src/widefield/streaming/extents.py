"""The inputs that an op reads, along one axis.

Everything the engine knows about geometry is here, in plain integers. Rows and columns are treated alike and apart, so each
op carries one `AxisMap` for its rows and one for its columns. An `AxisMap` answers four questions about an op that turns
`n_in` positions into `n_out`:

- `ready(r)`: how many outputs can be computed once the first `r` inputs are there (all of them when `r == n_in`);
- `first(o)`: the first input that output `o` *or any later one* reads, so the first that must still be kept;
- `stop(o)`: one past the last input that the outputs before `o` read;
- `span(o0, o1)`: what to read, and how much padding to add, to compute exactly the outputs `[o0, o1)`.

All are non-decreasing, which is what makes a scan possible. Positions are not checked: callers stay inside `[0, n]`.
`ready_all`, `first_all` and `stop_all` answer for many positions at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

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
    def ready(self, r: int) -> int: ...
    def first(self, o: int) -> int: ...
    def stop(self, o: int) -> int: ...
    def span(self, o0: int, o1: int) -> Span: ...

    def ready_all(self, r: Positions) -> Positions: ...
    def first_all(self, o: Positions) -> Positions: ...
    def stop_all(self, o: Positions) -> Positions: ...


class _OneByOne:
    """`ready_all`, `first_all` and `stop_all` of maps that have no closed form for many positions."""

    def ready_all(self: AxisMap, r: Positions) -> Positions:
        return _each(self.ready, r)

    def first_all(self: AxisMap, o: Positions) -> Positions:
        return _each(self.first, o)

    def stop_all(self: AxisMap, o: Positions) -> Positions:
        return _each(self.stop, o)


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

    def span(self, o0: int, o1: int) -> Span:
        return Span(o0, o1, self.first(o0), self.stop(o1))


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

    def span(self, o0: int, o1: int) -> Span:
        return Span(o0, o1, self.first(o0), self.stop(o1))


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

    def ready(self, r: int) -> int:
        return clamp(r * self.n_out // self.n_in, 0, self.n_out)

    def first(self, o: int) -> int:
        return self.n_in if o >= self.n_out else cell(o, self.n_in, self.n_out)[0]

    def stop(self, o: int) -> int:
        return 0 if o <= 0 else cell(o - 1, self.n_in, self.n_out)[1]

    def span(self, o0: int, o1: int) -> Span:
        return Span(o0, o1, self.first(o0), self.stop(o1))


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

    def span(self, o0: int, o1: int) -> Span:
        return Span(o0, o1, self.first(o0), self.stop(o1))


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

    def ready(self, r: int) -> int:
        return self.n_out if r >= self.n_in else self.offset + max(r, 0)

    def first(self, o: int) -> int:
        return clamp(o - self.offset, 0, self.n_in)

    def stop(self, o: int) -> int:
        return clamp(o - self.offset, 0, self.n_in)

    def span(self, o0: int, o1: int) -> Span:
        return Span(o0, o1, self.first(o0), self.stop(o1))


@dataclass(frozen=True)
class Rolled:
    """`inner` along an axis that is a circle: inputs come from `begin_in` on, outputs from `begin` on, and so round.

    Outputs before `begin` come last; for them some inputs are read a second time, as if they followed once more after all
    others (`n_in` counts them). A negative `begin_in` counts back from the end: what stands before input 0 comes first, and is
    not read until the end. It must be that `inner.first(begin) >= begin_in`.
    """

    inner: AxisMap
    begin_in: int
    begin: int

    @property
    def n_in(self) -> int:
        behind = self.inner.n_in + self.inner.stop(self.begin) if self.begin else self.inner.stop(self.n_out)
        return max(self.inner.n_in, behind - self.begin_in)

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def stride(self) -> int:
        return self.inner.stride

    @property
    def again(self) -> int:
        """Number of inputs that are read twice: so many of the first ones."""
        return self.n_in - self.inner.n_in

    @property
    def at_end(self) -> int:
        """Number of outputs that come before the first one that stands before `begin`."""
        return self.n_out - self.begin

    def parts(self, p0: int, p1: int) -> list[tuple[Span, int]]:
        """The computations of outputs `[p0, p1)`, in `inner`'s positions, each with what to add to them for those of this map."""
        parts = []
        if p0 < self.at_end:
            parts.append((self.inner.span(p0 + self.begin, min(p1, self.at_end) + self.begin), -self.begin_in))
        if p1 > self.at_end:
            low, high = max(p0, self.at_end) - self.at_end, p1 - self.at_end
            parts.append((self.inner.span(low, high), self.inner.n_in - self.begin_in))
        return parts

    def span(self, o0: int, o1: int) -> Span:
        parts = self.parts(o0, o1)
        return Span(o0, o1, min(part.first + add for part, add in parts), max(part.last + add for part, add in parts))

    def ready_all(self, r: Positions) -> Positions:
        n, there = self.inner.n_in, r + self.begin_in
        ready = np.maximum(self.inner.ready_all(np.clip(there, 0, n)) - self.begin, 0)
        behind = np.minimum(self.inner.ready_all(np.clip(there - n, 0, n)), self.begin)
        ready = ready + np.where(ready == self.at_end, behind, 0)
        ready[r >= self.n_in] = self.n_out
        if not self.inner.ready(0):
            ready[r <= 0] = 0
        return ready

    def first_all(self, o: Positions) -> Positions:
        before, behind = np.minimum(o + self.begin, self.n_out), np.maximum(o - self.at_end, 0)
        first = self.inner.first_all(before) - self.begin_in
        first = np.where(o < self.at_end, first, self.inner.first_all(behind) + self.inner.n_in - self.begin_in)
        return np.where(o < self.n_out, first, self.n_in)

    def stop_all(self, o: Positions) -> Positions:
        before, behind = np.minimum(o + self.begin, self.n_out), np.maximum(o - self.at_end, 0)
        stop = self.inner.stop_all(before) - self.begin_in
        stop = np.where(o <= self.at_end, stop, self.inner.stop_all(behind) + self.inner.n_in - self.begin_in)
        return np.where(o > 0, np.maximum(stop, 0), 0)

    def ready(self, r: int) -> int:
        return int(self.ready_all(np.array([r]))[0])

    def first(self, o: int) -> int:
        return int(self.first_all(np.array([o]))[0])

    def stop(self, o: int) -> int:
        return int(self.stop_all(np.array([o]))[0])


@dataclass(frozen=True)
class Mirrored:
    """`inner` along an axis of which both ends are exchanged: inputs and outputs are counted from the last one."""

    inner: AxisMap

    @property
    def n_in(self) -> int:
        return self.inner.n_in

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def stride(self) -> int:
        return self.inner.stride

    def seen(self, span: Span) -> Span:
        """Return a computation as `inner` counts, which counts as this does."""
        outputs, inputs = (
            (self.n_out - span.stop, self.n_out - span.start),
            (self.n_in - span.last, self.n_in - span.first),
        )
        return Span(*outputs, *inputs, span.high, span.low)

    def span(self, o0: int, o1: int) -> Span:
        found = self.inner.span(self.n_out - o1, self.n_out - o0)
        return Span(o0, o1, self.n_in - found.last, self.n_in - found.first, found.high, found.low)

    def first_all(self, o: Positions) -> Positions:
        return self.n_in - self.inner.stop_all(self.n_out - o)

    def stop_all(self, o: Positions) -> Positions:
        return self.n_in - self.inner.first_all(self.n_out - o)

    def ready_all(self, r: Positions) -> Positions:
        ready = np.searchsorted(self.stop_all(np.arange(1, self.n_out + 1)), r, side="right")
        ready[r <= 0] = 0
        ready[r >= self.n_in] = self.n_out
        return ready

    def ready(self, r: int) -> int:
        return int(self.ready_all(np.array([r]))[0])

    def first(self, o: int) -> int:
        return int(self.first_all(np.array([o]))[0])

    def stop(self, o: int) -> int:
        return int(self.stop_all(np.array([o]))[0])


@dataclass(frozen=True, slots=True)
class Behind(Window):
    """Output `o` is input `o - padding`: of the positions that are joined to a rolled map at its end (see `Rolled`)."""


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel; PyTorch's bicubic interpolation has a = -0.75, with antialiasing -0.5."""
    x = distance
    if x <= 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    return ((x - 5.0) * x + 8.0) * x * a - 4.0 * a if x < 2.0 else 0.0
