"""The bytes that a scan needs, from its schedules alone.

What a step computes and holds of a map is a number of rows times a number of columns. So what all steps keep is a product of two
matrices, and the largest step can be found for many tiles at once without looking at all their steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from widefield.streaming.memory_model import Array, Flags, MemoryModel
from widefield.streaming.need import PartialGrid
from widefield.streaming.schedule import Schedule


class Cost(NamedTuple):
    """Bytes of a scan: all pieces that it saves, the largest row of them, the largest one beside a step, and the largest step."""

    carries: float
    row: float
    beside: float
    step: float


@dataclass(frozen=True, eq=False)
class Axis:
    """Numbers of one of the two schedules of a scan on which its memory depends. Arrays have the maps first."""

    schedule: Schedule

    @cached_property
    def work(self) -> Array:
        """Positions that each step computes of each map, followed by those that it holds: (2 * maps, steps)."""
        ready, kept = self.schedule.ready_array, self.schedule.kept_array
        return np.concatenate([np.diff(ready), ready[:, 1:] - kept[:, :-1]]).astype(np.float64)

    @cached_property
    def buffered(self) -> Flags:
        """True where a step holds more of a map than it computes."""
        new, held = _halves(self.work)
        flags: Flags = np.any(held > new, axis=1)
        return flags

    @cached_property
    def carried(self) -> Array:
        """Positions that each step hands to the next: (maps, steps + 1)."""
        return (self.schedule.ready_array - self.schedule.kept_array).astype(np.float64)

    @cached_property
    def sums(self) -> tuple[Array, Array]:
        """Positions carried and positions held, in all steps."""
        return self.carried.sum(1) * self.schedule.parts, _halves(self.work)[1].sum(1) * self.schedule.parts

    @cached_property
    def sizes(self) -> Array:
        """Positions of the whole maps."""
        return np.array([flow.size for flow in self.schedule.flows], dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Footprint:
    """The bytes of a stage that is scanned with these schedules, exactly."""

    needs: MemoryModel
    rows: Axis
    cols: Axis
    training: bool
    need: PartialGrid | None = None

    @cached_property
    def recorded(self) -> Array:
        """Bytes that autograd keeps of each step until its backward pass: (tile rows, tile columns)."""
        weights = np.concatenate(_saved_by_autograd(self.needs, [self.rows], [self.cols]))[:, 0]
        if self.need is None:
            return (self.rows.work * weights).T @ self.cols.work  # type: ignore[no-any-return]
        (new, held), (_, rows), (_, cols) = _halves(weights), _halves(self.rows.work), _halves(self.cols.work)
        buffers = np.einsum("vi,vj,vij->ij", rows * held, cols, self.need.made)
        return np.einsum("v,vij->ij", new[:, 0], self.need.boxes.sizes) + buffers  # type: ignore[no-any-return]

    @cached_property
    def computed(self) -> tuple[float, float]:
        """Bytes of all maps that are computed, and of all maps."""
        (rows, _), (cols, _) = _halves(self.rows.work), _halves(self.cols.work)
        whole = float((rows.sum(1) * cols.sum(1)) @ self.needs.sizes)
        return float(self.positions @ self.needs.sizes), whole

    @property
    def steps(self) -> int:
        """The number of steps."""
        return self.recorded.size if self.need is None else len(self.need.order)

    @cached_property
    def held(self) -> float:
        """Elements of all buffers of all steps: what is put together of new positions and of carries."""
        (_, rows), (_, cols) = _halves(self.rows.work), _halves(self.cols.work)
        buffered = self.rows.buffered | self.cols.buffered
        if self.need is None:
            positions = rows.sum(1) * cols.sum(1)
        else:
            positions = np.einsum("vi,vj,vij->v", rows, cols, self.need.made)
        return float((positions * self.needs.elements)[buffered].sum())

    def map_elements(self, training: bool, again: float) -> float:
        """Elements of maps between stages, and of maps that are given, that a pass writes and, three for one, reads.

        If `training`, the share `again` is read twice.
        """
        stage = self.needs.stage
        read, written = (
            sum(
                stage.values[v].bytes / stage.values[v].itemsize for v in of if stage.values[v].name != self.needs.image
            )
            for of in (stage.inputs, stage.stored)
        )
        return written + read / 3 + training * (read + (again * read + written) / 3)  # gradients of both

    @cached_property
    def positions(self) -> Array:
        """Positions that are computed of each map."""
        if self.need is not None:
            return self.need.boxes.sizes.sum((1, 2))
        (rows, _), (cols, _) = _halves(self.rows.work), _halves(self.cols.work)
        return rows.sum(1) * cols.sum(1)  # type: ignore[no-any-return]

    @cached_property
    def carries(self) -> dict[torch.dtype, int]:
        """All pieces that a pass saves, by dtype."""
        sizes: dict[torch.dtype, int] = {}
        if self.need is None:
            counts = _saved_positions([self.rows], [self.cols])[:, 0, 0]
        else:
            (new, _), (_, held) = _halves(self.cols.work), _halves(self.rows.work)
            down, across = self.rows.carried[:, 1:], self.cols.carried[:, 1:]
            counts = np.einsum("vi,vj,vij->v", down, new, self.need.below)
            counts += np.einsum("vi,vj,vij->v", held, across, self.need.right)
        for value, count in zip(self.needs.stage.values, counts.tolist(), strict=True):
            if count:
                sizes[value.dtype] = sizes.get(value.dtype, 0) + int(count * value.pixel_bytes)
        return sizes

    @cached_property
    def cost(self) -> Cost:
        i, j = np.unravel_index(int(np.argmax(self.recorded)), self.recorded.shape)
        largest = (self.rows.work[:, i] * self.cols.work[:, j])[:, None, None]
        step = _step(self.needs, largest, _saved_by_autograd(self.needs, [self.rows], [self.cols]), self.training)
        held, carried = _halves(self.rows.work)[1], self.cols.carried[:, 1:]
        beside = float(((self.needs.sizes * held.T) @ carried).max(initial=0))
        return Cost(
            sum(self.carries.values()), _row_of_carries(self.needs, self.rows, self.cols), beside, float(step[0, 0])
        )


def estimates(needs: MemoryModel, rows: Sequence[Axis], cols: Sequence[Axis], training: bool) -> list[list[Cost]]:
    """The cost of each tile height with each width; of schedules that are not whole, in proportion."""
    saved = _saved_by_autograd(needs, rows, cols)
    weights = np.concatenate(saved)
    # The largest step: the row that is largest with the columns' largest numbers, the column that is largest with that row, ...
    across = np.stack([axis.work.max(1) for axis in cols], axis=1)[:, None, :]
    for _ in range(2):
        down = _largest(rows, weights * across)
        across = _largest(cols, (weights * down).transpose(0, 2, 1)).transpose(0, 2, 1)
    steps = _step(needs, down * across, saved, training)
    carries = (_saved_positions(rows, cols) * needs.sizes[:, None, None]).sum(0)
    handed = np.stack([axis.carried.max(1) for axis in cols], axis=1)
    beside = np.einsum("v,vhw,vw->hw", needs.sizes, _halves(down)[1], handed)
    return [
        [Cost(*found) for found in zip(carries[h], [row] * len(cols), beside[h], steps[h], strict=True)]
        for h, row in enumerate(_row_of_carries(needs, axis, cols[0]) for axis in rows)
    ]


def _halves(work: Array) -> tuple[Array, Array]:
    """Return what is computed, and what is held."""
    return work[: len(work) // 2], work[len(work) // 2 :]


def _largest(axes: Sequence[Axis], weights: Array) -> Array:
    """The step of each axis with the largest sum, with each of its weights: (2 * maps, axes, others), weights and result."""
    best = [(axis.work.T @ weights[:, k]).argmax(0) for k, axis in enumerate(axes)]
    return np.stack([axis.work[:, steps] for axis, steps in zip(axes, best, strict=True)], axis=1)


def _saved_by_autograd(needs: MemoryModel, rows: Sequence[Axis], cols: Sequence[Axis]) -> tuple[Array, Array]:
    """Bytes per position that autograd keeps of new positions and of buffers: (maps, rows, cols)."""
    down, across = (np.stack([axis.buffered for axis in axes], axis=1) for axes in (rows, cols))
    return needs.saved_by_autograd(down[:, :, None] | across[:, None, :])


def _step(needs: MemoryModel, largest: Array, saved: tuple[Array, Array], training: bool) -> Array:
    """The peak of steps that compute and hold so many positions: (2 * maps, rows, cols) to (rows, cols)."""
    sizes = needs.sizes[:, None, None]
    new, held = _halves(largest)
    if training:
        peak = needs.backward(new * sizes, held * sizes, new * saved[0] + held * saved[1])
    else:
        peak = needs.forward(new * sizes, held * sizes)
    return peak + needs.reading(new * sizes)


def _saved_positions(rows: Sequence[Axis], cols: Sequence[Axis]) -> Array:
    """Positions of each map that a pass saves: pieces above cover the width, pieces to the left the rows that are held."""
    (above, held), (beside, _) = (np.stack([axis.sums for axis in axes], axis=2) for axes in (rows, cols))
    widths = cols[0].sizes[:, None, None]
    return above[:, :, None] * widths + held[:, :, None] * beside[:, None, :]  # type: ignore[no-any-return]


def _row_of_carries(needs: MemoryModel, rows: Axis, cols: Axis) -> float:
    """The largest row of carries: what one tile row hands to the next."""
    return float(((cols.sizes * needs.sizes) @ rows.carried).max(initial=0))
