"""Operations that compute every position from the same position of their inputs."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from widefield.streaming.captured import Node, overwrite
from widefield.streaming.rules import flat, ranges
from widefield.streaming.rules.base import (
    Axes,
    Maps,
    Placed,
    TileContext,
    called,
    caller,
    declare,
    only_map,
    rule,
    sources,
    swap_refs,
)

aten = torch.ops.aten


_pointwise = partial(rule, cheap=True, keeps_batch=True, flat=flat.elementwise)


# Operators that PyTorch tags as pointwise come here without being listed, where they save what they read; some are tagged in
# newer versions only.
@_pointwise(
    *(aten.hardswish, aten.leaky_relu, aten.softplus, aten.square, aten.floor_divide),
    *(aten.where, aten.masked_fill, aten.fill, overwrite, aten.alias, aten.contiguous),
    aten.type_as,
)
@_pointwise(aten.sub, aten.rsub, aten.neg, aten.clone, aten.to, aten._to_copy, saves=())
@_pointwise(aten.log_sigmoid, saves=("inputs", "mask"))
@_pointwise(aten.complex)
@_pointwise(aten.polar, saves=("inputs", "result"))
@_pointwise(aten.detach, aten.__and__, aten.__or__, aten.__xor__, saves=(), stops_gradients=True)
@_pointwise(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, saves=(), stops_gradients=True)
@_pointwise(aten.add, saves=(), carries_relu=True, sends_same=True)
@_pointwise(
    *(aten.relu, aten.sigmoid, aten.tanh, aten.tan, aten.sqrt, aten.rsqrt, aten.reciprocal),
    *(aten.exp, aten.exp2, aten.expm1, aten.special_expm1, aten.special_ndtri),
    saves=("result",),
)
@_pointwise(
    *(aten.sgn, aten.special_bessel_j1, aten.special_bessel_y1, aten.special_modified_bessel_i1, aten.special_i1),
    *(aten.special_modified_bessel_k1, aten.special_i0e, aten.special_i1e, aten.special_erfcx, aten.special_log_ndtr),
    saves=("inputs", "result"),
)
def pointwise(node: Node, maps: Maps) -> Placed:
    """Broadcasting element by element; weights as large as the image are read tile by tile too."""
    ndim = len(node.shape)
    names = sources(node, maps)
    aligned = {_align(maps.axes[name], len(maps.shapes[name]), ndim) for name in names}
    extents = {maps.extent(name) for name in names}
    if len(aligned) > 1 or len(extents) > 1:
        raise node.refuse(
            f"combines maps of different layout or size: {', '.join(str(maps.shapes[name]) for name in names)}",
            "bring them to the same height and width, in the same dimensions, first",
        )
    axes, (height, width) = aligned.pop(), extents.pop()
    for name in [name for name in node.refs if name not in maps]:
        shape = (1,) * (ndim - len(maps.shapes[name])) + maps.shapes[name]
        if shape[axes.rows] > 1 or shape[axes.cols] > 1:
            full = list(shape)
            full[axes.rows], full[axes.cols] = height, width
            node = swap_refs(node, {name: maps.broadcast_weight(name, axes, tuple(full))})
    return called(node, maps, axes)


declare(aten.tanh, aten.sin, aten.cos, aten.erf, aten.sign, range_of=ranges.limited(-1.0, 1.0))
declare(aten.sigmoid, aten.hardsigmoid, range_of=ranges.limited(0.0, 1.0))
declare(aten.clamp, aten.clamp_min, aten.clamp_max, aten.hardtanh, aten.relu6, range_of=ranges.clamped)
declare(aten.relu, range_of=ranges.clamped, exact=True)
declare(aten.add, aten.sub, aten.rsub, range_of=ranges.added)
declare(aten.mul, aten.div, range_of=ranges.multiplied)
declare(aten.neg, range_of=ranges.negated, exact=True)
declare(aten.reciprocal, range_of=ranges.reciprocal)
declare(aten.clone, aten.contiguous, aten.alias, aten.detach, range_of=ranges.same, exact=True)
declare(aten.to, aten._to_copy, aten.type_as, range_of=ranges.same)
declare(aten.zeros_like, aten.ones_like, aten.full_like, range_of=ranges.filled)

_channelwise = partial(rule, cheap=True, keeps_batch=True, flat=flat.channels_second)


@_channelwise(aten.batch_norm, aten._native_batch_norm_legit_no_training, carries_relu=True)
@_channelwise(aten.instance_norm, aten.prelu, aten._prelu_kernel)
def channelwise(node: Node, maps: Maps) -> Placed:
    """Per-channel weights on dimension 1: stored statistics, affine parameters, slopes."""
    name = only_map(node, maps)
    if 1 in maps.axes[name]:
        raise node.refuse(
            "takes dimension 1 for the channels, which here is the height or width", "permute the map first"
        )
    if "prelu" in node.op:
        return called(node, maps, maps.axes[name])
    call = caller(node, maps)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        normed = call(tiles, context.weights)
        if normed.requires_grad and normed.shape[0] == 1:
            normed.register_hook(with_plain_stride)
        return normed

    return Placed((maps.read(name),), maps.axes[name], run)


def with_plain_stride(grad: Tensor) -> Tensor:
    """The gradient of a batch of 1 with the first stride that a batch would have.

    PyTorch's batch norm on the CPU mistakes the memory format of a gradient when its first stride, which nothing uses, is
    smaller than the others, as views may leave it; its own gradients are then wrong (torch 2.15).
    """
    return grad.as_strided(grad.shape, (grad.numel(), *grad.stride()[1:]))


def _align(axes: Axes, ndim_in: int, ndim_out: int) -> Axes:
    return Axes(axes.rows + ndim_out - ndim_in, axes.cols + ndim_out - ndim_in)
