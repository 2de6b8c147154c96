"""Maps that several processes write together: the first has the file, and takes the rows that the others have made."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.streaming.map_writing import MapSink, MapTarget, Writing, WrittenMap
from widefield.streaming.ranks import Ranks
from widefield.streaming.store import Store

_STRIP_BYTES = 16 * 2**20
"""Bytes of a map that a process sends at a time."""


def split_writing(writing: Writing, ranks: Ranks, rows: Mapping[str, Sequence[int]], folder: str | None) -> Writing:
    """Return what one of several processes writes: of each map its band, of which all processes have so many `rows`.

    Args:
        writing: Of the whole maps.
        ranks: The processes.
        rows: By the names of the maps in the program.
        folder: For the files in which rows wait for the first process; None: the system's folder for temporary files.
    """
    outputs = {}
    for name, output in writing.outputs.items():
        y, x, _, width = output.box
        box = (y + sum(rows[name][: ranks.rank]), x, rows[name][ranks.rank], width)
        outputs[name] = replace(output, box=box)
    target = _SharedTarget(writing.target, ranks, [rows[name] for name in outputs], folder)
    return replace(writing, outputs=outputs, target=target)


@dataclass(frozen=True)
class _SharedTarget:
    """A `MapTarget` of several processes, of which the first has the target; see `split_writing`."""

    target: MapTarget
    ranks: Ranks
    rows: Sequence[Sequence[int]]
    folder: str | None

    def buffer_rows(self, written: WrittenMap) -> int:
        return self.target.buffer_rows(written)

    @contextmanager
    def begin(self, image: Any, maps: Sequence[WrittenMap]) -> Iterator["_Deferred"]:
        ranks, rank = self.ranks, self.ranks.rank
        with ExitStack() as stack:
            with ranks.together():
                inner: MapSink
                if rank == 0:
                    inner = stack.enter_context(self.target.begin(image, maps))
                else:
                    store = Store("file", self.folder)
                    room = [_room(each, rows[rank], store) for each, rows in zip(maps, self.rows, strict=True)]
                    inner = _Spool(room, store)
            paths = [os.fspath(one) if isinstance(one, (str, os.PathLike)) else None for one in inner.places]
            paths = ranks.everywhere(paths)[0]
            sink = _Deferred(inner, inner.places if rank == 0 else [path and Path(path) for path in paths])
            yield sink
            with ranks.together():  # of all that were computed
                sink.check()
            for number, each in enumerate(maps):
                self._collect(sink, number, max(1, _STRIP_BYTES // each.row_bytes))
            with ranks.together():
                sink.check()
                stack.close()

    def _collect(self, sink: "_Deferred", number: int, strip: int) -> None:
        """Bring the rows of a map to the first process, so many at a time."""
        rows, rank = self.rows[number], self.ranks.rank
        if isinstance(sink.inner, _Spool):
            for y in range(0, rows[rank], strip):
                part = sink.inner.arrays[number][..., y : y + strip, :]
                self.ranks.send_to_first(part.numpy().copy())
            return
        start = rows[0]
        for source in range(1, len(rows)):
            for y in range(start, start + rows[source], strip):
                found = self.ranks.receive(source)
                sink.write(number, y, 0, found)
                sink.rows_done(number, y + found.shape[-2])
            start += rows[source]


def _room(written: WrittenMap, rows: int, store: Store) -> Tensor:
    """Return a tensor of zeros in a file, for so many rows of a map."""
    like = torch.from_numpy(np.empty(0, written.dtype))
    shape = (*written.shape[:-2], max(rows, 1), written.shape[-1])  # no file is empty
    return store.zeros(shape, like).narrow(-2, 0, rows)


@dataclass(frozen=True)
class _Spool:
    """A sink that keeps the rows of a process until the first one takes them."""

    arrays: Sequence[Tensor]
    store: Store

    @property
    def places(self) -> Sequence[Any]:
        return self.arrays

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        height, width = tile.shape[-2:]
        self.arrays[number][..., y : y + height, x : x + width] = torch.from_numpy(tile)

    def rows_done(self, number: int, y: int) -> None:
        self.store.release(self.arrays[number])


@dataclass
class _Deferred:
    """A sink whose errors wait until no other process waits for this one; what comes after the first is left out."""

    inner: MapSink
    places: Sequence[Any]
    failed: Exception | None = None

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        self._do(lambda: self.inner.write(number, y, x, tile))

    def rows_done(self, number: int, y: int) -> None:
        self._do(lambda: self.inner.rows_done(number, y))

    def check(self) -> None:
        """Raise the error that there was."""
        if self.failed is not None:
            raise self.failed

    def _do(self, step: Callable[[], None]) -> None:
        if self.failed is None:
            try:
                step()
            except Exception as error:
                self.failed = error
