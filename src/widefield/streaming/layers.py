"""The geometry of every layer of a network: receptive field, stride, rows carried, and what tiles with halos would lose.

Plain arithmetic on what each op reads: it takes milliseconds for any network and any image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from widefield.streaming.extents import clamp
from widefield.streaming.grid import Grid
from widefield.streaming.program import Program, Value
from widefield.streaming.receptive_field import IDENTITY, Cells, ReceptiveField
from widefield.streaming.rules.rolled import turn


@dataclass(frozen=True, slots=True)
class Lost:
    """Rows and columns at the borders of a layer's output that depend on what lies beyond the borders of its image.

    A position is lost if its window touches padding, or a lost position of what it reads: a tiling with halos, which computes a
    tile as if it were the image, has to throw it away. The scan loses nothing. At most the height or width of the output.
    """

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, slots=True)
class Layer:
    """An op that reads windows of what comes before it: a convolution, pooling, resampling, padding or strided slice.

    `module_path` is where the op was called and `op` its name, `shape` that of its whole output. `receptive_field` is (height,
    width) in pixels of the image: what the output in the middle reads, from the first pixel to the last, were the image without
    borders; what operations over the whole image add to it does not count. `stride` is the distance of two outputs, (down,
    across) in pixels of the image, a fraction where the output is larger than the image. `rows_carried` is how many rows of the
    output, or of what follows from it position by position, are kept from one tile row to the next: the most of all tile rows
    from when all layers have begun until the image ends.

    `lost` is for a tile as large as the image. For another it is the same, as long as positions remain that are not lost, if the
    sizes differ by a multiple of the stride; otherwise the top and left are, and the bottom and right may differ by a few.
    """

    module_path: str
    op: str
    shape: tuple[int, ...]
    receptive_field: tuple[int, int]
    stride: tuple[float, float]
    rows_carried: int
    lost: Lost


def layers_of(program: Program, grids: Sequence[Grid]) -> tuple[Layer, ...]:
    """The layers of `program` in the order in which they are computed, streamed with one of `grids` per stage."""
    maps, number = _maps(program)
    image = number[program.captured.image]
    layers = [v for v, node in enumerate(maps) if node.is_layer]
    fields = _receptive_fields(maps, image, layers)
    (down, rows), (across, cols) = (_strides_and_lost(maps, image, axis) for axis in (0, 1))
    carried = _carried(maps, number, grids)
    return tuple(
        Layer(
            maps[v].value.module_path,
            maps[v].value.op.removeprefix("aten."),
            maps[v].value.shape,
            field,
            (down[v], across[v]),
            carried[v],
            Lost(rows[v][0], cols[v][0], rows[v][1], cols[v][1]),
        )
        for v, field in zip(layers, fields, strict=True)
    )


def cells_of(program: Program) -> dict[str, tuple[str, Cells]]:
    """Return the module path and the cells of every map that depends on the image, by name, in the order of computation."""
    maps, number = _maps(program)
    rows, cols = (_middles(maps, number[program.captured.image], axis) for axis in (0, 1))
    return {
        node.value.name: (
            node.value.module_path,
            Cells((_size(node.value, 0), _size(node.value, 1)), (row[0], col[0]), (row[1], col[1])),
        )
        for node, row, col in zip(maps, rows, cols, strict=True)
        if row is not None and col is not None
    }


def layer_table(layers: Sequence[Layer]) -> str:
    """`layers` as aligned text: a header, and a line each."""
    header = "layer, op, output, receptive field, stride, rows carried, lost: top, left, bottom, right"
    lines = [tuple(header.split(", "))]
    for layer in layers:
        lost = layer.lost
        sizes = (layer.shape, layer.receptive_field, layer.stride)
        counts = (layer.rows_carried, lost.top, lost.left, lost.bottom, lost.right)
        name = layer.module_path or "-"
        lines.append((name, layer.op, *("x".join(f"{n:.10g}" for n in size) for size in sizes), *map(str, counts)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(w) if k < 2 else text.rjust(w) for k, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


@dataclass(frozen=True, slots=True)
class _Map:
    """A map of any stage, and the maps that it reads: their numbers, and how along rows and columns."""

    value: Value
    reads: tuple[tuple[int, tuple[ReceptiveField, ReceptiveField]], ...]

    @property
    def is_layer(self) -> bool:
        """True if it is read through windows. Convolutions are layers even if theirs are of one position."""
        return self.value.facts.is_layer or any(field != _POINTWISE for _, field in self.reads)


_POINTWISE = (IDENTITY, IDENTITY)


def _maps(program: Program) -> tuple[list[_Map], dict[str, int]]:
    """All maps in topological order, each of them once, and their numbers by name."""
    maps: list[_Map] = []
    number: dict[str, int] = {}
    for stage in program.stages:
        for value in stage.values:
            if value.name in number or value.reduction is not None:
                continue  # left by an earlier stage, or computed there too; or no map
            if value.facts.repeats:
                number[value.name] = number[stage.values[value.sources[0]].name]
                continue
            reads = []
            for s, rows, cols in zip(value.sources, value.flow(0).axis_maps, value.flow(1).axis_maps, strict=True):
                fields = rows.receptive_field, cols.receptive_field
                if value.target is turn:
                    fields = _turned(value, stage.values[s], 0), _turned(value, stage.values[s], 1)
                if fields[0] is not None and fields[1] is not None:
                    reads.append((number[stage.values[s].name], (fields[0], fields[1])))
            number[value.name] = len(maps)
            maps.append(_Map(value, tuple(reads)))
    return maps, number


def _turned(value: Value, source: Value, axis: int) -> ReceptiveField:
    """Return how a map that is rolled reads the one before it, but for what comes from the other border."""
    size = _size(value, axis)
    shift = (value.begin[axis] - source.begin[axis]) % size
    shift -= size if 2 * shift > size else 0
    return ReceptiveField(1, 1, -shift, -shift)


def _middles(maps: Sequence[_Map], image: int, axis: int) -> list[tuple[float, float] | None]:
    """Return the first entry's middle and the stride of every map along an axis, in pixels; None for maps of weights alone.

    Where branches join whose middles differ, as behind pooling by 2 beside a convolution of 3, it is halfway between them.
    """
    found: list[tuple[float, float] | None] = [(0.0, 1.0) if v == image else None for v in range(len(maps))]
    for v, node in enumerate(maps):
        branches: list[tuple[float, float]] = []
        for s, fields in node.reads:
            if (at := found[s]) is not None:
                field = fields[axis]
                middle = at[0] + at[1] * (field.low + field.high) / (2 * field.den)
                branches.append((middle, at[1] * field.num / field.den))
        if branches:
            starts, strides = zip(*branches, strict=True)
            found[v] = (sum(starts) / len(starts), max(strides))
    return found


def _strides_and_lost(maps: Sequence[_Map], image: int, axis: int) -> tuple[list[float], list[tuple[int, int]]]:
    """Return the stride of every map along an axis, in pixels, and the positions lost at the beginning and at the end."""
    strides = [float(v == image) for v in range(len(maps))]  # weights that are read as maps have none
    lost: list[tuple[int, int]] = []
    for v, node in enumerate(maps):
        start, end, size = 0, 0, _size(node.value, axis)
        for s, fields in node.reads:
            field, (before, after) = fields[axis], lost[s]
            strides[v] = max(strides[v], strides[s] * field.num / field.den)
            start = max(start, field.start_after(before))
            end = max(end, size - field.stop_before(_size(maps[s].value, axis) - after))
        lost.append((clamp(start, 0, size), clamp(end, 0, size)))
    return strides, lost


def _receptive_fields(maps: Sequence[_Map], image: int, layers: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of what the middle of each layer's output depends on, in pixels; 0 for those of weights alone."""
    # For every map, both axes and every layer: the first position and minus the last that the layer's middle depends on.
    ends = np.full((len(maps), 2, 2, len(layers)), np.inf)
    for j, v in enumerate(layers):
        for axis in (0, 1):
            middle = _size(maps[v].value, axis) // 2
            ends[v, axis, :, j] = middle, -middle
    for v in reversed(range(len(maps))):
        for s, fields in maps[v].reads:
            read = ends[v]
            if fields != _POINTWISE:
                num, den = (np.array([field[k] for field in fields])[:, None, None] for k in (0, 1))
                read = np.ceil((read * num + [[[field.low], [-field.high]] for field in fields]) / den)
            np.minimum(ends[s], read, out=ends[s])
    sizes = np.maximum(0, 1 - ends[image].sum(1)).astype(int)
    return [(int(height), int(width)) for height, width in sizes.T]


def _carried(maps: Sequence[_Map], number: dict[str, int], grids: Sequence[Grid]) -> list[int]:
    """The most rows kept of every map, or of one that follows from it without another layer in between."""
    carried = [0] * len(maps)
    for grid in grids:
        rows, steps = grid.row_schedule, _steady(grid)
        most = (rows.ready_array[:, steps] - rows.kept_array[:, steps]).max(1).tolist()
        for value, count in zip(grid.stage.values, most, strict=True):
            if value.reduction is None:
                carried[number[value.name]] = max(carried[number[value.name]], count)
    for v, node in reversed(list(enumerate(maps))):
        if not node.is_layer:
            for s, _ in node.reads:
                carried[s] = max(carried[s], carried[v])
    return carried


def _steady(grid: Grid) -> slice:
    """The steps down the image after which all maps have begun and rows are still to come; all steps if there are none."""
    ready = grid.row_schedule.ready_array
    begun = int((ready <= 0).sum(1).max())
    ended = int((ready < ready[:, -1:]).sum(1)[list(grid.stage.inputs)].max())
    return slice(begun, ended) if begun < ended else slice(None)


def _size(value: Value, axis: int) -> int:
    return value.shape[value.axes[axis]]
