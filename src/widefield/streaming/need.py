"""The part of a scan that is needed: from the positions that are wanted, backwards through all that maps read.

A step makes of a map what something that is wanted depends on, and hands on to the step below or to the right what later steps read
of it. All else is neither read nor computed, forward or backward. What is wanted are parts of the output maps and the positions
over which reductions run.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from widefield.streaming.extents import AxisMap, Positions, Span
from widefield.streaming.foreground import Flags, Foreground, Ranges
from widefield.streaming.grid import Box, BufferPlan, Grid, Interval
from widefield.streaming.program import Program, Stage
from widefield.streaming.rules.rolled import straight
from widefield.streaming.schedule import Schedule


class Boxes:
    """The rows and columns of each map that each step computes: (maps, tile rows, tile columns); none where `stop <= start`."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.start = np.full((2, *shape), np.iinfo(np.int64).max)
        self.stop = np.zeros((2, *shape), dtype=np.int64)

    @property
    def made(self) -> Flags:
        """True where a step computes anything of a map."""
        made: Flags = np.all(self.stop > self.start, axis=0)
        return made

    @property
    def sizes(self) -> Positions:
        """The number of positions that each step computes of each map."""
        return np.where(self.made, (self.stop - self.start).prod(0), 0)

    def include(self, grid: Grid, v: int, ranges: tuple[Ranges, Ranges]) -> tuple[Ranges, Ranges]:
        """Have positions of map v computed: parts of it, each a range of rows and one of columns.

        Returns the steps (tile rows, tile columns) in which each part is computed.
        """
        schedules = grid.row_schedule, grid.col_schedule
        tiles = [blocks(schedule, v) for schedule in schedules]
        steps = tuple(_steps_of(tile[1], *wanted) for tile, wanted in zip(tiles, ranges, strict=True))
        rows, cols = ((end - begin).max(initial=0) for begin, end in steps)
        for down in range(rows):
            for across in range(cols):
                at = [begin + offset for (begin, _), offset in zip(steps, (down, across), strict=True)]
                here = (at[0] < steps[0][1]) & (at[1] < steps[1][1])
                index = at[0][here], at[1][here]
                for axis, ((begin, end), (first, stop)) in enumerate(zip(tiles, ranges, strict=True)):
                    np.minimum.at(self.start[axis, v], index, np.maximum(first[here], begin[index[axis]]))
                    np.maximum.at(self.stop[axis, v], index, np.minimum(stop[here], end[index[axis]]))
        return steps  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class PartialGrid:
    """The steps of a scan in which something is needed, in the place of its whole `Grid`.

    `boxes` are what each step computes; in `below` and `right` (maps, tile rows, tile columns) it hands on what it holds of a map.
    """

    whole: Grid
    boxes: Boxes
    below: Flags
    right: Flags

    @property
    def stage(self) -> Stage:
        return self.whole.stage

    @cached_property
    def made(self) -> Flags:
        return self.boxes.made

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Tile row and column of each step in which something is done."""
        busy = (self.made | self.below | self.right).any(0)
        return [(int(i), int(j)) for i, j in np.argwhere(busy)]

    def box(self, v: int, i: int, j: int) -> Box:
        """Return the part of map v that step (i, j) computes: y, x, height, width."""
        if not self.made[v, i, j]:
            return 0, 0, 0, 0
        (y, x), (bottom, right) = self.boxes.start[:, v, i, j].tolist(), self.boxes.stop[:, v, i, j].tolist()
        return y, x, bottom - y, right - x

    def part(self, v: int) -> Box:
        """Return the smallest part of map v that holds all that is computed of it; all of one that was rolled."""
        made = self.made[v]
        if self.stage.values[v].target is straight:
            return 0, 0, *self.whole.extent(v)
        if not made.any():
            return 0, 0, 0, 0
        start, stop = self.boxes.start[:, v, made].min(1), self.boxes.stop[:, v, made].max(1)
        (y, x), (height, width) = start.tolist(), (stop - start).tolist()
        return y, x, height, width

    def spans(self, v: int, i: int, j: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """Return what map v reads of each source in step (i, j), along both axes."""
        y, x, height, width = self.box(v, i, j)
        rows, cols = self.whole.row_schedule.flows[v], self.whole.col_schedule.flows[v]
        return tuple(m.span(y, y + height) for m in rows.axis_maps), tuple(m.span(x, x + width) for m in cols.axis_maps)

    def buffer(self, v: int, i: int, j: int) -> BufferPlan:
        """Return how map v's buffer is put together in step (i, j), and what is cut out of it."""
        row, col = self.whole.rows[i][v], self.whole.cols[j][v]
        reads: list[tuple[Interval, Interval] | None] = []
        for reader, k in self.whole.readers[v]:
            if self.made[reader, i, j]:
                down, across = self.spans(reader, i, j)
                reads.append(((down[k].first, down[k].last), (across[k].first, across[k].last)))
            else:
                reads.append(None)
        y, x = self.box(v, i, j)[:2]
        at = (y - row.done, x - col.done) if self.made[v, i, j] else (0, 0)
        return self.whole.plan_buffer(v, row, col, reads, at, bool(self.below[v, i, j]), bool(self.right[v, i, j]))


@dataclass(frozen=True, eq=False)
class Wanted:
    """The wanted part of an image.

    `region` is a part of the image (y, x, height, width), whose cells of each output map are wanted, None for all of them. With a
    `foreground`, only what touches it is, and reductions run over it alone. `reductions`: they are wanted, and not known already;
    `outputs`: output maps are. `band`: this process is number so and so of so many that share the image.
    """

    region: Box | None = None
    foreground: Foreground | None = None
    reductions: bool = True
    outputs: bool = True
    band: tuple[int, int] = (0, 1)

    @property
    def scattered(self) -> bool:
        """True if what is wanted may lie anywhere in the image."""
        return self.region is not None or self.foreground is not None

    def of(self, grid: Grid, v: int, image: tuple[int, int], steps: range) -> tuple[Ranges, Ranges]:
        """The parts of output map or reduction v that are wanted of these tile rows, each a range of rows and one of columns."""
        extent = grid.extent(v)
        is_output = grid.stage.values[v].reduction is None
        box = 0, 0, *extent
        if is_output and self.region is not None:
            box = cells_in(self.region, image, extent)
        if not (self.outputs if is_output else self.reductions):
            box = 0, 0, 0, 0
        (top, bottom), across = blocks(grid.row_schedule, v), blocks(grid.col_schedule, v)
        begin = grid.stage.values[v].begin if not is_output or grid.stage.values[v].target is straight else (0, 0)
        rows, cols = (
            _clipped_round(found, box[axis], box[axis + 2], begin[axis], extent[axis])
            for axis, found in enumerate(((top[steps], bottom[steps]), across))
        )
        if self.foreground is None:
            return _products(rows, cols)
        return _foreground_boxes(self.foreground, extent, begin, rows, cols)


def parse_region(region: Any, image: tuple[int, int]) -> Box | None:
    """Check a region that a user gave of an image of this height and width. Raises ValueError."""
    if region is None:
        return None
    if not isinstance(region, (tuple, list)) or len(region) != 4 or not all(isinstance(n, Integral) for n in region):
        raise ValueError(f"region={region!r} must be (y, x, height, width), four ints in pixels of the image")
    y, x, height, width = map(int, region)
    if min(y, x) < 0 or min(height, width) < 1 or y + height > image[0] or x + width > image[1]:
        raise ValueError(
            f"region={tuple(region)}, (y, x, height, width) in pixels, must lie within the image of {image[0]} x {image[1]} "
            "(height x width) and hold at least a pixel"
        )
    return y, x, height, width


def cells_in(region: Box, image: tuple[int, int], extent: tuple[int, int]) -> Box:
    """Return the cells of a map of `extent` that a region of the image touches.

    Cell `o` of `n` along an axis of `size` pixels stands for the pixels from `o * size / n` to `(o + 1) * size / n`.
    """
    (y, height), (x, width) = (
        (first := start * n // size, -(-(start + length) * n // size) - first)
        for start, length, n, size in zip(region[:2], region[2:], extent, image, strict=True)
    )
    return y, x, height, width


def bands(program: Program, grids: Sequence[Grid], wanted: Wanted) -> list[list[range]]:
    """Return the tile rows of each scan whose results belong to each process: about as much work for all."""
    found, ranks = [], wanted.band[1]
    for grid in grids:
        done = np.cumsum(_work(program, grid, wanted))
        ends = np.searchsorted(done, done[-1] * np.arange(1, ranks) / ranks * (1 - 1e-9), side="left") + 1
        edges = [0, *ends.tolist(), grid.row_schedule.steps]
        found.append([range(a, b) for a, b in itertools.pairwise(edges)])
    return found


def _work(program: Program, grid: Grid, wanted: Wanted) -> npt.NDArray[np.float64]:
    """Return the amount of what is wanted that each tile row of a scan makes; each output map and reduction counts the same."""
    image = program.captured.image_shape[2], program.captured.image_shape[3]
    work = np.zeros(grid.row_schedule.steps)
    for v in (*grid.stage.outputs, *grid.stage.reductions):
        if v in grid.stage.reductions or grid.stage.values[v].name in program.final_maps:
            (top, bottom), (left, right) = wanted.of(grid, v, image, range(grid.row_schedule.steps))
            height, width = grid.extent(v)
            steps = _steps_of(blocks(grid.row_schedule, v)[1], top, bottom)[0]
            np.add.at(work, steps, (bottom - top) * (right - left) / (height * width))
    return work


def rows_of_bands(program: Program, grids: Sequence[Grid], wanted: Wanted) -> dict[str, list[int]]:
    """Return how many rows each process has of what is wanted of each map among the results, by its name."""
    image = program.captured.image_shape[2], program.captured.image_shape[3]
    rows = {}
    for stage, grid, ranges in zip(program.stages, grids, bands(program, grids, wanted), strict=True):
        for v in stage.outputs:
            if stage.values[v].name in program.final_maps:
                y, _, height, _ = cells_in(wanted.region or (0, 0, *image), image, grid.extent(v))
                ready = grid.row_schedule.ready[v]
                rows[stage.values[v].name] = [
                    max(0, min(ready[r.stop], y + height) - max(ready[r.start], y)) for r in ranges
                ]
    return rows


def needs(program: Program, grids: Sequence[Grid], wanted: Wanted) -> list[PartialGrid]:
    """Return the steps of each scan of `program` that are needed for what is `wanted`."""
    rank, ranks = wanted.band
    steps = [range(grid.row_schedule.steps) for grid in grids]
    if ranks > 1:
        steps = [found[rank] for found in bands(program, grids, wanted)]
    image = program.captured.image_shape[2], program.captured.image_shape[3]
    read_later: dict[str, list[tuple[Ranges, Ranges]]] = {}
    found: list[PartialGrid] = []
    for stage, grid, own in zip(reversed(program.stages), reversed(grids), reversed(steps), strict=True):
        boxes = Boxes((len(stage.values), grid.row_schedule.steps, grid.col_schedule.steps))
        for v in (*stage.outputs, *stage.reductions):
            name = stage.values[v].name
            if v in stage.reductions or name in program.final_maps:
                boxes.include(grid, v, wanted.of(grid, v, image, own))
            for ranges in read_later.get(name, ()):
                boxes.include(grid, v, ranges)
        found.append(_needed(stage, grid, boxes))
        for v in stage.inputs:
            read_later.setdefault(stage.values[v].name, []).append(_ranges(boxes, v)[1])
    return found[::-1]


def _needed(stage: Stage, grid: Grid, boxes: Boxes) -> PartialGrid:
    """Add to `boxes`, which holds what is wanted, all on which that depends."""
    below, right = (np.zeros(boxes.start.shape[1:], dtype=np.bool_) for _ in range(2))
    schedules = grid.row_schedule, grid.col_schedule
    for v, value in reversed(list(enumerate(stage.values))):
        (i, j), made = _ranges(boxes, v)
        for k, s in enumerate(value.sources if len(i) else ()):
            flows = [schedule.flows[v] for schedule in schedules]
            ranges = [_read(flow.axis_maps[k], *range_) for flow, range_ in zip(flows, made, strict=True)]
            (top, _), (left, after) = boxes.include(grid, s, (ranges[0], ranges[1]))
            below[s] |= _covered(below[s].shape, (top, i), (left, after))
            right[s] |= _covered(right[s].shape, (i, i + 1), (left, j))
    return PartialGrid(grid, boxes, below, right)


def blocks(schedule: Schedule, v: int) -> Ranges:
    """Return the positions of map v that each step computes."""
    ready = schedule.ready_array[v]
    return ready[:-1], ready[1:]


def _ranges(boxes: Boxes, v: int) -> tuple[tuple[Positions, Positions], tuple[Ranges, Ranges]]:
    """Return the steps that compute anything of map v, and what: ranges of rows and columns."""
    made = (boxes.stop[:, v] > boxes.start[:, v]).all(0)
    i, j = np.nonzero(made)
    start, stop = boxes.start[:, v, i, j], boxes.stop[:, v, i, j]
    return (i, j), ((start[0], stop[0]), (start[1], stop[1]))


def _read(axis_map: AxisMap, start: Positions, stop: Positions) -> Ranges:
    """Return the inputs that the outputs from `start` to `stop` read; where that is padding alone, the one that it is cut from."""
    first = np.minimum(axis_map.first_all(start), axis_map.n_in - 1)
    return first, np.maximum(axis_map.stop_all(stop), first + 1)


def _steps_of(ends: Positions, first: Positions, stop: Positions) -> Ranges:
    """Return the steps that compute the positions from `first` to `stop` of a map, of which each step reaches to `ends`."""
    return np.searchsorted(ends, first, side="right"), np.searchsorted(ends, stop - 1, side="right") + 1


def _covered(shape: tuple[int, ...], rows: Ranges, cols: Ranges) -> Flags:
    """Return what rectangles cover, each a range of rows and one of columns; those without a row or column cover nothing."""
    change = np.zeros((shape[0] + 1, shape[1] + 1), dtype=np.int64)
    some = (rows[1] > rows[0]) & (cols[1] > cols[0])
    for row, sign in zip(rows, (1, -1), strict=True):
        for col, other in zip(cols, (1, -1), strict=True):
            np.add.at(change, (row[some], col[some]), sign * other)
    return change.cumsum(0).cumsum(1)[:-1, :-1] > 0  # type: ignore[no-any-return]


def _clipped(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Return the parts of `ranges` that lie in [start, stop), without those that do not."""
    first, last = np.maximum(ranges[0], start), np.minimum(ranges[1], stop)
    return first[last > first], last[last > first]


def _clipped_round(ranges: Ranges, start: int, count: int, begin: int, size: int) -> Ranges:
    """Return the parts of `ranges` that hold `count` positions from `start` on, of a map of `size` whose scan begins at `begin`."""
    first = (start - begin) % size
    parts = [_clipped(ranges, first, min(first + count, size)), _clipped(ranges, 0, first + count - size)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _products(rows: Ranges, cols: Ranges) -> tuple[Ranges, Ranges]:
    """Return each range of rows with each of columns."""
    i, j = (index.ravel() for index in np.indices((len(rows[0]), len(cols[0]))))
    return (rows[0][i], rows[1][i]), (cols[0][j], cols[1][j])


def _foreground_boxes(
    foreground: Foreground, extent: tuple[int, int], begin: tuple[int, int], rows: Ranges, cols: Ranges
) -> tuple[Ranges, Ranges]:
    """Return the smallest box around the foreground in each block of a map, for all blocks that hold some.

    Blocks of a map that is rolled, whose scan begins at row and column `begin`, do not go over its border.
    """

    def touched(down: Ranges, across: Ranges) -> Flags:
        ranges = []
        for (first, last), start, size in zip((down, across), begin, extent, strict=True):
            there = (first + start) % size
            ranges.append((there, there + last - first))
        return foreground.touched(extent, *ranges)

    i, j = np.nonzero(touched(rows, cols))
    found = []
    for axis, blocks_ in enumerate((rows, cols)):
        positions = np.concatenate(
            [np.arange(a, b) for a, b in zip(*blocks_, strict=True)] or [np.zeros(0, dtype=np.int64)]
        )
        single = positions, positions + 1
        marked = touched(single, cols) if axis == 0 else touched(rows, single).T
        where = positions[:, None]
        begins = np.cumsum(blocks_[1] - blocks_[0]) - (blocks_[1] - blocks_[0])
        if not len(i):
            return _products((begins[:0], begins[:0]), cols)
        low = np.minimum.reduceat(np.where(marked, where, np.iinfo(np.int64).max), begins)
        high = np.maximum.reduceat(np.where(marked, where, -1), begins) + 1
        at = (i, j) if axis == 0 else (j, i)
        found.append((low[at], high[at]))
    return found[0], found[1]
