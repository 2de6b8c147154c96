"""Operations that move elements without computing: views, permutations, slices, concatenation, pixel shuffle."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.extents import AxisMap, Piece, Window, identity, repeat
from widefield.streaming.rules import flat, ranges
from widefield.streaming.rules.base import (
    Axes,
    Maps,
    Placed,
    Read,
    TileContext,
    argument,
    called,
    declare,
    dims,
    groups,
    only_map,
    refuse_whole,
    rewrite,
    rule,
    sources,
)
from widefield.streaming.rules.rewriting import Rewriting

aten = torch.ops.aten


@rule(
    *(aten.permute, aten.transpose, aten.movedim, aten.swapaxes, aten.swapdims),
    cheap=True,
    flat=flat.permuted,
    range_of=ranges.permuted,
    exact=True,
)
def permute(node: Node, maps: Maps) -> Placed:
    """Dimensions in another order."""
    name = only_map(node, maps)
    ndim = len(maps.shapes[name])
    # What the operator does to the dimensions shows on a tensor whose sizes are their numbers.
    order = list(node.target(torch.empty(tuple(range(ndim)), device="meta"), *node.args[1:], **node.kwargs).shape)
    axes = Axes(order.index(maps.axes[name].rows), order.index(maps.axes[name].cols))
    return Placed((maps.read(name),), axes, lambda tiles, context: tiles[0].permute(order))


@rule(
    *(aten.view, aten.reshape, aten._unsafe_view, aten.view_as, aten.reshape_as),
    *(aten.unsqueeze, aten.squeeze, aten.unflatten, aten.flatten),
    keeps_batch=True,
    flat=flat.reshaping,
    range_of=ranges.reshaped,
    exact=True,
)
def reshape(node: Node, maps: Maps) -> Placed:
    """A new shape, as long as height and width stay apart from each other, with H = 12 and W = 20 for example:

        (2, 8, 12, 20) -> (16, 12, 20)           they stay as they are
        (2, 8, 12, 20) -> (2, 8, 3, 4, 5, 4)     cut in windows of 4 x 4: a height of 3 and a width of 5
        (2, 12, 3, 20) -> (2, 36, 20)            depth to space: each row becomes three

    Of a map with a single row, any dimension of size 1 among those around it may be the height.
    """
    if node.target is aten.view.dtype:
        raise node.refuse("reads the bits of a map as another dtype", "convert with .to(dtype)")
    name = sources(node, maps)[0]
    shape_in, shape_out, axes = maps.shapes[name], node.shape, maps.axes[name]
    found: list[tuple[int, AxisMap, int]] = []
    cut = [next(g for g in groups(shape_in, shape_out) if axis in g[0]) for axis in axes]
    # Both split in two are windows, and of a map with one row of windows the first of the two is the height all the same.
    windows = all(len(group_in) == 1 and len(group_out) == 2 for group_in, group_out in cut)
    for axis, (group_in, group_out) in zip(axes, cut, strict=True):
        size = shape_in[axis]
        wide_in = [d for d in group_in if shape_in[d] > 1]
        wide_out = list(group_out) if windows else [d for d in group_out if shape_out[d] > 1]
        if wide_in == [axis] and len(wide_out) <= 2:
            factor = size // shape_out[wide_out[0]]
            found.append((wide_out[0], Window(size, size // factor, factor, factor), 1))
            continue
        with_next = wide_in == [axis + 1] and len(group_out) == 1 if size == 1 else wide_in[:-1] == [axis]
        if with_next and len(wide_out) == 1 and wide_in[-1] not in axes:
            factor = shape_in[wide_in[-1]]
            found.append((wide_out[0], repeat(size, factor), factor))
            continue
        free = [d for d in group_out if shape_out[d] == 1 and d not in [place for place, _, _ in found]]
        if size > 1 or set(axes) - {axis} & set(wide_in) or not free:
            raise refuse_whole(node, "flattens")
        found.append((free[0], identity(1), 1))
    (rows, rows_map, rows_factor), (cols, cols_map, cols_factor) = found

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        shape = list(shape_out)
        row, col = context.rows[0], context.cols[0]
        shape[rows] = row.size if rows_factor == 1 else (row.last - row.first) * rows_factor
        shape[cols] = col.size if cols_factor == 1 else (col.last - col.first) * cols_factor
        full = tiles[0].reshape(shape)
        if rows_factor > 1:
            full = full.narrow(rows, row.start - row.first * rows_factor, row.size)
        return full.narrow(cols, col.start - col.first * cols_factor, col.size) if cols_factor > 1 else full

    return Placed((Read(name, rows_map, cols_map),), Axes(rows, cols), run)


declare(aten.reshape, is_view=True)


@rule(flat.apart, keeps_batch=True, is_view=True, range_of=ranges.reshaped, exact=True)
def set_apart(node: Node, maps: Maps) -> Placed:
    """A reshape of which it is known where height and width stand afterwards."""
    name, (shape, rows, cols) = only_map(node, maps), node.args[1:]
    axes, shape_in = maps.axes[name], maps.shapes[name]
    parts_in = shape_in[: axes.rows], shape_in[axes.rows + 1 : axes.cols], shape_in[axes.cols + 1 :]
    if list(map(prod, parts_in)) != list(map(prod, (shape[:rows], shape[rows + 1 : cols], shape[cols + 1 :]))):
        raise refuse_whole(node, "flattens")

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        of_tile = list(shape)
        of_tile[rows], of_tile[cols] = context.rows[0].size, context.cols[0].size
        return tiles[0].reshape(of_tile)

    return Placed((maps.read(name),), Axes(rows, cols), run)


@rule(aten.expand, aten.repeat, flat=flat.sizes, range_of=ranges.expanded, exact=True)
def expand(node: Node, maps: Maps) -> Placed:
    """Repetition along dimensions other than height and width."""
    name = only_map(node, maps)
    sizes = list(node.args[1])
    added = len(sizes) - len(maps.shapes[name])
    axes = Axes(maps.axes[name].rows + added, maps.axes[name].cols + added)
    for axis, extent in zip(axes, maps.extent(name), strict=True):
        if node.shape[axis] != extent:
            raise refuse_whole(node, "repeats")
        sizes[axis] = -1 if node.op == "aten.expand" else 1
    repeats = node.op == "aten.repeat"
    return Placed(
        (maps.read(name),), axes, lambda tiles, context: tiles[0].repeat(sizes) if repeats else tiles[0].expand(sizes)
    )


@rule(aten.repeat_interleave, saves=(), flat=flat.along(2))
def repeat_each(node: Node, maps: Maps) -> Placed:
    """Each position of a dimension so many times, height and width included."""
    name, factor, dim = only_map(node, maps), node.args[1], argument(node, 2, "dim")
    axes, read = maps.axes[name], maps.read(name)
    if dim is None:
        raise refuse_whole(node, "flattens")
    if not isinstance(factor, int):
        raise node.refuse("repeats positions differently often", "give a number for all of them")
    dim = dims(node, dim, len(node.shape))[0]
    if dim in axes:
        along = repeat(maps.shapes[name][dim], factor)
        read = Read(name, along, read.cols) if dim == axes.rows else Read(name, read.rows, along)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        full = tiles[0].repeat_interleave(factor, dim)
        if dim not in axes:
            return full
        span = (context.rows if dim == axes.rows else context.cols)[0]
        return full.narrow(dim, span.start - span.first * factor, span.size)

    return Placed((read,), axes, run)


@rule(aten.slice, flat=flat.along(1, default=0), range_of=ranges.cut, exact=True)
def take_slice(node: Node, maps: Maps) -> Placed:
    """A range with a step, along any dimension."""
    name = only_map(node, maps)
    axes, ndim = maps.axes[name], len(maps.shapes[name])
    dim = dims(node, argument(node, 1, "dim", 0), ndim)[0]
    size = maps.shapes[name][dim]
    start, _, step = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)).indices(
        size
    )
    length = node.shape[dim]
    read = maps.read(name)
    if dim not in axes:
        stop = start + (length - 1) * step + 1
        index = (slice(None),) * dim + (slice(start, stop, step),)
        return Placed((read,), axes, lambda tiles, context: tiles[0][index])
    window = Window(size, length, stride=step, padding=-start)
    along_rows = dim == axes.rows
    index = (slice(None),) * dim + (slice(None, None, step),)
    return Placed(
        (Read(name, window if along_rows else read.rows, read.cols if along_rows else window),),
        axes,
        lambda tiles, context: tiles[0][index],
    )


@rule(aten.select, aten.unbind, flat=flat.along(1, default=0), range_of=ranges.selected, exact=True)
def select(node: Node, maps: Maps) -> Placed:
    """One index of a dimension, which goes."""
    name = only_map(node, maps)
    axes = maps.axes[name]
    dim = dims(node, argument(node, 1, "dim", 0), len(maps.shapes[name]))[0]
    if dim in axes:
        raise node.refuse("takes one row or column", "take a slice of length 1, or do it outside of the streamed part")
    return called(node, maps, Axes(*(axis - (dim < axis) for axis in axes)))


@rule(aten.flip, saves=(), flat=flat.along(1, name="dims"), range_of=ranges.flipped, exact=True)
@rule(aten.roll, saves=(), range_of=ranges.anywhere)
@rule(aten.split, aten.split_with_sizes, aten.chunk, flat=flat.along(2, default=0), range_of=ranges.cut, exact=True)
@rule(aten.tensor_split, flat=flat.along(2, default=0))
@rule(aten.index_select, flat=flat.along(1, default=0), range_of=ranges.anywhere)
@rule(aten.narrow, flat=flat.along(1, default=0))
def along_another_dimension(node: Node, maps: Maps) -> Placed:
    """Cutting or reordering a dimension other than height and width."""
    name = only_map(node, maps)
    position = {"aten.index_select": 1, "aten.narrow": 1, "aten.flip": 1}.get(node.op, 2)
    default = None if node.op in ("aten.flip", "aten.roll") else 0
    if set(dims(node, argument(node, position, "dim", default), len(maps.shapes[name]))) & set(maps.axes[name]):
        raise refuse_whole(node, "cuts or reorders")
    return called(node, maps, maps.axes[name])


@rule(aten.unfold, flat=flat.along(1, name="dimension"))
def windows(node: Node, maps: Maps) -> Placed:
    """Overlapping windows of a dimension, as a dimension of their own at the end."""
    name = only_map(node, maps)
    axes = maps.axes[name]
    dim, size, step = dims(node, node.args[1], len(maps.shapes[name]))[0], node.args[2], node.args[3]
    sides = [
        Window(n, node.shape[axis], size, step) if axis == dim else identity(n)
        for axis, n in zip(axes, maps.extent(name), strict=True)
    ]
    return Placed((Read(name, *sides),), axes, lambda tiles, context: tiles[0].unfold(dim, size, step))


@rewrite(aten.index, flat=flat.indexed)
def pick(node: Node, maps: Maps) -> list[Node]:
    """A list of indices, the same for every image, along one dimension that is neither height nor width."""
    name = only_map(node, maps)
    places = [(d, index) for d, index in enumerate(node.args[1]) if index is not None]
    if len(places) != 1 or places[0][0] in maps.axes[name] or len(maps.shapes[places[0][1].name]) != 1:
        raise node.refuse("picks positions by index", "use slices, or index one other dimension by a list")
    dim, index = places[0]
    new = Rewriting(node)
    counted = new.add("index", from_the_start, (index, maps.shapes[name][dim]), maps.shapes[index.name])
    return new.result(aten.index_select.default, Ref(name), dim, counted)


def from_the_start(index: Tensor, size: int) -> Tensor:
    """Indices into `size` elements, negative ones counted from the end. Raises IndexError, as PyTorch does, for others."""
    return torch.arange(size, device=index.device)[index]


@rule(
    aten.cat, saves=(), keeps_batch=True, flat=flat.along(1, default=0, joins=True), range_of=ranges.joined, exact=True
)
@rule(aten.stack, saves=(), flat=flat.along(1, default=0, inserts=True), range_of=ranges.joined, exact=True)
@rule(aten.slice_scatter)
def join(node: Node, maps: Maps) -> Placed:
    """Joining maps along a dimension other than height and width; weights join where they are as large as the image."""
    names = sources(node, maps)
    stacked = node.op == "aten.stack"
    position = 2 if node.op == "aten.slice_scatter" else 1
    axes_in = {maps.axes[name] for name in names}
    ndim = len(node.shape)
    dim = dims(node, argument(node, position, "dim", 0), ndim)[0]
    if node.op == "aten.cat" and axes_in == {axes := maps.axes[names[0]]} and dim in axes:
        return _joined_along(node, maps, dim)
    if len(axes_in) > 1 or len({maps.extent(name) for name in names}) > 1:
        raise _different(node, maps)
    axes = axes_in.pop()
    if stacked:
        axes = Axes(*(axis + (dim <= axis) for axis in axes))
    if dim in axes:
        raise refuse_whole(node, "joins along")
    items = list(node.args[0]) if isinstance(node.args[0], (list, tuple)) else list(node.args[:2])
    for k, item in enumerate(items):
        if isinstance(item, Ref) and item.name not in maps:
            items[k] = Ref(maps.broadcast_weight(item.name, maps.axes[names[0]], maps.shapes[item.name]))
    args = (items, *node.args[1:]) if isinstance(node.args[0], (list, tuple)) else (*items, *node.args[2:])
    return called(replace(node, args=args), maps, axes)


def _joined_along(node: Node, maps: Maps, dim: int) -> Placed:
    """Joining maps along height or width."""
    names, reads, offset = sources(node, maps), [], 0
    axes = maps.axes[names[0]]
    other = axes.cols if dim == axes.rows else axes.rows
    if len(names) < len(node.args[0]) or any(maps.shapes[name][other] != node.shape[other] for name in names):
        raise _different(node, maps)
    for name in names:
        size = maps.shapes[name][dim]
        read, along = maps.read(name), Piece(size, node.shape[dim], offset)
        reads.append(replace(read, rows=along) if dim == axes.rows else replace(read, cols=along))
        offset += size

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        some, dtype = [tile for tile in tiles if tile.shape[dim]], reduce(torch.promote_types, (x.dtype for x in tiles))
        return (some[0] if len(some) == 1 else torch.cat(some, dim)).to(dtype)

    return Placed(tuple(reads), axes, run)


@rule(aten.select_scatter)
def put(node: Node, maps: Maps) -> Placed:
    """`x` with one index of a dimension replaced by `source`, as `x[:, k] = source` does."""
    whole, part = (arg.name for arg in node.args[:2])
    dim = dims(node, argument(node, 2, "dim", 0), len(node.shape))[0]
    if whole not in maps or part not in maps or dim in maps.axes[whole] or maps.extent(whole) != maps.extent(part):
        raise _different(node, maps)
    axes = maps.axes[whole]
    if maps.axes[part] != tuple(axis - (dim < axis) for axis in axes):
        raise _different(node, maps)
    return called(node, maps, axes)


def _different(node: Node, maps: Maps) -> UnsupportedOpError:
    return node.refuse(
        f"joins maps of different layout or size: {', '.join(str(maps.shapes[name]) for name in node.refs)}",
        "bring them to the same height and width, in the same dimensions, first",
    )


def _channels_first(node: Node, maps: Maps) -> str:
    """The one map that a node reads, with its channels before height and width."""
    name = only_map(node, maps)
    ndim = len(maps.shapes[name])
    if maps.axes[name] != (ndim - 2, ndim - 1):
        raise node.refuse("needs a map (N, C, H, W)", "permute the map so that height and width come last")
    return name


@rule(aten.pixel_shuffle, saves=())
def pixel_shuffle(node: Node, maps: Maps) -> Placed:
    """Depth to space: each position becomes a square of them."""
    name = _channels_first(node, maps)
    factor = node.args[1]
    height, width = maps.extent(name)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        full = torch.pixel_shuffle(tiles[0], factor)
        row, col = context.rows[0], context.cols[0]
        full = full.narrow(-2, row.start - row.first * factor, row.size)
        return full.narrow(-1, col.start - col.first * factor, col.size)

    return Placed((Read(name, repeat(height, factor), repeat(width, factor)),), maps.axes[name], run)


@rule(aten.pixel_unshuffle, saves=())
def pixel_unshuffle(node: Node, maps: Maps) -> Placed:
    """Space to depth: a square of positions becomes one."""
    name = _channels_first(node, maps)
    factor = node.args[1]
    height, width = maps.extent(name)
    read = Read(name, Window(height, height // factor, factor, factor), Window(width, width // factor, factor, factor))
    return Placed((read,), maps.axes[name], lambda tiles, context: torch.pixel_unshuffle(tiles[0], factor))


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(node: Node, maps: Maps) -> Placed:
    """Channels dealt out to groups; by hand, as PyTorch's kernel for CUDA takes contiguous tensors only."""
    name, groups = _channels_first(node, maps), node.args[1]
    if maps.axes[name].rows < 2:
        raise node.refuse("deals out dimension 1, which is the height", "give it a map (N, C, H, W)")

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        return tiles[0].unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    return Placed((maps.read(name),), maps.axes[name], run)
