"""The surroundings of one scan: where its tiles are read, where its results are kept, what happens between steps."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.buffers import empty_like
from widefield.streaming.grid import Grid
from widefield.streaming.heap import Heap
from widefield.streaming.store import Store
from widefield.streaming.tiles import TileReader

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One scan: its `grid`, where its inputs are read, the names of its weights, the seed of its random masks.

    `store` is where the stage's `stored` maps are kept, `carry_store` where the saved carries are, of which `carry_sizes` are
    expected (bytes by dtype); the last `recorded` steps are recorded in the forward pass. `heap` is trimmed between steps.
    `settings` gives a context with the forward pass's autocast state and determinism; `progress(phase, done, steps)` is told
    of each step.
    """

    grid: Grid
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

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.readers[0].device

    def new(self, v: int, shape: tuple[int, ...], tile: Tensor) -> Tensor:
        """An empty tensor for the whole of output map `v`, of which `tile` is a part."""
        return self.store.empty(shape, tile) if v in self.grid.stage.stored else empty_like(tile, shape)

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
            self.progress(phase, done, self.grid.steps)

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
        raws: list[Tensor | None] = []
        for v, reader in zip(self.grid.stage.inputs, self.readers, strict=True):
            y, x, height, width = self.box(v, i, j)
            raws.append(reader.fetch(y, x, height, width) if height and width else None)
        return raws

    def _to_device(self, raws: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if raw is None else reader.to_device(raw) for reader, raw in zip(self.readers, raws, strict=True)]

    def box(self, v: int, i: int, j: int) -> tuple[int, int, int, int]:
        """Return the region of map v that step (i, j) computes: y, x, height, width, in pixels of the map."""
        row, col = self.grid.rows[i][v], self.grid.cols[j][v]
        return row.done, col.done, row.new, col.new

    def tile_of(self, whole: Tensor, v: int, i: int, j: int) -> Tensor:
        """The part of map v that step (i, j) computes, in a tensor of the whole map's size."""
        axes, (y, x, height, width) = self.grid.stage.values[v].axes, self.box(v, i, j)
        return whole.narrow(axes.rows, y, height).narrow(axes.cols, x, width)
