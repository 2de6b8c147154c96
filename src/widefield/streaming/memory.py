"""How many bytes a scan needs, from its schedules alone.

A step computes a map's new positions and puts them together with what was carried to a buffer. Of both, autograd keeps what the
derivatives of the ops need until the backward pass of the step; the rest is gone when its last reader is done. Both numbers are
products of a number of rows and a number of columns, so those of all steps are two matrix products.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from widefield.streaming.graph import Stage, Value
from widefield.streaming.schedule import Schedule

_Array = npt.NDArray[np.float64]

# Operations whose derivative needs neither what they read nor their result, and those that need their result alone. All others
# need what they read.
_NEED_NOTHING = frozenset(
    f"aten.{name}"
    for name in (
        *("add", "sub", "rsub", "neg", "cat", "stack", "clone", "to", "_to_copy", "detach", "roll", "flip", "index"),
        *(
            "constant_pad_nd",
            "pad",
            "reflection_pad2d",
            "replication_pad2d",
            "upsample_nearest2d",
            "upsample_bilinear2d",
        ),
        *("upsample_bicubic2d", "_upsample_nearest_exact2d", "pixel_shuffle", "pixel_unshuffle"),
    )
)
_NEED_RESULT = frozenset(
    f"aten.{name}" for name in ("relu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "softmax", "_softmax", "log_softmax")
)
_INDEX_BYTES = 8  # per position of a maximum
_GRADIENTS_OF_WEIGHTS = (
    3  # copies of one that a convolution's derivative makes: in the kernel's layout, in ours, in the weight's
)


@dataclass(frozen=True)
class Footprint:
    """The bytes of a stage that is scanned with these schedules; all are of the largest step where they are of one.

    `parts`: for an estimate, how many times as many tile rows and columns there are as the schedules have steps.
    """

    stage: Stage
    rows: Schedule
    cols: Schedule
    parts: tuple[float, float] = (1.0, 1.0)

    @cached_property
    def recorded(self) -> _Array:
        """What autograd keeps of each step until its backward pass: (tile rows, tile columns)."""
        new, held = self._kept
        return self._new[0] @ (self._new[1] * new).T + self._held[0] @ (self._held[1] * held).T

    @cached_property
    def carries(self) -> dict[torch.dtype, int]:
        """All pieces that a pass saves, by dtype."""
        above, beside = ((s.ready_array - s.kept_array).sum(1) for s in (self.rows, self.cols))
        held, (down, across) = self._held[0].sum(0), self.parts
        # pieces above cover the width, pieces to the left the rows that are held
        positions = down * (above * self._widths + held * beside * across)
        sizes: dict[torch.dtype, int] = {}
        for value, count in zip(self.stage.values, positions.tolist(), strict=True):
            if count:
                sizes[value.dtype] = sizes.get(value.dtype, 0) + int(count * value.pixel_bytes)
        return sizes

    @cached_property
    def total_recorded(self) -> float:
        """What autograd would keep of all steps."""
        return float(self.recorded.sum()) * self.parts[0] * self.parts[1]

    @cached_property
    def carry_bytes(self) -> int:
        """All pieces that a pass saves."""
        return sum(self.carries.values())

    @cached_property
    def row_of_carries(self) -> int:
        """The largest row of carries: what one tile row hands to the next."""
        above = self.rows.ready_array - self.rows.kept_array
        return int(((self._widths * self._sizes) @ above).max(initial=0))

    @cached_property
    def backward(self) -> int:
        """The peak of a recorded step in its backward pass: what it keeps, and the gradients that are alive at a time."""
        values, (new, held) = self.stage.values, self._of_largest
        kept_new, kept_held = self._kept
        ratio = np.maximum(self._sizes, 1)
        kept = new * kept_new / ratio + held * kept_held / ratio
        remaining = kept.sum()
        gradient = {v: new[v] for v in (*self.stage.outputs, *self.stage.reductions)}
        peak = remaining
        for v in reversed(range(len(values))):
            value = values[v]
            arriving = gradient.pop(v, 0.0)  # of the buffer; that of the new positions is cut out of it
            own = new[v] if value.rectified else 0.0
            weights = _GRADIENTS_OF_WEIGHTS * value.weight_bytes
            others = sum(gradient.values())
            peak = max(peak, remaining + others + arriving + own)
            if arriving and value.sources:
                sent = [arriving if value.view else max(new[s], held[s]) for s in value.sources]
                for source, size in zip(value.sources, sent, strict=True):
                    gradient[source] = max(gradient.get(source, 0.0), size)
                added = 0.0 if value.view or value.op == "aten.add" else sum(sent)
                peak = max(peak, remaining + others + max(arriving, own) + added + weights)
            remaining -= kept[v]
        return int(peak)

    @cached_property
    def forward(self) -> int:
        """The peak of a step without gradients."""
        values, (new, held) = self.stage.values, self._of_largest
        last = {source: v for v, value in enumerate(values) for source in value.sources}
        alive: dict[int, float] = {}
        peak = 0.0
        for v, value in enumerate(values):
            fresh = 0.0 if value.view else new[v]
            buffer = held[v] if held[v] > new[v] else 0.0
            peak = max(peak, sum(alive.values()) + fresh + buffer)
            alive[v] = buffer or fresh
            for source in set(value.sources):
                if last[source] == v:
                    alive.pop(source)
        return int(peak)

    @cached_property
    def _sizes(self) -> _Array:
        """Bytes per position of each map."""
        return np.array([value.pixel_bytes for value in self.stage.values], dtype=np.float64)

    @cached_property
    def _new(self) -> tuple[_Array, _Array]:
        """Rows that each tile row computes of each map, and columns likewise: (steps, maps)."""
        rows, cols = (np.diff(s.ready_array).T.astype(np.float64) for s in (self.rows, self.cols))
        return rows, cols

    @cached_property
    def _held(self) -> tuple[_Array, _Array]:
        """Rows and columns that the buffers hold."""
        rows, cols = (
            (s.ready_array[:, 1:] - s.kept_array[:, :-1]).T.astype(np.float64) for s in (self.rows, self.cols)
        )
        return rows, cols

    @cached_property
    def _widths(self) -> _Array:
        return np.array([flow.size for flow in self.cols.flows], dtype=np.float64)

    @cached_property
    def _of_largest(self) -> tuple[_Array, _Array]:
        """Bytes computed and held of each map in the step that keeps most."""
        i, j = np.unravel_index(int(np.argmax(self.recorded)), self.recorded.shape)
        return (
            self._new[0][i] * self._new[1][j] * self._sizes,
            self._held[0][i] * self._held[1][j] * self._sizes,
        )

    @cached_property
    def _kept(self) -> tuple[_Array, _Array]:
        """Bytes per position of each map that autograd keeps of the new positions, and of the buffer."""
        values = self.stage.values
        buffered = np.any(self._held[0] > self._new[0], axis=0) | np.any(self._held[1] > self._new[1], axis=0)
        needed = [value.rectified for value in values]
        for v in reversed(range(len(values))):
            value = values[v]
            if value.view:
                sources = value.sources if needed[v] else ()
            else:
                sources = value.sources if _needs_what_it_reads(value) else ()
            for source in sources:
                needed[source] = True
        new, held = np.zeros(len(values)), np.zeros(len(values))
        for v, value in enumerate(values):
            result = value.op in _NEED_RESULT and not value.rectified
            held[v] = value.pixel_bytes * (needed[v] or (result and not buffered[v])) * (not value.view or buffered[v])
            new[v] = value.pixel_bytes * (result and bool(buffered[v]))
            if value.op.startswith("aten.max_pool2d"):
                new[v] += value.pixel_bytes / value.dtype.itemsize * _INDEX_BYTES
            elif "dropout" in value.op:  # the mask
                new[v] += value.pixel_bytes
        return new, held


def _needs_what_it_reads(value: Value) -> bool:
    return value.op not in _NEED_NOTHING and value.op not in _NEED_RESULT
