"""Sampling where a map says: local if it is known how far from its own place each position looks (see `rules.ranges`)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import Sampled, Span, Window
from widefield.streaming.rules.base import STREAM, Axes, Maps, Placed, Read, TileContext, called, rule, sources
from widefield.streaming.rules.reductions import precise

aten = torch.ops.aten


def deformed(*args: Any) -> Tensor:
    """Deformable convolution, as torchvision has it."""
    return torch.ops.torchvision.deform_conv2d(*args)  # type: ignore[no-any-return]


@rule(deformed, keeps_batch=True, is_layer=True)
def deformable_convolution(node: Node, maps: Maps) -> Placed:
    """See `deformed`: windows that are larger by how far offsets reach."""
    x, weight, offset, mask = (ref.name for ref in node.args[:4])
    stride, padding, dilation = node.args[5:7], node.args[7:9], node.args[9:11]
    known = maps.ranges.get(offset)
    if known is None:
        raise node.refuse(
            "reads at offsets that may be as large as the image",
            f"keep them within numbers that forward names (2 * offsets.tanh(), offsets.clamp(-4, 4)); or {STREAM}",
        )
    expected = {x, offset, mask} if node.args[13] else {x, offset}
    if set(sources(node, maps)) != expected or any(
        maps.axes[n] != (2, 3) or len(maps.shapes[n]) != 4 for n in expected
    ):
        raise node.refuse(
            "needs offsets and a mask that are maps (N, C, H, W), as its input is", "compute them from the image"
        )
    low, high = (1.01 * bound for bound in known.ends(maps.shapes[offset]))  # of numbers that bfloat16 rounds
    far = max(0, math.ceil(-low), math.floor(high) + 1)  # the sample behind is read too
    reach = [-(-far // s) * s for s in stride]
    kernel = maps.shapes[weight][2:]
    sizes = zip(maps.extent(x), node.shape[2:], kernel, dilation, stride, padding, reach, strict=True)
    rows, cols = (Window(n, m, (k - 1) * d + 1 + 2 * r, s, p + r) for n, m, k, d, s, p, r in sizes)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        # The operator takes no negative padding: it computes what reads beside the windows too, which is dropped.
        (row, col), (down, across) = (
            (context.rows[0], context.cols[0]),
            (r // s for r, s in zip(reach, stride, strict=True)),
        )
        given = {
            name: F.pad(tile, (across, across, down, down) if name != x else (col.low, col.high, row.low, row.high))
            for name, tile in zip(sources(node, maps), tiles, strict=True)
        }
        args = [given.get(a.name, context.weights.get(a.name)) if isinstance(a, Ref) else a for a in node.args[:5]]
        made = deformed(*args, *stride, 0, 0, *node.args[9:])
        return made.narrow(2, down, row.size).narrow(3, across, col.size)

    columns = math.prod((*maps.shapes[x][:2], *kernel)) * node.dtype.itemsize
    padded = sum(math.prod(maps.shapes[name]) for name in expected) // math.prod(node.shape[2:]) * node.dtype.itemsize
    reads = [Read(x, rows, cols), *(maps.read(name) for name in sources(node, maps)[1:])]
    return Placed(
        tuple(reads),
        Axes(2, 3),
        run,
        exclusive=True,
        saved_bytes=padded,
        forward_bytes=columns + padded,
        backward_bytes=columns + padded,
    )


_NEAREST, _BICUBIC = 1, 2  # of the modes: 0 is bilinear
_BORDER, _REFLECTION = 1, 2  # of what pads: 0 is zeros
_FARTHEST = 64  # positions within which a sample may always look; further only within half of the map


@rule(aten.grid_sampler)
def grid_sample(node: Node, maps: Maps) -> Placed:
    """Sampling near a line: a grid of all positions that forward makes of numbers, plus what has bounds.

    A tile is sampled by PyTorch's own kernel. It is told where by positions within the tile, made of those in the whole map, which
    are rounded, reflected and cut off as there.
    """
    x, grid = (ref.name for ref in node.args[:2])
    if x not in maps:
        return _looked_up(node, maps, grid)
    mode, padding, corners = node.args[2:5]
    if len(node.shape) != 4 or maps.axes[x] != (2, 3) or (grid in maps and maps.axes[grid] != (1, 2)):
        raise node.refuse(
            "needs a map (N, C, H, W) and a grid (N, H, W, 2)", "permute them so; volumes are not streamed"
        )
    cols, rows = (_along(node, maps, grid, k, n, mode, padding, corners) for k, n in enumerate(maps.extent(x)[::-1]))
    source = grid if grid in maps else maps.broadcast_weight(grid, Axes(1, 2), maps.shapes[grid])

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        dtype = torch.promote_types(tiles[0].dtype, tiles[1].dtype)
        tile, where = (x.to(precise(dtype)) for x in tiles)  # as PyTorch's kernels compute
        if tile.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            dtype = tile.dtype  # it has them give float32, elsewhere the wider dtype
        spans = context.cols[0], context.rows[0]
        pads = [side for span in spans for side in (span.low, span.high)]
        pads[1::2] = (max(pads[k + 1], 2 - pads[k] - tile.shape[3 - k // 2]) for k in (0, 2))  # two positions at least
        tile = (
            _bordered(tile, spans, pads, (cols.n_in, rows.n_in), padding, corners)
            if mode == _BICUBIC and padding
            else (F.pad(tile, pads))
        )
        places = [
            _within(where[..., k], axis.n_in, span, tile.shape[3 - k], mode, padding, corners)
            for k, (axis, span) in enumerate(zip((cols, rows), spans, strict=True))
        ]
        made = aten.grid_sampler(tile, torch.stack(places, -1), mode, 0, True)
        return made.to(dtype)

    of_places = 2 * maps.shapes[grid][0] * node.dtype.itemsize
    return Placed(
        (Read(x, rows, cols), Read(source, *(Window(n, n) for n in node.shape[2:]))),
        Axes(2, 3),
        run,
        saved_bytes=2 * of_places,
        forward_bytes=4 * of_places,
        backward_bytes=4 * of_places,
    )


def _looked_up(node: Node, maps: Maps, grid: str) -> Placed:
    """A table that is the same for all positions, read where a map says."""
    axes = maps.axes[grid]
    if 0 in axes or len(node.shape) - 1 in axes:
        raise node.refuse("needs the coordinates in the last dimension of a map", "permute the map")
    return called(node, maps, Axes(axes.rows + 1, axes.cols + 1))


def _along(node: Node, maps: Maps, grid: str, k: int, n: int, mode: int, padding: int, corners: bool) -> Sampled:
    """The inputs that are read along the axis of which the grid's number `k` tells the place, of `n` positions."""
    known, shape, dim = maps.ranges.get(grid), maps.shapes[grid], 2 - k
    if known is None:
        raise node.refuse(
            "reads at positions in the whole map, and how far each is from its own place is not known",
            "make the grid in forward, of numbers (F.affine_grid of torch.eye(2, 3)[None], torch.linspace) plus offsets within "
            f"numbers that forward names (0.1 * offsets.tanh(), offsets.clamp(-0.1, 0.1)); resize by interpolate; or {STREAM}",
        )
    known = known.level(shape, [3]).of_each(lambda x: x[..., min(k, x.shape[-1] - 1)], {d: d for d in range(3)})
    slopes = known.slopes.get(dim, torch.zeros(1, dtype=torch.float64, device="cpu")).flatten()
    known = known.level(shape, [d for d in known.slopes if d != dim or slopes.min() != slopes.max()])
    half = (n - 1) / 2 if corners else n / 2
    scale = slopes[0].item() * half if dim in known.slopes else 0.0
    low, high = ((end.item() + 1) * half - (0 if corners else 0.5) for end in (known.low.min(), known.high.max()))
    room = 0.01 * (high - low) / 2 + 16 * torch.finfo(node.dtype).eps * n  # for numbers that autocast rounds
    low, high = low - room, high + room
    if padding == _REFLECTION:
        last = n - 1 - scale * (shape[dim] - 1)  # where a line that stays inside of the map may begin at most
        begin = min(max((low + high) / 2, 0), max(last, 0)) if last > -0.5 else (low + high) / 2
        outside = max(0.0, -begin, begin - last)
        away = max(begin - low, high - begin) + 2 * outside
        low, high = begin - away, begin + away
    far = (high - low) / 2
    if (n > 1 and shape[dim] > 1 and scale <= 0) or far > max(_FARTHEST, n / 2):
        raise node.refuse(
            f"reads up to {far:.0f} {('columns', 'rows')[k]} away from a line that moves on by {scale:.3g} for each position, "
            f"in a map of {n}",
            f"keep within {_FARTHEST} positions, or half of the map, of where the map's own grid points; or {STREAM}",
        )
    before, after = (1, 2) if mode == _BICUBIC else (0, 1)
    return Sampled(n, shape[dim], max(scale, 0.0), low - before, high + after)


def _within(at: Tensor, n: int, span: Span, size: int, mode: int, padding: int, corners: bool) -> Tensor:
    """Coordinates in a whole map as those in a tile of `size` positions, its padding included, of which the corners are -1 and 1.

    PyTorch's kernels know where a coordinate lies among the positions by rounding it down, so that nothing but the part behind
    must be rounded here, and keeps clear of both ends by what the kernel rounds again.
    """
    at = (at + 1) * ((n - 1) / 2) if corners else (at + 1) * (n / 2) - 0.5
    if padding and mode != _BICUBIC:
        at = _into(at, n, padding, corners)
    origin = span.first - span.low
    if mode == _NEAREST:
        at = at.round() - origin
    else:
        known, room = at.detach(), 2 * torch.finfo(at.dtype).eps * size
        whole = known.floor()
        at = (whole - origin) + (known - whole).clamp(room, 1 - room) + (at - known)
    return at / ((size - 1) / 2) - 1


def _into(at: Tensor, n: int, padding: int, corners: bool) -> Tensor:
    """Positions along an axis moved into it, as PyTorch's kernels do; those at the ends have no gradient, as there."""
    if padding == _REFLECTION:
        low, turn = (0.0, 2 * (n - 1)) if corners else (-0.5, 2 * n)
        away = at - low
        away = torch.where(away < 0, -away, away)
        away = away - (away.detach() / turn).trunc() * turn if turn else away * 0
        at = torch.where(away > turn - away, turn - away, away) + low
    return torch.where((at > 0) & (at < n - 1), at, at.detach().clamp(0, n - 1))


def _bordered(
    tile: Tensor,
    spans: tuple[Span, Span],
    pads: Sequence[int],
    sizes: tuple[int, int],
    padding: int,
    corners: bool,
) -> Tensor:
    """A tile with positions beyond the map's border taken from within, columns and then rows."""
    for k, (span, n) in enumerate(zip(spans, sizes, strict=True)):
        beyond = torch.arange(
            span.first - pads[2 * k], span.last + pads[2 * k + 1], dtype=torch.float64, device=tile.device
        )
        inside = _into(beyond, n, padding, corners).long() - span.first
        tile = tile.index_select(3 - k, inside.clamp(0, span.last - span.first - 1))
    return tile
