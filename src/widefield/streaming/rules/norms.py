"""Normalisations by statistics of the whole image, or of the whole batch: the map times a scale plus a shift."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.streaming.captured import Node, Ref
from widefield.streaming.rules import flat
from widefield.streaming.rules.base import Maps, Placed, argument, caller, only_map, rewrite, rule
from widefield.streaming.rules.pointwise import with_plain_stride
from widefield.streaming.rules.reductions import precise
from widefield.streaming.rules.rewriting import kept, moments

aten = torch.ops.aten


@rewrite(aten.instance_norm, aten.group_norm, flat=flat.channels_second)
@rewrite(aten.native_group_norm)
def group_norm(node: Node, maps: Maps) -> list[Node] | None:
    """Instance and group normalisation by the image's own statistics."""
    name = only_map(node, maps)
    shape = maps.shapes[name]
    if (node.op == "aten.instance_norm" and not node.args[5]) or min(maps.axes[name]) < 2 or node.pick not in (None, 0):
        return None
    if node.op == "aten.native_group_norm":
        weight, bias, groups, eps = node.args[1], node.args[2], node.args[6], node.args[7]
    elif node.op == "aten.group_norm":
        groups, weight, bias = node.args[1], argument(node, 2, "weight"), argument(node, 3, "bias")
        eps = argument(node, 4, "eps", 1e-5)
    else:
        weight, bias, eps, groups = node.args[1], node.args[2], node.args[7], shape[1]
    space = tuple(range(2, len(shape)))
    new, (mean, squares, count) = moments(node, maps, name, space)
    args = (mean, squares, count, groups, weight, bias, eps)
    return new.result(apply_affine, Ref(name), new.add("affine", scale_and_shift, args, (2, *kept(shape, space))))


def by_batch(node: Node) -> bool:
    """True for batch normalisation by the statistics of the batch."""
    return node.target is aten._native_batch_norm_legit.no_stats or (
        node.target is aten.batch_norm.default and bool(node.args[5])
    )


def _affine(node: Node) -> tuple[Any, Any, float]:
    """Weight, bias and epsilon of a batch normalisation by the statistics of the batch."""
    return node.args[1], node.args[2], node.args[7 if node.target is aten.batch_norm.default else 5]


@rewrite(aten.batch_norm, aten._native_batch_norm_legit, flat=flat.channels_second)
def batch_norm(node: Node, maps: Maps) -> list[Node] | None:
    """Batch normalisation by the statistics of the batch, or of the batches of all processes."""
    name = only_map(node, maps)
    shape = maps.shapes[name]
    if not by_batch(node) or min(maps.axes[name]) < 2 or node.pick not in (None, 0):
        return None
    weight, bias, eps = _affine(node)
    over = (0, *range(2, len(shape)))
    new, (mean, squares, count) = moments(node, maps, name, over)
    small, everywhere = kept(shape, over), node.module_path in maps.synchronised
    batch = new.add("batch", statistics_of_batch, (mean, squares, count, everywhere), (3, *small))
    affine = new.add("affine", scale_and_shift_of_batch, (batch, weight, bias, eps), (2, *small))
    return new.result(apply_affine, Ref(name), affine)


def batch_norm_of_tensor(node: Node, everywhere: bool) -> list[Node]:
    """The same for a tensor that is no map: what is computed from reductions, or runs whole."""
    weight, bias, eps = _affine(node)
    batch = replace(
        node, name=f"{node.name}@batch", target=statistics_of_tensor, args=(node.args[0], everywhere), pick=None
    )
    affine = replace(batch, name=f"{node.name}@affine", target=scale_and_shift_of_batch)
    affine = replace(affine, args=(Ref(batch.name), weight, bias, eps))
    last = replace(node, target=apply_affine, args=(node.args[0], Ref(affine.name)), pick=None)
    return [batch, affine, last]


def statistics_of_tensor(x: Tensor, everywhere: bool) -> Tensor:
    """`statistics_of_batch` of a tensor (N, C, ...)."""
    dims = [d for d in range(x.ndim) if d != 1]
    x = x.to(precise(x.dtype))
    mean = x.mean(dims, keepdim=True)
    count = torch.full_like(mean, x.numel() // x.shape[1])
    return statistics_of_batch(mean, (x - mean).square().sum(dims, keepdim=True), count, everywhere)


def statistics_of_batch(mean: Tensor, squares: Tensor, count: Tensor, everywhere: bool) -> Tensor:
    """Mean, sum of squared deviations and count, stacked; merged over all processes if `everywhere`."""
    if not (everywhere and distributed.is_initialized() and distributed.get_world_size() > 1):
        return torch.stack([mean, squares, count])
    sizes, sums = all_reduce(torch.stack([count, mean * count]))
    centre = sums / sizes
    return torch.stack([centre, all_reduce(squares + count * (mean - centre) ** 2), sizes])


def scale_and_shift_of_batch(batch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `scale_and_shift`, from `statistics_of_batch`."""
    mean, squares, count = batch
    scale = torch.rsqrt(squares / count + eps)
    if weight is not None:
        scale = scale * weight.reshape(mean.shape)
    shift = -mean * scale
    return torch.stack([scale, shift if bias is None else shift + bias.reshape(mean.shape)])


def scale_and_shift(
    mean: Tensor, squares: Tensor, count: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """A normalisation as `x * scale + shift`: both of them in one tensor (2, N or 1, C, 1, ...).

    `mean`, `squares` (sum of squared deviations from it) and `count` are those of each channel; the channels of a group are merged.
    """
    shape = mean.shape
    mean, squares, count = (x.reshape(shape[0], groups, -1) for x in (mean, squares, count))
    centre = mean.mean(-1, keepdim=True)  # the channels of a group have the same count
    total = (squares + count * (mean - centre) ** 2).sum(-1, keepdim=True)
    scale = torch.rsqrt(total / count.sum(-1, keepdim=True) + eps).expand_as(mean)
    if weight is not None:
        scale = scale * weight.reshape(groups, -1)
    shift = -centre * scale
    if bias is not None:
        shift = shift + bias.reshape(groups, -1)
    return torch.stack([scale.reshape(shape), shift.reshape(shape)])


def apply_affine(x: Tensor, affine: Tensor) -> Tensor:
    """`x * scale + shift`, in the dtype of `x`.

    For a batch of 1 with a scale and a shift for each channel it is a batch norm with a stored mean of 0 and variance of 1, whose
    backward pass gives all gradients in one pass over the map, not in five as that of a product and a sum.
    """
    if x.ndim > 2 and x.shape[0] == 1 and affine.shape[1:] == (1, x.shape[1], *[1] * (x.ndim - 2)):
        scale, shift = affine.flatten(1)
        mean = torch.zeros_like(shift)
        x = x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()  # its kernels are slow on views
        normed = F.batch_norm(x, mean, mean, scale, shift, eps=1.0)
        if normed.requires_grad:
            normed.register_hook(with_plain_stride)
        return normed
    if x.dtype == affine.dtype:
        return torch.addcmul(affine[1], x, affine[0])
    return (x * affine[0] + affine[1]).to(x.dtype)


@rule(apply_affine, cheap=True, keeps_batch=True)
def affine(node: Node, maps: Maps) -> Placed:
    """Position by position."""
    name, call = only_map(node, maps), caller(node, maps)
    return Placed((maps.read(name),), maps.axes[name], lambda tiles, context: call(tiles, context.weights))


@rewrite(aten.layer_norm, aten.native_layer_norm)
def layer_norm(node: Node, maps: Maps) -> list[Node] | None:
    """Layer normalisation over dimensions that include height and width."""
    name = only_map(node, maps)
    axes, shape = maps.axes[name], maps.shapes[name]
    over = tuple(range(len(shape) - len(node.args[1]), len(shape)))
    if not set(axes) <= set(over) or node.pick not in (None, 0):
        return None
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    new, (mean, squares, count) = moments(node, maps, name, over)
    eps, small = argument(node, 4, "eps", 1e-5), kept(shape, over)
    stacked = new.add("affine", scale_and_shift_of_layer, (mean, squares, count, eps), (2, *small))
    if weight is None and bias is None:
        return new.result(apply_affine, Ref(name), stacked)
    last = new.add("standard", apply_affine, (Ref(name), stacked), shape)
    if weight is not None and bias is not None:
        last = new.add("scaled", aten.mul.Tensor, (last, weight), shape)
    return new.result(aten.mul.Tensor if bias is None else aten.add.Tensor, last, weight if bias is None else bias)


def scale_and_shift_of_layer(mean: Tensor, squares: Tensor, count: Tensor, eps: float) -> Tensor:
    """As `scale_and_shift`, for statistics over `count` elements each."""
    scale = torch.rsqrt(squares / count + eps)
    return torch.stack([scale, -mean * scale])


@torch.no_grad()
def update_running_statistics(layer: nn.Module, batch: Tensor) -> None:
    """Update running statistics as a batch norm layer does in training mode: running = (1 - momentum) * running + momentum * batch.

    `batch` holds mean, sum of squared deviations and count, each of shape (1, C, 1, ...). The variance that is stored is the
    unbiased one; `momentum` None means the average over all batches (`torch.nn.BatchNorm2d`). Layers that keep no running
    statistics are left alone.
    """
    if not isinstance(layer, _BatchNorm) or not layer.track_running_stats or layer.running_mean is None:
        return
    assert layer.running_var is not None
    momentum = layer.momentum or 0.0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    mean, squares, count = (x.flatten().to(layer.running_mean.dtype) for x in batch)
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(squares / (count - 1), momentum)
