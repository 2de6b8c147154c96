"""Two schedules make a grid of steps: what each step computes, reads, keeps and hands on, for every map of a stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from widefield.streaming.buffers import Cut, Layout
from widefield.streaming.extents import Span
from widefield.streaming.program import Stage
from widefield.streaming.schedule import Schedule

Interval = tuple[int, int]  # positions [first, last)
Box = tuple[int, int, int, int]  # y, x, height, width
GATE = 8  # rows that a strided op waits for: enough for a convolution to run at full speed


@dataclass(frozen=True, slots=True)
class AxisStep:
    """One map in one step along one axis, in positions of the whole axis.

    The buffer holds `[held_from, ready)`, of which `[done, ready)` is computed now and `[carried_from, ready)` is carried to the
    next step.
    `reads[k]` is what the k-th reader takes, None if it computes nothing; `spans` is how the map itself is computed.
    """

    held_from: int
    done: int
    ready: int
    carried_from: int
    spans: tuple[Span, ...]
    reads: tuple[Interval | None, ...]

    @property
    def new(self) -> int:
        """Positions computed in this step."""
        return self.ready - self.done


class BufferPlan(NamedTuple):
    """A map's buffer in one step: how it is put together (`layout`), and the `cuts` out of it.

    They are those for each of the `readers`, then the carries for below and for the right, where there are any.
    """

    layout: Layout
    readers: list[tuple[int, int]]
    cuts: list[Cut]
    carries_below: bool
    carries_right: bool


@dataclass(frozen=True)
class Grid:
    """The steps of a scan of `stage`.

    `readers[v]` lists who reads map v: pairs of (map, which of its sources). `rows[i][v]` and `cols[j][v]` say what happens in
    tile row i and tile column j, both counted from 0.
    """

    stage: Stage
    row_schedule: Schedule
    col_schedule: Schedule
    readers: tuple[tuple[tuple[int, int], ...], ...] = field(repr=False)

    @cached_property
    def rows(self) -> tuple[tuple[AxisStep, ...], ...]:
        return self._steps(self.row_schedule)

    @cached_property
    def cols(self) -> tuple[tuple[AxisStep, ...], ...]:
        return self._steps(self.col_schedule)

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Tile row and column of each step."""
        return [(i, j) for i in range(self.row_schedule.steps) for j in range(self.col_schedule.steps)]

    def extent(self, v: int) -> tuple[int, int]:
        """Height and width of map v; of a reduction, those of the maps that it reads."""
        return self.row_schedule.flows[v].size, self.col_schedule.flows[v].size

    def _steps(self, schedule: Schedule) -> tuple[tuple[AxisStep, ...], ...]:
        return tuple(
            tuple(self._axis_step(schedule, v, t) for v in range(len(self.stage.values)))
            for t in range(1, schedule.steps + 1)
        )

    def _axis_step(self, schedule: Schedule, v: int, t: int) -> AxisStep:
        ready, kept = schedule.ready[v], schedule.kept[v]
        reads: list[Interval | None] = []
        for reader, k in self.readers[v]:
            if schedule.ready[reader][t] == schedule.ready[reader][t - 1]:
                reads.append(None)
            else:
                span = schedule.span(reader, k, t)
                reads.append((span.first, span.last))
        sources = range(len(schedule.flows[v].sources)) if ready[t] > ready[t - 1] else ()
        spans = tuple(schedule.span(v, k, t) for k in sources)
        return AxisStep(kept[t - 1], ready[t - 1], ready[t], kept[t], spans, tuple(reads))

    def box(self, v: int, i: int, j: int) -> Box:
        """Return the part of map v that step (i, j) computes: y, x, height, width."""
        row, col = self.rows[i][v], self.cols[j][v]
        return row.done, col.done, row.new, col.new

    def covers(self, v: int) -> bool:
        """True if every position of map v is computed: of an input, the last ones may not be needed."""
        return (self.row_schedule.ready[v][-1], self.col_schedule.ready[v][-1]) == self.extent(v)

    def part(self, v: int) -> Box:
        """Return the part of map v that is computed: all of it."""
        return 0, 0, *self.extent(v)

    def spans(self, v: int, i: int, j: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """Return what map v reads of each source in step (i, j), along both axes."""
        return self.rows[i][v].spans, self.cols[j][v].spans

    def buffer(self, v: int, i: int, j: int) -> BufferPlan:
        """Return how map v's buffer is put together in step (i, j), and what is cut out of it."""
        row, col = self.rows[i][v], self.cols[j][v]
        reads = [(rows, cols) if rows and cols else None for rows, cols in zip(row.reads, col.reads, strict=True)]
        return self.plan_buffer(v, row, col, reads, at=(0, 0), below=True, right=True)

    def plan_buffer(
        self,
        v: int,
        row: AxisStep,
        col: AxisStep,
        reads: Sequence[tuple[Interval, Interval] | None],
        at: tuple[int, int],
        below: bool,
        right: bool,
    ) -> BufferPlan:
        """Return the plan of map v's buffer, given what each reader `reads`, and if anything is carried `below` and `right`.

        `at` is where what the step computes begins in what it could compute.
        """
        readers, cuts = [], []
        top, left = row.held_from, col.held_from
        for (reader, k), read in zip(self.readers[v], reads, strict=True):
            if read is not None:
                placed = self.stage.values[reader].placed
                exclusive = placed is not None and placed.exclusive
                readers.append((reader, k))
                (y, y_end), (x, x_end) = read
                cuts.append(Cut(y - top, y_end - top, x - left, x_end - left, exclusive))
        height, width = row.ready - top, col.ready - left
        below = below and row.carried_from < row.ready and col.new > 0
        right = right and col.carried_from < col.ready and height > 0
        if below:
            cuts.append(Cut(row.carried_from - top, height, col.done - left, width))
        if right:
            cuts.append(Cut(0, height, col.carried_from - left, width))
        layout = Layout((row.done - top, col.done - left), (row.new, col.new), at)
        return BufferPlan(layout, readers, cuts, below, right)


def make_grid(stage: Stage, rows: Schedule, cols: Schedule) -> Grid:
    """The steps of these two schedules of `stage`."""
    readers: list[list[tuple[int, int]]] = [[] for _ in stage.values]
    for v, value in enumerate(stage.values):
        for k, source in enumerate(value.sources):
            readers[source].append((v, k))
    return Grid(stage, rows, cols, tuple(map(tuple, readers)))
