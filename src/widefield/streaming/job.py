"""The surroundings of one scan: where its tiles are read, where its results are kept, what happens between steps."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.foreground import Foreground, broadcast_mask
from widefield.streaming.grid import Box, Grid
from widefield.streaming.heap import Heap
from widefield.streaming.map_writing import MapOutput
from widefield.streaming.need import PartialGrid
from widefield.streaming.ranks import Ranks
from widefield.streaming.rules.rolled import straight
from widefield.streaming.store import Store
from widefield.streaming.tiles import TileReader

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One scan: its `grid`, where its inputs are read, the names of its weights, the seed of its random masks.

    `foreground` is that of the image, if it has a mask.

    `store` is where the stage's `stored` maps are kept, `carry_store` where the saved carries are, of which `carry_sizes` are
    expected (bytes by dtype); the last `recorded` steps are recorded in the forward pass. `heap` is trimmed between steps.
    `settings` gives a context with the forward pass's autocast state and determinism; `progress(phase, done, steps)` is told
    of each step. `ranks` are the processes that share the image. `written` are the output maps that go to a sink, `replaced`
    those of them that are kept nowhere else.
    """

    grid: Grid | PartialGrid
    foreground: Foreground | None
    readers: Sequence[TileReader]
    weight_names: Sequence[str]
    seed: int
    store: Store
    carry_store: Store
    carry_sizes: Mapping[torch.dtype, int]
    recorded: int
    heap: Heap | None
    settings: Callable[[], AbstractContextManager[Any]]
    progress: Progress | None
    ranks: Ranks | None = None
    written: Mapping[int, MapOutput] = field(default_factory=dict)
    replaced: frozenset[int] = frozenset()

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.readers[0].device

    @cached_property
    def boxes(self) -> dict[int, Box]:
        """The part of each output map that is made: y, x, height, width."""
        return {v: self.grid.part(v) for v in self.grid.stage.outputs}

    def new(self, v: int, like: Tensor) -> Tensor:
        """A tensor for the part of output map `v` that is made, in the dtype and memory format of `like`; zero where it is not."""
        size = (0, 0) if v in self.replaced else self.boxes[v][2:]
        shape = self.grid.stage.values[v].tile_shape(*size)
        store = self.store if v in self.grid.stage.stored else Store()
        return store.empty(shape, like) if isinstance(self.grid, Grid) else store.zeros(shape, like)

    def first_row(self, v: int, i: int) -> int:
        """Return the first row of map v that the steps of tile row i, and those below, compute."""
        grid = self.grid if isinstance(self.grid, Grid) else self.grid.whole
        return grid.row_schedule.ready[v][i]

    def step_done(self, phase: str, done: int, tensors: Iterable[Tensor]) -> None:
        """Give memory back between two steps, `done` of them being done, and report progress.

        Pages of `tensors`, and of inputs, that lie in files need not stay in memory; nor does what the heap has too much.
        """
        if self.heap is not None:
            self.heap.trim()
        if "file" in (self.store.place, self.carry_store.place):
            for x in (*tensors, *(reader.data for reader in self.readers if isinstance(reader.data, Tensor))):
                self.store.release(x)
        if self.progress:
            self.progress(phase, done, len(self.grid.order))

    def tiles(self, steps: Iterable[tuple[int, int]]) -> Generator[list[Tensor | None]]:
        """The new tiles of the stage inputs in each of `steps`, as their readers give them.

        Of an image that is read lazily, the next tile is read in the background while a step is computed. Close this generator:
        that ends the reader's thread.
        """
        if all(isinstance(reader.data, Tensor) for reader in self.readers):
            yield from (self._to_device(self._fetch(i, j)) for i, j in steps)
            return
        thread = ThreadPoolExecutor(1, "widefield-reader")
        coming: deque[Future[list[Tensor | None]]] = deque()
        try:
            for i, j in steps:
                coming.append(thread.submit(self._fetch, i, j))
                if len(coming) > 1:
                    yield self._to_device(coming.popleft().result())
            while coming:
                yield self._to_device(coming.popleft().result())
        finally:
            thread.shutdown(cancel_futures=True)

    def _fetch(self, i: int, j: int) -> list[Tensor | None]:
        """The new tiles of step (i, j) where they can be moved to the device from; None where there is none."""
        zipped = zip(self.readers, self._input_boxes(i, j), strict=True)
        return [reader.fetch(*box) if box[2] and box[3] else None for reader, box in zipped]

    def normalised(self, raw_tiles: Sequence[Tensor | None], i: int, j: int) -> list[Tensor | None]:
        """Return raw tiles of the inputs in step (i, j) as the network sees them."""
        zipped = zip(self.readers, raw_tiles, self._input_boxes(i, j), strict=True)
        return [None if raw is None else reader.normalised(raw, *box[:2]) for reader, raw, box in zipped]

    def _input_boxes(self, i: int, j: int) -> list[Box]:
        return [self.grid.box(v, i, j) for v in self.grid.stage.inputs]

    def masks(self, v: int, i: int, j: int) -> tuple[Tensor, ...] | None:
        """Return the foreground in each tile that map v reads in step (i, j); None where it does not matter."""
        value = self.grid.stage.values[v]
        if self.foreground is None or not (value.reduction is not None or value.facts.masked):
            return None
        masks = []
        for s, row, col in zip(value.sources, *self.grid.spans(v, i, j), strict=True):
            box = row.first, col.first, row.last - row.first, col.last - col.first
            source = self.grid.stage.values[s]
            while source.facts.repeats:  # the positions that it holds again are those of the map that goes round
                source = self.grid.stage.values[source.sources[0]]
            mask = self.foreground.tile(source.extent, *box, self.device, source.begin)
            masks.append(broadcast_mask(mask, len(source.shape), source.axes))
        return tuple(masks)

    def _to_device(self, raw_tiles: Sequence[Tensor | None]) -> list[Tensor | None]:
        zipped = zip(self.readers, raw_tiles, strict=True)
        return [None if raw is None else reader.to_device(raw) for reader, raw in zipped]

    def summed(
        self, gradients: list[Tensor | None], tensors: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Sum gradients of inputs and weights over the processes; those of maps between stages are each process's own."""
        if self.ranks is None:
            return gradients
        own = [reader.store is not None for reader in self.readers]
        for k, (x, need) in enumerate(zip(tensors, needed, strict=True)):
            if need and x is not None and not (k < len(own) and own[k]):
                gradient = gradients[k]
                gradients[k] = self.ranks.add_up(torch.zeros_like(x) if gradient is None else gradient)
        return gradients

    def tiles_of(self, made: Tensor, v: int, i: int, j: int) -> list[list[Tensor]]:
        """Return the part of output map v that step (i, j) computes, in a tensor of all that is made of it.

        It is one piece, or several in rows and columns where it goes over the border of a rolled map.
        """
        value, (y, x, height, width) = self.grid.stage.values[v], self.grid.box(v, i, j)
        y0, x0 = self.boxes[v][:2]
        if value.target is not straight:
            return [[made.narrow(value.axes.rows, y - y0, height).narrow(value.axes.cols, x - x0, width)]]
        rows = _pieces(made, value.axes.rows, y + value.begin[0], height)
        return [_pieces(row, value.axes.cols, x + value.begin[1], width) for row in rows]


def _pieces(whole: Tensor, dim: int, start: int, count: int) -> list[Tensor]:
    """Return `count` positions of `whole` along `dim` from `start` on, going round, in one or two pieces."""
    size = whole.shape[dim]
    start %= size
    before = min(count, size - start)
    pieces = [whole.narrow(dim, start, before), whole.narrow(dim, 0, count - before)]
    return [piece for piece in pieces if piece.shape[dim]]
