"""What one scan works on: where its tiles are read, where what it makes is kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.buffers import empty_like
from widefield.streaming.grid import Grid
from widefield.streaming.heap import Heap
from widefield.streaming.image import Source
from widefield.streaming.store import Store

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One scan: its `grid`, where its inputs are read, the names of its weights, the seed of its random masks.

    `store` is where the stage's `stored` maps are kept, `carry_store` where the saved carries are, of which `carry_sizes` are
    expected (bytes by dtype); the last `recorded` steps are recorded in the forward pass. `heap` is trimmed between steps.
    `autocast` gives a context with the
    autocast state of the forward pass; `progress(phase, done, steps)` is told of each step.
    """

    grid: Grid
    sources: Sequence[Source]
    weight_names: Sequence[str]
    seed: int
    store: Store
    carry_store: Store
    carry_sizes: Mapping[torch.dtype, int]
    recorded: int
    heap: Heap | None
    autocast: Callable[[], AbstractContextManager[Any]]
    progress: Progress | None

    def new(self, v: int, shape: tuple[int, ...], tile: Tensor) -> Tensor:
        """An empty tensor for the whole of output map `v`, of which `tile` is a part."""
        return self.store.empty(shape, tile) if v in self.grid.stage.stored else empty_like(tile, shape)

    def released(self, maps: Iterable[Tensor]) -> None:
        """The step is done: pages of tensors in files need not stay in memory, nor does what the heap has too much."""
        if self.heap is not None:
            self.heap.trim()
        if "file" not in (self.store.place, self.carry_store.place):
            return
        for x in (*maps, *(source.data for source in self.sources if isinstance(source.data, Tensor))):
            self.store.release(x)

    def read(self, i: int, j: int, needed: Sequence[bool] = ()) -> list[Tensor | None]:
        """The new tile of each stage input as its source gives it; a leaf of autograd where its gradient is `needed`."""
        raws: list[Tensor | None] = []
        for k, (v, source) in enumerate(zip(self.grid.stage.inputs, self.sources, strict=True)):
            y, x, height, width = self.region(v, i, j)
            raw = source.read(y, x, height, width) if height and width else None
            raws.append(raw.detach().requires_grad_() if raw is not None and needed and needed[k] else raw)
        return raws

    def region(self, v: int, i: int, j: int) -> tuple[int, int, int, int]:
        """Where map v's new tile of step (i, j) lies: y, x, height, width."""
        row, col = self.grid.rows[i][v], self.grid.cols[j][v]
        return row.done, col.done, row.new, col.new

    def tile_of(self, whole: Tensor, v: int, i: int, j: int) -> Tensor:
        """The part of map v that step (i, j) computes, in a tensor of the whole map's size."""
        axes, (y, x, height, width) = self.grid.stage.values[v].axes, self.region(v, i, j)
        return whole.narrow(axes.rows, y, height).narrow(axes.cols, x, width)
