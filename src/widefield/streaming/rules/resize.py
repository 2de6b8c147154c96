"""Interpolation with global coordinates, separably: rows, then columns."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from widefield.streaming.captured import Node
from widefield.streaming.extents import Resample, Span
from widefield.streaming.rules import ranges
from widefield.streaming.rules.base import Axes, Maps, Placed, Read, TileContext, argument, declare, only_map, rule

aten = torch.ops.aten

MODES = {
    "aten.upsample_nearest2d": "nearest",
    "aten._upsample_nearest_exact2d": "nearest-exact",
    "aten.upsample_bilinear2d": "linear",
    "aten.upsample_bicubic2d": "cubic",
    "aten._upsample_bilinear2d_aa": "linear",
    "aten._upsample_bicubic2d_aa": "cubic",
}

# Sizes of the output, for that of the input, for which PyTorch takes no notice of a given factor.
_SIZES_COUNT: dict[str, Callable[[int], tuple[int, ...]]] = {
    "nearest": lambda n: (n, 2 * n),
    "linear": lambda n: (n,),
}


@rule(
    *(aten.upsample_nearest2d, aten._upsample_nearest_exact2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d),
    *(aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa),
    saves=(),
    keeps_batch=True,
)
def interpolate(node: Node, maps: Maps) -> Placed:
    """F.interpolate in modes nearest, nearest-exact, bilinear and bicubic, with antialiasing or without, to any size."""
    name = only_map(node, maps)
    mode, antialias = MODES[node.op], node.op.endswith("_aa")
    if maps.axes[name] != Axes(2, 3):
        raise node.refuse("needs a map (N, C, H, W)", "permute the map first")
    has_corners = mode in ("linear", "cubic")
    if has_corners and not node.dtype.is_floating_point:
        raise node.refuse(
            f"interpolates a map of {node.dtype}, for which PyTorch has kernels that round in their own way",
            "make it a map of floats first (x.float()), or resize by nearest neighbour",
        )
    align_corners = bool(argument(node, 2, "align_corners", False)) if has_corners else False
    factors = argument(node, 3 if has_corners else 2, "scale_factors")
    if (
        mode == "cubic"
        and not antialias
        and factors
        and maps.extent(name) == tuple(node.shape[2:])
        and set(factors) != {1.0}
    ):
        raise node.refuse(
            "resizes by a factor that changes no size, where PyTorch's gradient is not that of its result",
            "leave it out",
        )
    if (
        mode == "linear"
        and not antialias
        and factors
        and not align_corners
        and maps.extent(name) != tuple(node.shape[2:])
    ):
        for n_in, n_out, factor in zip(maps.extent(name), node.shape[2:], factors, strict=True):
            if n_in == n_out and factor != 1.0:
                raise node.refuse(
                    f"resizes by the factor {factor}, which leaves {n_in} positions as many, and PyTorch's kernels differ in that",
                    "give 1.0 for that factor, or size= in place of factors",
                )
    axes = []
    for axis, (n_in, n_out) in enumerate(zip(maps.extent(name), node.shape[2:], strict=True)):
        if align_corners:
            scale = (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        else:
            counts = () if antialias else _SIZES_COUNT.get(mode, lambda n: ())(n_in)
            by_sizes = not factors or n_out in counts
            scale = n_in / n_out if by_sizes else 1.0 / factors[axis]
        axes.append(Resample(n_in, n_out, scale, mode, align_corners, antialias))
        if mode.startswith("nearest") and not _chosen_alike(axes[-1], 1.0 / factors[axis] if factors else n_in / n_out):
            by = f" by the factor {factors[axis]}" if factors else ""
            raise node.refuse(
                f"resizes {n_in} positions to {n_out}{by}, where PyTorch's kernels choose different nearest neighbours",
                "resize by a whole factor, give size= in place of a factor, or resize bilinearly",
            )
    rows, cols = axes

    times = [axis.n_out // axis.n_in for axis in axes]

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        if mode.startswith("nearest") and all(axis.scale * n == 1 for axis, n in zip(axes, times, strict=True)):
            return _repeated(tiles[0], times, context)
        return _resample(_resample(tiles[0], 2, rows, context.rows[0]), 3, cols, context.cols[0])

    return Placed((Read(name, rows, cols),), Axes(2, 3), run)


declare(aten.upsample_bilinear2d, aten.upsample_nearest2d, range_of=ranges.anywhere)


def _chosen_alike(axis: Resample, scale: float) -> bool:
    """True if PyTorch's nearest neighbours are the same in all its kernels, with `scale` input positions per output position.

    The kernels compute in float32 or float64, in several orders. For contiguous tensors they use the factor that was given, for
    tensors in channels_last and for gradients only the sizes where those are as for factor 1 or 2: by 2.01, 43 rows become 86,
    of which the first kernel takes floor(o / 2.01) and the others o // 2. Those of CUDA copy where the size stays.
    """
    half = 0.5 if axis.mode == "nearest-exact" else 0.0
    outputs = np.arange(axis.n_out) + half
    exact = np.array([axis.taps(o)[0][0] for o in range(axis.n_out)])
    kernels: tuple[np.ndarray, ...] = (
        np.float32(scale) * outputs.astype(np.float32),
        (np.float64(np.float32(scale)) * outputs).astype(np.float32),
        (np.float64(scale) * outputs).astype(np.float32),
        np.float32(scale) * outputs.astype(np.float32) - np.float32(half) + np.float32(half),
    )
    if axis.n_in == axis.n_out:
        kernels += (outputs,)
    return all((np.minimum(np.floor(k).astype(np.int64), axis.n_in - 1) == exact).all() for k in kernels)


def _repeated(tile: Tensor, times: Sequence[int], context: TileContext) -> Tensor:
    """The outputs of `context`, if each position of the tile is repeated so many times along height and width."""
    made = aten.upsample_nearest2d(tile, [tile.shape[2] * times[0], tile.shape[3] * times[1]])
    for dim, span, n in zip((2, 3), (context.rows[0], context.cols[0]), times, strict=True):
        if made.shape[dim] != span.size:
            made = made.narrow(dim, span.start - span.first * n, span.size)
    return made


def _resample(tile: Tensor, dim: int, axis: Resample, span: Span) -> Tensor:
    """Weighted sum of the tile's rows (or columns) for outputs `span.start ... span.stop`."""
    taps = [axis.taps(o) for o in range(span.start, span.stop)]
    shape = [1] * tile.ndim
    shape[dim] = span.size
    result: Tensor | None = None
    for k in range(len(taps[0][0])):
        index = torch.tensor([places[k] - span.first for places, _ in taps], device=tile.device)
        term = tile.index_select(dim, index)
        if len(taps[0][0]) > 1:
            term = term * torch.tensor([weights[k] for _, weights in taps], dtype=tile.dtype, device=tile.device).view(
                shape
            )
        result = term if result is None else result + term
    assert result is not None
    return result
