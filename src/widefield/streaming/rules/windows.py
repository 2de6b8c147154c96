"""Sliding windows: convolution, pooling, transposed convolution, padding.

Padding is added only where a window crosses the border of the whole image (`Span.low`, `Span.high`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import BorderPad, Span, Transposed, Window, clamp
from widefield.streaming.local import Draws, LocalCall
from widefield.streaming.rules import flat, ranges
from widefield.streaming.rules.base import (
    STREAM,
    Axes,
    Flattened,
    Maps,
    Placed,
    PooledFrom,
    Read,
    TileContext,
    argument,
    declare,
    only_map,
    rule,
)
from widefield.streaming.rules.reductions import precise

aten = torch.ops.aten
NCHW = Axes(2, 3)


def _pair(value: Any, default: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return default
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _require_nchw(node: Node, maps: Maps, name: str) -> None:
    if maps.axes[name] != NCHW or len(maps.shapes[name]) != 4:
        raise node.refuse(
            f"needs a map (N, C, H, W) and gets one of shape {maps.shapes[name]} "
            f"with height and width in dimensions {tuple(maps.axes[name])}",
            "permute the map so that height and width come last",
        )


def _windows(
    maps: Maps, node: Node, name: str, extent: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Read:
    sizes = zip(maps.extent(name), node.shape[-2:], extent, stride, padding, strict=True)
    rows, cols = (Window(*size) for size in sizes)
    return Read(name, rows, cols)


class _Padding(NamedTuple):
    """Padding along one axis: `native` is added by the operator at both ends, `low` and `high` before it runs. Of what the
    operator then makes, the first `skip` positions are dropped, and those that are too many at the end.
    """

    native: int
    low: int = 0
    high: int = 0
    skip: int = 0


def _padding(span: Span, read: Window) -> _Padding:
    """Operators pad both ends alike, without a copy of the tile. What a window at the far end adds too much is dropped."""
    wanted = max(span.low, span.high)
    if (wanted - span.low) % read.stride:
        return _Padding(0, span.low, span.high)
    return _Padding(wanted, skip=(wanted - span.low) // read.stride)


def _run_padded(
    tile: Tensor, context: TileContext, read: Read, value: float, run: Callable[[Tensor, tuple[int, int]], Tensor]
) -> Tensor:
    """`run(tile, padding)` for the outputs of `context`; padding that operators cannot add is `value`."""
    assert isinstance(read.rows, Window) and isinstance(read.cols, Window)
    if tile.numel():
        rows, cols = _padding(context.rows[0], read.rows), _padding(context.cols[0], read.cols)
    else:  # windows of nothing but padding: operators refuse an empty tile
        rows, cols = (_Padding(0, span.low, span.high) for span in (context.rows[0], context.cols[0]))
    if rows.low or rows.high or cols.low or cols.high:
        tile = F.pad(tile, (cols.low, cols.high, rows.low, rows.high), value=value)
    made = run(tile, (rows.native, cols.native))
    for dim, skip, size in ((2, rows.skip, context.rows[0].size), (3, cols.skip, context.cols[0].size)):
        if made.shape[dim] != size:
            made = made.narrow(dim, skip, size)
    return made


declare(aten.conv1d, flat=flat.pointwise_conv1d)


@rule(aten.conv2d, keeps_batch=True, carries_relu=True, is_layer=True)
def convolution(node: Node, maps: Maps) -> Placed:
    """Convolution, cross-correlation form, with zero padding."""
    name = only_map(node, maps)
    _require_nchw(node, maps, name)
    weight = node.args[1].name
    bias = argument(node, 2, "bias")
    stride = _pair(argument(node, 3, "stride"))
    padding = argument(node, 4, "padding", 0)
    dilation = _pair(argument(node, 5, "dilation"))
    groups = argument(node, 6, "groups", 1)
    extent = [(k - 1) * d + 1 for k, d in zip(maps.shapes[weight][-2:], dilation, strict=True)]
    if padding == "same":  # what is left over goes to the far end
        before = ((extent[0] - 1) // 2, (extent[1] - 1) // 2)
    else:
        before = (0, 0) if padding == "valid" else _pair(padding, (0, 0))
    read = _windows(maps, node, name, extent, stride, before)
    # Taking the positions first is the same, and keeps clear of a crash in oneDNN: its backward pass of a strided 1x1 convolution
    # in channels_last writes out of bounds for some channel counts (torch 2.15, 8 and 12 input channels, even sizes).
    subsampling = extent == [1, 1] and max(stride) > 1 and tuple(before) == (0, 0)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        w, b = context.weights[weight], context.weights[bias.name] if isinstance(bias, Ref) else None
        if subsampling:
            return F.conv2d(_subsampled(tiles[0], stride), w, b, groups=groups)
        return _run_padded(
            tiles[0], context, read, 0.0, lambda tile, native: F.conv2d(tile, w, b, stride, native, dilation, groups)
        )

    return Placed((read,), NCHW, run, exclusive=True)


def _subsampled(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """`x[:, :, :: stride[0], :: stride[1]]`, whose gradient is in channels_last if `x` is; that of slices is always contiguous."""
    n, channels, *size = x.shape
    rows, cols = (len(range(0, length, step)) for length, step in zip(size, stride, strict=True))
    gaps, expanded = x.stride()[1::2] != (1, channels), n > 1 and x.stride(0) < x.stride(2) * size[0]
    if gaps or expanded:
        return x[:, :, :: stride[0], :: stride[1]]
    strides = (*x.stride()[:2], x.stride(2) * stride[0], x.stride(3) * stride[1])
    return x.as_strided((n, channels, rows, cols), strides, x.storage_offset())


@rule(aten.conv3d, keeps_batch=True, is_layer=True)
def convolution_beside(node: Node, maps: Maps) -> Placed:
    """Convolution along height, width and a third dimension, of which every tile holds all."""
    name, weight = only_map(node, maps), node.args[1].name
    axes, padding = maps.axes[name], argument(node, 4, "padding", 0)
    if len(maps.shapes[name]) != 5 or min(axes) < 2 or padding == "same":
        raise node.refuse(
            f"needs a map of five dimensions, height and width among the last three, and gets {maps.shapes[name]}",
            "permute the map, and give the padding in numbers",
        )
    padding = 0 if padding == "valid" else padding
    stride, padding, dilation = (
        list(value) * (3 // len(value)) if isinstance(value, (list, tuple)) else [value] * 3
        for value in (argument(node, 3, "stride", 1), padding, argument(node, 5, "dilation", 1))
    )
    kernel, groups = maps.shapes[weight][2:], argument(node, 6, "groups", 1)
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    bias = argument(node, 2, "bias")
    rows, cols = (
        Window(maps.shapes[name][d], node.shape[d], extent[d - 2], stride[d - 2], padding[d - 2]) for d in axes
    )
    beside = [0 if d + 2 in axes else amount for d, amount in enumerate(padding)]

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        sides = [(0, 0)] * 3
        for d, span in zip(axes, (context.rows[0], context.cols[0]), strict=True):
            sides[d - 2] = (span.low, span.high)
        tile = F.pad(tiles[0], [amount for side in reversed(sides) for amount in side])
        w, b = context.weights[weight], context.weights[bias.name] if isinstance(bias, Ref) else None
        return F.conv3d(tile, w, b, stride, beside, dilation, groups)

    return Placed((Read(name, rows, cols),), axes, run, exclusive=True)


@rule(aten.max_pool2d, aten.max_pool2d_with_indices, saves=("inputs", "indices"), keeps_batch=True)
def max_pool(node: Node, maps: Maps) -> Placed:
    """Maximum of each window; the first in raster order wins a tie, as on the whole image."""
    name = only_map(node, maps)
    _require_nchw(node, maps, name)
    kernel = _pair(argument(node, 1, "kernel_size"))
    stride = _pair(argument(node, 2, "stride"), kernel)
    padding = _pair(argument(node, 3, "padding"), (0, 0))
    dilation = _pair(argument(node, 4, "dilation"))
    ceil_mode = bool(argument(node, 5, "ceil_mode", False))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    read = _windows(maps, node, name, extent, stride, padding)
    height, width = maps.extent(name)

    def positions(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        rows, cols = context.rows[0], context.cols[0]
        tile = F.pad(tiles[0], (cols.low, cols.high, rows.low, rows.high), value=_lowest(tiles[0].dtype))
        at = F.max_pool2d(tile, kernel, stride, 0, dilation, return_indices=True)[1]
        # Where all is -inf, the first position that is no padding.
        y = (at // tile.shape[3] + (rows.first - rows.low)).clamp(0, height - 1)
        return y * width + (at % tile.shape[3] + (cols.first - cols.low)).clamp(0, width - 1)

    if node.pick == 1:
        maps.positions[node.name] = PooledFrom((height, width), (extent[0], extent[1]), stride, padding)
        return Placed((read,), NCHW, positions)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        if (
            ceil_mode
            or max(context.rows[0].low, context.rows[0].high) > padding[0]
            or max(context.cols[0].low, context.cols[0].high) > padding[1]
        ):
            rows, cols = context.rows[0], context.cols[0]
            tile = F.pad(tiles[0], (cols.low, cols.high, rows.low, rows.high), value=_lowest(tiles[0].dtype))
            return F.max_pool2d(tile, kernel, stride, 0, dilation)
        return _run_padded(
            tiles[0],
            context,
            read,
            _lowest(tiles[0].dtype),
            lambda tile, native: F.max_pool2d(tile, kernel, stride, native, dilation),
        )

    return Placed((read,), NCHW, run, exclusive=True)


def _lowest(dtype: torch.dtype) -> float:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


declare(aten.max_pool2d, range_of=ranges.anywhere)


@rule(aten.max_unpool2d, saves=("indices",), keeps_batch=True)
def max_unpool(node: Node, maps: Maps) -> Placed:
    """Each position goes back to where `max_pool` found it; windows that do not overlap tell where that may be."""
    x, indices = (ref.name for ref in node.args[:2])
    size = node.shape[2], node.shape[3]
    _require_nchw(node, maps, x)
    found = maps.positions.get(indices)
    if found is None or maps.shapes[x] != maps.shapes[indices]:
        raise node.refuse(
            "puts positions where a tensor of indices says, and it is not known how far apart that is",
            f"pass the indices that a max pooling of the model returned, as they are; or {STREAM}",
        )
    if found.extent != size or any(k > s for k, s in zip(found.window, found.stride, strict=True)):
        raise node.refuse(
            f"fills a map of {size} by positions in one of {found.extent}, pooled by windows of {found.window} with strides of "
            f"{found.stride}",
            "pass output_size=x.shape[-2:] of the map that was pooled, and pool it by windows that do not overlap",
        )
    sizes = zip(maps.extent(x), size, found.window, found.stride, found.padding, strict=True)
    rows_map, cols_map = (Transposed(*of_axis) for of_axis in sizes)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        rows, cols, (tile, at) = context.rows[0], context.cols[0], tiles
        y, x = at // size[1] - rows.start, at % size[1] - cols.start
        here = (y >= 0) & (y < rows.size) & (x >= 0) & (x < cols.size)
        area = rows.size * cols.size
        place = torch.where(here, y * cols.size + x, area).flatten(2)  # the last one is for other tiles
        full = tile.new_zeros((*tile.shape[:2], area + 1)).scatter(2, place, tile.flatten(2))
        return full[:, :, :area].unflatten(2, (rows.size, cols.size))

    return Placed((Read(x, rows_map, cols_map), Read(indices, rows_map, cols_map)), NCHW, run)


def _not_flattened(node: Node, maps: Maps) -> Node:
    """`F.unfold` with height and width of its result apart."""
    name = only_map(node, maps)
    _require_nchw(node, maps, name)
    kernel, dilation, padding, stride = (_pair(node.args[k]) for k in (1, 2, 3, 4))
    sizes = zip(maps.extent(name), kernel, dilation, padding, stride, strict=True)
    rows, cols = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in sizes)
    args = (node.args[0], kernel, dilation, padding, stride)
    return node.derived(unfolded, *args, shape=(*node.shape[:2], rows, cols))


declare(aten.im2col, flattens=_not_flattened)


def unfolded(
    x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """The windows of a map as channels: (N, C * kernel height * kernel width, rows, columns)."""
    rows = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    return F.unfold(x, kernel, dilation, padding, stride).unflatten(2, (rows, -1))


@rule(unfolded, saves=(), keeps_batch=True)
def unfold(node: Node, maps: Maps) -> Placed:
    """See `unfolded`."""
    name = only_map(node, maps)
    kernel, dilation, padding, stride = node.args[1:]
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    read = _windows(maps, node, name, extent, stride, padding)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        return _run_padded(
            tiles[0], context, read, 0.0, lambda tile, native: unfolded(tile, kernel, dilation, native, stride)
        )

    return Placed((read,), NCHW, run, exclusive=True)


def folded(
    x: Tensor,
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    stride: tuple[int, int],
) -> Tensor:
    """The sums of overlapping windows (N, C * kernel height * kernel width, rows, columns): (N, C, *size)."""
    return F.fold(x.flatten(2), size, kernel, dilation, padding, stride)


def _of_windows(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """`F.fold` of windows with their rows and columns apart."""
    size, kernel, dilation, padding, stride = (_pair(arg) for arg in node.args[1:6])
    sizes = zip(size, kernel, dilation, padding, stride, strict=True)
    counts = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in sizes)
    name = names[0]
    if maps.flat[name] != Flattened(2) or maps.axes[name] != NCHW or maps.extent(name) != counts:
        raise node.refuse(
            f"joins {counts[0]} x {counts[1]} windows, and the map that was flattened has "
            f"{maps.extent(name)[0]} x {maps.extent(name)[1]} positions",
            "fold the windows that F.unfold with the same arguments gave, or a map of as many rows and columns",
        )
    args = (node.args[0], size, kernel, dilation, padding, stride)
    return [node.derived(folded, *args)], None


declare(aten.col2im, flat=_of_windows)


@rule(folded, saves=(), keeps_batch=True)
def fold(node: Node, maps: Maps) -> Placed:
    """See `folded`."""
    name = only_map(node, maps)
    kernel, dilation, padding, stride = node.args[2:]
    read, fit = _spread(node, maps, name, kernel, dilation, padding, stride)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        counts = zip(tiles[0].shape[2:], kernel, dilation, stride, strict=True)
        full = folded(
            tiles[0], tuple((n - 1) * s + (k - 1) * d + 1 for n, k, d, s in counts), kernel, dilation, (0, 0), stride
        )  # type: ignore[arg-type]
        return fit(full, context)

    return Placed((read,), NCHW, run)


@rule(aten.avg_pool2d, keeps_batch=True)
def average_pool(node: Node, maps: Maps) -> Placed:
    """Sum of each window over a divisor that near the border depends on the position (PyTorch's `avg_pool2d`)."""
    name = only_map(node, maps)
    _require_nchw(node, maps, name)
    kernel = _pair(argument(node, 1, "kernel_size"))
    stride = _pair(argument(node, 2, "stride"), kernel)
    padding = _pair(argument(node, 3, "padding"), (0, 0))
    include = bool(argument(node, 5, "count_include_pad", True))
    override = argument(node, 6, "divisor_override")
    read = _windows(maps, node, name, kernel, stride, padding)
    sizes = maps.extent(name)

    def counts(axis: int, span: Span) -> list[int]:
        pad = padding[axis] if include else 0
        begins = [o * stride[axis] - padding[axis] for o in range(span.start, span.stop)]
        return [min(b + kernel[axis], sizes[axis] + pad) - max(b, -pad) for b in begins]

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        rows, cols = context.rows[0], context.cols[0]
        tile = tiles[0]
        if rows.low or rows.high or cols.low or cols.high:
            tile = F.pad(tile, (cols.low, cols.high, rows.low, rows.high))
        if override is not None:
            return F.avg_pool2d(tile, kernel, stride, divisor_override=override)
        row_counts, col_counts = counts(0, rows), counts(1, cols)
        if set(row_counts) == {kernel[0]} and set(col_counts) == {kernel[1]}:
            return F.avg_pool2d(tile, kernel, stride)
        divisor = torch.tensor(row_counts, device=tile.device)[:, None] * torch.tensor(col_counts, device=tile.device)
        total = F.avg_pool2d(tile.to(precise(tile.dtype)), kernel, stride, divisor_override=1)  # float16 overflows
        return (total / divisor.to(total.dtype)).to(tile.dtype)

    return Placed((read,), NCHW, run, exclusive=True)


@rule(aten.conv_transpose2d, keeps_batch=True, carries_relu=True, is_layer=True)
def transposed_convolution(node: Node, maps: Maps) -> Placed:
    """Transposed convolution: each input spreads over a window of outputs."""
    name = only_map(node, maps)
    _require_nchw(node, maps, name)
    weight = node.args[1].name
    bias = argument(node, 2, "bias")
    stride = _pair(argument(node, 3, "stride"))
    padding = _pair(argument(node, 4, "padding"), (0, 0))
    groups = argument(node, 6, "groups", 1)
    dilation = _pair(argument(node, 7, "dilation"))
    read, fit = _spread(node, maps, name, maps.shapes[weight][-2:], dilation, padding, stride)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        full = fit(F.conv_transpose2d(tiles[0], context.weights[weight], None, stride, 0, 0, groups, dilation), context)
        return full + context.weights[bias.name][:, None, None] if isinstance(bias, Ref) else full

    return Placed((read,), NCHW, run)


def _spread(
    node: Node,
    maps: Maps,
    name: str,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> tuple[Read, Callable[[Tensor, TileContext], Tensor]]:
    """The extents with which an operation reads a map of which each position spreads over a window of results.

    With it comes a function of what it makes of a tile without any padding, which gives the results of a step.
    """
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = zip(maps.extent(name), node.shape[-2:], extent, stride, padding, strict=True)
    rows_map, cols_map = (Transposed(*of_axis) for of_axis in sizes)

    def fit_along(full: Tensor, axis: int, span: Span) -> tuple[Tensor, int, int]:
        """Return the part of the full result that falls on the span's outputs, and how many outputs lie before and after it."""
        begin = span.first * stride[axis] - padding[axis]
        size = full.shape[axis + 2]
        low, high = clamp(span.start - begin, 0, size), clamp(span.stop - begin, 0, size)
        before = clamp(begin - span.start, 0, span.size)
        part = full if high - low == size else full.narrow(axis + 2, low, high - low)
        return part, before, span.size - before - (high - low)

    def fit(full: Tensor, context: TileContext) -> Tensor:
        full, top, bottom = fit_along(full, 0, context.rows[0])
        full, left, right = fit_along(full, 1, context.cols[0])
        return F.pad(full, (left, right, top, bottom)) if top or bottom or left or right else full

    return Read(name, rows_map, cols_map), fit


@rule(LocalCall, saves=(), keeps_batch=True, is_layer=True, waits=False)
def local(node: Node, maps: Maps) -> Placed:
    """A module on every window (`Local`)."""
    name = only_map(node, maps)
    _require_nchw(node, maps, name)
    call: LocalCall = node.target  # type: ignore[assignment]
    tensors = [ref.name for ref in node.args[1:]]
    read = _windows(maps, node, name, call.windows.size, call.windows.stride, call.windows.padding)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        rows, cols = context.rows[0], context.cols[0]
        tile = F.pad(tiles[0], (cols.low, cols.high, rows.low, rows.high), value=call.windows.fill)
        draws = Draws(context.seed, node.name, (rows.start, cols.start))
        return call.on_padded(tile, [context.weights[tensor] for tensor in tensors], draws)

    cost, batch = call.cost, node.shape[0]
    return Placed(
        (read,),
        NCHW,
        run,
        saved_bytes=batch * cost.saved,
        forward_bytes=batch * cost.forward,
        backward_bytes=batch * max(0, cost.training - cost.saved),
    )


@rule(aten.pad, aten.constant_pad_nd, saves=(), keeps_batch=True, flat=flat.padded)
@rule(aten.reflection_pad2d, aten.replication_pad2d, saves=(), keeps_batch=True)
def pad(node: Node, maps: Maps) -> Placed:
    """Padding or cropping (negative amounts), of any dimension."""
    name = only_map(node, maps)
    axes, ndim = maps.axes[name], len(maps.shapes[name])
    mode = {
        "aten.reflection_pad2d": "reflect",
        "aten.replication_pad2d": "replicate",
        "aten.constant_pad_nd": "constant",
    }.get(node.op, argument(node, 2, "mode", "constant"))
    value = argument(node, 2, "value", 0.0) if node.op == "aten.constant_pad_nd" else argument(node, 3, "value", 0.0)
    amounts = list(node.args[1])
    before, after = [0] * ndim, [0] * ndim
    for k in range(len(amounts) // 2):
        before[ndim - 1 - k], after[ndim - 1 - k] = amounts[2 * k], amounts[2 * k + 1]
    height, width = maps.extent(name)
    low, high = (before[axes.rows], after[axes.rows]), (before[axes.cols], after[axes.cols])
    if mode != "constant":
        if any(before[d] or after[d] for d in range(ndim) if d not in axes):
            raise node.refuse(f"with mode '{mode}' pads other dimensions than height and width", "pad them with zeros")
        reflect = mode == "reflect"
        border = BorderPad(height, *low, reflect), BorderPad(width, *high, reflect)

        def run_border(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
            tile = _gather(tiles[0], axes.rows, border[0], context.rows[0])
            return _gather(tile, axes.cols, border[1], context.cols[0])

        return Placed((Read(name, *border),), axes, run_border)

    read = Read(
        name,
        Window(height, node.shape[axes.rows], padding=low[0]),
        Window(width, node.shape[axes.cols], padding=high[0]),
    )
    others = [(0, 0) if d in axes else (before[d], after[d]) for d in range(ndim)]

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        sides = list(others)
        sides[axes.rows] = (context.rows[0].low, context.rows[0].high)
        sides[axes.cols] = (context.cols[0].low, context.cols[0].high)
        flat = [amount for side in reversed(sides) for amount in side]
        return F.pad(tiles[0], flat, value=value or 0.0) if any(flat) else tiles[0]

    return Placed((read,), axes, run)


def _gather(tile: Tensor, dim: int, border: BorderPad, span: Span) -> Tensor:
    index = [border.source(o) - span.first for o in range(span.start, span.stop)]
    if index == list(range(tile.shape[dim])):
        return tile
    return tile.index_select(dim, torch.tensor(index, device=tile.device))
