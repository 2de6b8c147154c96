"""The parts of a stage's maps that are in memory at a time, in bytes.

A step computes a map's new positions and puts them together with what was carried to a buffer. Of both, autograd keeps what the
derivatives of the ops need until the backward pass of the step; the rest is gone when its last reader is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from widefield.streaming.program import Stage

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

# Multiplications that take as long as to read and write an element, about.
_WORK_OF_ELEMENT = 32
_INDEX_BYTES = 8  # per position of a maximum
# Copies of a weight's gradient that a convolution's derivative makes in the kernel's layout, in memory that the library keeps.
_SCRATCH = 2
# What oneDNN keeps of a convolution's kernel for a tile of one size, in its cache of so many; measured. About every second tile has
# a size of its own.
_BYTES_OF_KERNEL = 26 << 10
_MOST_KERNELS = 1024


@dataclass(frozen=True, eq=False)
class MemoryModel:
    """The memory of one stage, `image` being the name of the image. Arrays have the stage's maps first; after them come as
    many tiles as are looked at together.
    """

    stage: Stage
    image: str

    @cached_property
    def sizes(self) -> Array:
        """Bytes per position of each map."""
        return np.array([value.pixel_bytes for value in self.stage.values], dtype=np.float64)

    @cached_property
    def work(self) -> Array:
        """Multiplications per position of each map, with as many added as its elements take the time of."""
        return self.multiplications + _WORK_OF_ELEMENT * self.elements

    @cached_property
    def multiplications(self) -> Array:
        """Those per position of each map."""
        return np.array([value.shape[0] * value.weight_bytes / value.dtype.itemsize for value in self.stage.values])

    @cached_property
    def elements(self) -> Array:
        """Elements per position of each map, none of a view."""
        return np.array([0 if value.view else value.pixel_bytes / value.itemsize for value in self.stage.values])

    @property
    def itemsize(self) -> int:
        """Bytes of an element of most maps: of the first one of floating-point numbers."""
        values = self.stage.values
        return next((value.itemsize for value in values if value.dtype.is_floating_point), values[0].itemsize)

    def saved_by_autograd(self, buffered: Flags) -> tuple[Array, Array]:
        """Bytes per position that autograd keeps of the new positions and of the buffer, where there is one apart from them."""
        results, read, views = (x.reshape(-1, *[1] * (buffered.ndim - 1)) for x in self._derivatives)
        sizes, extra = (x.reshape(results.shape) for x in (self.sizes, self._extra))
        held = sizes * (read | (results & ~buffered)) * (~views | buffered)
        return sizes * (results & buffered) + extra, held

    @cached_property
    def _derivatives(self) -> tuple[Flags, Flags, Flags]:
        """For each map: the derivative of its op needs it; that of a reader needs it; it is a view."""
        values = self.stage.values
        read = [value.rectified for value in values]
        for v, value in reversed(list(enumerate(values))):
            if read[v] if value.view else "inputs" in value.facts.saves:
                for source in value.sources:
                    read[source] = True
        results = ["result" in value.facts.saves and not value.rectified for value in values]
        return np.array(results), np.array(read), np.array([value.view for value in values])

    @cached_property
    def _extra(self) -> Array:
        """Memory that derivatives need besides the maps, in bytes per position: positions of maxima, masks."""
        extra = np.zeros(len(self.stage.values))
        for v, value in enumerate(self.stage.values):
            if "indices" in value.facts.saves:
                extra[v] = value.pixel_bytes / value.itemsize * _INDEX_BYTES
            elif "mask" in value.facts.saves:
                extra[v] = value.pixel_bytes
            elif value.placed is not None:
                extra[v] = value.placed.saved_bytes
        return extra

    @cached_property
    def _own(self) -> tuple[Array, Array]:
        """Memory that an op needs while it runs, forward and backward, relative to that of its result."""
        own = np.zeros((2, len(self.stage.values)))
        for v, value in enumerate(self.stage.values):
            if value.placed is not None and value.pixel_bytes:
                own[:, v] = value.placed.forward_bytes, value.placed.backward_bytes
                own[:, v] /= value.pixel_bytes
        return own[0], own[1]

    @cached_property
    def _weights(self) -> Array:
        """Bytes of the copy that a convolution makes of its weights, in the kernel's layout, while it computes each map."""
        values = self.stage.values
        return np.array([value.weight_bytes * value.op.startswith("aten.conv") for value in values], dtype=np.float64)

    def reading(self, new: Array) -> Array:
        """Bytes that reading the image ahead needs besides: the next tile, and the reader's own array of it."""
        image = np.array([value.name == self.image for value in self.stage.values])
        return 2 * new[image].sum(0)  # type: ignore[no-any-return]

    def forward(self, new: Array, held: Array) -> Array:
        """The peak of a step without gradients, that computes and holds so many bytes of each map."""
        values = self.stage.values
        views = self._derivatives[2].reshape(-1, *[1] * (new.ndim - 1))
        added, buffers = np.where(views, 0, new), np.where(held > new, held, 0)
        stays = np.where(buffers > 0, buffers, added)
        gone = np.zeros_like(stays)
        last = {source: v for v, value in enumerate(values) for source in value.sources}
        for source, v in last.items():
            gone[v] += stays[source]
        alive = np.cumsum(stays - gone, axis=0) - (stays - gone)  # before each map
        own = new * self._own[0].reshape(views.shape)
        weights = self._weights.reshape(views.shape)
        return (alive + added + buffers + own + weights).max(0)  # type: ignore[no-any-return]

    def backward(self, new: Array, held: Array, saved: Array) -> Array:
        """The peak of a recorded step in its backward pass: what is `saved`, and the gradients that are alive at a time."""
        stage = self.stage
        gradient = np.zeros_like(new)
        for v in (*stage.outputs, *stage.reductions):
            gradient[v] = new[v]
        alive, remaining = gradient.sum(0), np.cumsum(saved, axis=0)
        peak = remaining[-1]
        for v, value in reversed(list(enumerate(stage.values))):
            arriving = gradient[v]  # of the buffer; that of the new positions is cut out of it
            own = new[v] if value.rectified else 0.0
            others = alive - arriving
            peak = np.maximum(peak, remaining[v] + alive + own)
            alive = others.copy()
            if not value.sources:
                continue
            # A reduction has no positions, but its gradient is spread over those that it reads.
            some, added = (arriving > 0 if value.reduction is None else new[value.sources[0]] > 0), 0.0
            for source in value.sources:
                sent = arriving if value.view else np.maximum(new[source], held[source]) * some
                alive += np.maximum(sent - gradient[source], 0)
                np.maximum(gradient[source], sent, out=gradient[source])
                added = added + sent
            if value.view or value.facts.sends_same:
                added = 0.0
            added = added + new[v] * self._own[1][v] * some
            weights = value.weight_bytes * some
            peak = np.maximum(peak, remaining[v] + others + np.maximum(arriving, own) + added + weights)
        return peak  # type: ignore[no-any-return]


def bytes_of_kernels(stages: Sequence[Stage], steps: Sequence[int], training: bool) -> int:
    """Bytes that the library of convolutions keeps for itself, after `steps` of each stage; measured on a CPU."""
    weights = [stage.weight_sizes for stage in stages]
    kernels = sum(len(of) * count for of, count in zip(weights, steps, strict=True)) * (3 if training else 1) // 2
    largest = max((max(of, default=0) for of in weights), default=0)
    return min(kernels, _MOST_KERNELS) * _BYTES_OF_KERNEL + training * _SCRATCH * largest
