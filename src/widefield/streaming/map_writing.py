"""Output maps that are written while they are computed: tiles go to a sink, and no map is in memory as a whole.

The engine knows no files. A target says what it needs (`MapTarget`), and takes tiles (`MapSink`); those that write files are
made by `widefield.images`.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from widefield.streaming.captured import Ref
from widefield.streaming.drafts import WrittenBytes
from widefield.streaming.foreground import Foreground, broadcast_mask
from widefield.streaming.grid import Box
from widefield.streaming.layers import cells_of
from widefield.streaming.need import Wanted, cells_in
from widefield.streaming.postprocess import Postprocess
from widefield.streaming.program import Program, Value
from widefield.streaming.receptive_field import Cells
from widefield.streaming.refusals import refuse_rolled_rows
from widefield.streaming.rules.rolled import straight


@dataclass(frozen=True)
class WrittenMap:
    """A map as it is written.

    Attributes:
        name: Where it stands in the result, as "low" or "1.0"; "" if the result is this map.
        shape: (..., height, width).
        dtype: NumPy's.
        labels: True for whole numbers that name something: a mean of them would mean nothing.
        origin: (y, x), the place of its first entry in the image, in pixels from the middle of the first one; see `Cells`.
        stride: (down, across), the distance of two entries in pixels of the image.
        row_bytes: Bytes of one row.
        sparse: True if positions may be left out, which are zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    labels: bool
    origin: tuple[float, float]
    stride: tuple[float, float]
    sparse: bool

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod((*self.shape[:-2], self.shape[-1]), dtype=np.int64))


class MapSink(Protocol):
    """A place that takes the tiles of maps."""

    @property
    def places(self) -> Sequence[Any]:
        """The places that are written: a path or an array for each map."""

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        """Take a tile (..., height, width) of a map, whose corner is at (y, x). No position comes twice."""

    def rows_done(self, number: int, y: int) -> None:
        """Learn that no later tile of a map holds a row above `y`."""


@runtime_checkable
class MapTarget(Protocol):
    """A place to write maps to, which may refuse them with a ValueError before anything is computed."""

    def buffer_rows(self, written: WrittenMap) -> int:
        """Return the number of rows of a map for which the sink needs memory, besides a row of tiles."""

    def begin(self, image: Any, maps: Sequence[WrittenMap]) -> AbstractContextManager[MapSink]:
        """Return the sink for the maps of an image. What it has written counts when the block ends without an error."""


@dataclass(frozen=True)
class ArrayTarget:
    """An array or tensor (numpy.memmap, torch.Tensor, zarr.Array, ...), or one for each map, to write into in place."""

    arrays: Sequence[Any]

    def buffer_rows(self, written: WrittenMap) -> int:
        return 0

    @contextmanager
    def begin(self, image: Any, maps: Sequence[WrittenMap]) -> Iterator["_ArraySink"]:
        if len(maps) != len(self.arrays):
            names = ", ".join(repr(each.name) for each in maps)
            raise ValueError(
                f"the result has {len(maps)} maps ({names}), and {len(self.arrays)} arrays were given to write to: give a list "
                "of one for each"
            )
        for array, each in zip(self.arrays, maps, strict=True):
            shape = tuple(array.shape)
            if shape != each.shape and (1, *shape) != each.shape:
                raise ValueError(f"a map of shape {each.shape} is written to an array of that shape: got {shape}")
            if each.sparse:
                array[...] = 0
        yield _ArraySink(self.arrays)


@dataclass(frozen=True)
class _ArraySink:
    places: Sequence[Any]

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        array = self.places[number]
        values: Any = torch.from_numpy(tile) if isinstance(array, Tensor) else tile
        if len(array.shape) < tile.ndim:
            values = values[0]
        array[..., y : y + tile.shape[-2], x : x + tile.shape[-1]] = values

    def rows_done(self, number: int, y: int) -> None:
        """Let go of the pages of an array in a file: the system has what was written, and this process needs it no more."""
        place = self.places[number]
        private = getattr(place, "mode", "") == "c"  # the file has nothing of what was written
        mapping = None if private else getattr(place, "_mmap", None)
        advice = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows
        if mapping is not None and advice is not None:
            mapping.madvise(advice)


def parse_target(to: Any) -> MapTarget:
    """Return the target that a user named. Raises ValueError if it is none."""
    if isinstance(to, MapTarget):
        return to
    several = isinstance(to, (list, tuple)) and len(to) > 0
    arrays = list(to) if several else [to]
    if all(hasattr(array, "shape") and hasattr(array, "__setitem__") for array in arrays):
        return ArrayTarget(arrays)
    import widefield  # whose first page knows where files are written: this part of it does not

    return widefield.map_target(to)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MapOutput:
    """A map of a scan on its way to a sink: `box` of it is written, with zeros where `foreground` has none."""

    written: WrittenMap
    value: Value
    number: int
    box: Box
    foreground: Foreground | None
    postprocess: Postprocess
    sink: MapSink | None = None

    @property
    def place(self) -> Any:
        """The path or array to which the map was written."""
        assert self.sink is not None
        return self.sink.places[self.number]

    @property
    def rolled(self) -> bool:
        """True if the map was rolled, so that its first rows may come last."""
        return self.value.target is straight

    def add(self, tile: Tensor, y: int, x: int) -> None:
        """Write a tile whose corner is at (y, x) of the whole map, or of what is scanned of a rolled one."""
        if not self.rolled:
            self._add(tile, y, x)
            return
        for top, height, row in _round(y + self.value.begin[0], tile.shape[self.value.axes.rows], self.value.extent[0]):
            part = tile.narrow(self.value.axes.rows, row, height)
            for left, width, col in _round(
                x + self.value.begin[1], tile.shape[self.value.axes.cols], self.value.extent[1]
            ):
                self._add(part.narrow(self.value.axes.cols, col, width), top, left)

    def _add(self, tile: Tensor, y: int, x: int) -> None:
        assert self.sink is not None
        rows, cols = self.value.axes
        spans = []
        for axis, at, begin, size in ((rows, y, *self.box[::2]), (cols, x, *self.box[1::2])):
            first, stop = max(at, begin), min(at + tile.shape[axis], begin + size)
            if stop <= first:
                return
            tile = tile.narrow(axis, first - at, stop - first)
            spans.append((first, stop - first))
        (top, height), (left, width) = spans
        tile = self.postprocess(tile.detach().movedim((rows, cols), (-2, -1)))
        if self.foreground is not None:
            mask = self.foreground.tile(self.value.extent, top, left, height, width, tile.device)
            tile = tile.masked_fill(~broadcast_mask(mask, tile.ndim, (tile.ndim - 2, tile.ndim - 1)), 0)
        done = self.postprocess.cast(tile).cpu().numpy()
        self.sink.write(self.number, top - self.box[0], left - self.box[1], done)

    def rows_done(self, y: int) -> None:
        """No later tile has a row of the whole map above `y`."""
        assert self.sink is not None
        if self.rolled and self.value.begin[0] and y < self.value.extent[0]:
            y = 0
        self.sink.rows_done(self.number, min(max(y - self.box[0], 0), self.box[2]))


def _round(start: int, count: int, size: int) -> list[tuple[int, int, int]]:
    """The places of `count` positions from `start` on in a map of `size` that goes round: first, count, place among them."""
    start %= size
    before = min(count, size - start)
    return [part for part in ((start, before, 0), (0, count - before, before)) if part[1]]


@dataclass(frozen=True)
class Writing:
    """The maps of a result that go to a `target`, by their names in the program.

    `replaced` are the names of those that are kept nowhere else.
    """

    target: MapTarget
    outputs: Mapping[str, MapOutput]
    replaced: frozenset[str]

    @contextmanager
    def begin(self, image: Any) -> Iterator[dict[str, MapOutput]]:
        """The outputs with a sink that takes them; see `MapTarget.begin`."""
        with self.target.begin(image, [output.written for output in self.outputs.values()]) as sink:
            yield {name: replace(output, sink=sink) for name, output in self.outputs.items()}

    @cached_property
    def memory(self) -> WrittenBytes:
        """Return the bytes that a plan counts for these maps."""
        fixed, per_row = 0, 0.0
        for name, output in self.outputs.items():
            rows = self.target.buffer_rows(output.written)
            fixed += rows * output.written.row_bytes - output.value.bytes * (name in self.replaced)
            per_row += output.written.row_bytes / output.written.stride[0] * (rows > 0)
        return WrittenBytes(fixed, per_row, self.replaced)


NOTHING_WRITTEN = Writing(ArrayTarget(()), {}, frozenset())


def plan_writing(
    program: Program, wanted: Wanted | None, to: Any, postprocess: Any, dtype: Any, device: torch.device
) -> Writing:
    """Return the maps in the result of `program` that are to be written.

    Raises:
        ValueError: there is none, or what was asked for cannot be done with them.
    """
    target = parse_target(to)
    if not isinstance(target, ArrayTarget):
        if (count := program.captured.image_shape[0]) > 1 and not isinstance(to, MapTarget):
            raise ValueError(f"a batch of {count} images cannot be written to a file: write one image at a time")
        refuse_rolled_rows(program, "writing a map to a file while it is computed")
    result, attributes = pytree.tree_unflatten(program.captured.outputs, program.captured.spec)
    values = {stage.values[v].name: stage.values[v] for stage in program.stages for v in stage.outputs}
    names: dict[str, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(result)[0]:
        if isinstance(leaf, Ref) and leaf.name in program.final_maps:
            names.setdefault(leaf.name, ".".join(_key(key) for key in path))
    if not names:
        why = f": {program.refused[0]}" if program.refused else ""
        raise ValueError(
            f"the result holds no map that is computed tile by tile, so there is nothing to write{why}. Call the model instead"
        )
    used_later = {name for item in program.items for name in program.reads(item)}
    used_later |= {leaf.name for leaf in pytree.tree_leaves(attributes) if isinstance(leaf, Ref)}
    image, cells = program.captured.image_shape, cells_of(program)
    region = None if wanted is None else wanted.region
    foreground = None if wanted is None else wanted.foreground
    outputs = {}
    for number, (name, where) in enumerate(names.items()):
        value = values[name]
        box = cells_in(region or (0, 0, image[2], image[3]), (image[2], image[3]), value.extent)
        others = [n for axis, n in enumerate(value.shape) if axis not in value.axes]
        finish = Postprocess.of(postprocess, dtype, (*others, *value.extent), value.dtype, device)
        origin, stride = _place(cells[name][1] if name in cells else None, value.extent, (image[2], image[3]))
        written = WrittenMap(
            name=where,
            shape=(*finish.leading, *box[2:]),
            dtype=finish.dtype,
            labels=finish.labels,
            origin=(origin[0] + box[0] * stride[0], origin[1] + box[1] * stride[1]),
            stride=stride,
            sparse=foreground is not None,
        )
        outputs[name] = MapOutput(written, value, number, box, foreground, finish)
    return Writing(target, outputs, frozenset(names) - used_later)


def _place(
    cells: Cells | None, extent: tuple[int, int], image: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return where the first entry of a map lies, and the distance of two, in pixels of the image from the middle of the first.

    A map that covers the image, as those of networks with padding do, has its entries side by side from the corner of the image on:
    the middle of a receptive field says little there, as it moves with each strided convolution of a network that goes down and
    up again. Without padding the middles of the receptive fields are the places. `cells` are None where the map depends on another
    map that was given, and not on the image.
    """
    if cells is None:
        cells = Cells(extent, (0.0, 0.0), (image[0] / extent[0], image[1] / extent[1]))
    y, x = (
        (stride - 1) / 2 if abs(count * stride - size) < stride else origin
        for count, stride, origin, size in zip(extent, cells.stride, cells.origin, image, strict=True)
    )
    return (y, x), cells.stride


def _key(key: Any) -> str:
    """The name of an entry of a tuple, a dictionary or another container that pytrees know."""
    return str(next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)))
