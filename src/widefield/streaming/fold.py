"""Batch normalisation by stored statistics, folded into the convolution before it.

    gamma * (conv(x; w, b) - mean) / sqrt(var + eps) + beta  =  conv(x; w * s, beta + (b - mean) * s),   s = gamma / sqrt(var + eps)

The folded weight is computed once per forward pass by ordinary autograd, so gamma, beta, w and b get their exact gradients, and
neither the time nor the memory of a normalisation is spent on the maps.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from widefield.streaming.captured import Captured, Node, Ref

aten = torch.ops.aten
_LEAST_MAP = 16  # times the size of a weight: for a smaller map a folded copy costs memory and saves little time
_NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)


def fold_batch_norms(captured: Captured) -> tuple[Node, ...]:
    """The captured nodes, with each normalisation that follows a convolution of its own folded into it."""
    by_name = {node.name: node for node in captured.nodes}
    readers: dict[str, int] = {}
    for name in (name for node in captured.nodes for name in node.refs):
        readers[name] = readers.get(name, 0) + 1
    for leaf in captured.outputs:
        if isinstance(leaf, Ref):
            readers[leaf.name] = readers.get(leaf.name, 0) + 1
    dependent = set(captured.spatial_inputs)
    for node in captured.nodes:
        if any(name in dependent for name in node.refs):
            dependent.add(node.name)
    result: list[Node] = []
    for node in captured.nodes:
        conv = by_name.get(node.args[0].name) if node.target in _NORMS and isinstance(node.args[0], Ref) else None
        if conv is None or not _foldable(node, conv, readers, dependent):
            result.append(node)
            continue
        weight_shape = _weight_shape(captured, by_name, conv)
        if _LEAST_MAP * prod(weight_shape) > prod(node.shape):
            result.append(node)
            continue
        gamma, beta, mean, var = node.args[1:5]
        eps = node.args[7] if node.target is aten.batch_norm.default else node.args[6]
        bias = conv.args[2] if len(conv.args) > 2 else conv.kwargs.get("bias")
        channels = (node.shape[1],)
        scale = Node(f"{node.name}_scale", folded_scale, (gamma, var, eps), {}, channels, node.dtype)
        weight = Node(
            f"{node.name}_weight", folded_weight, (conv.args[1], Ref(scale.name)), {}, weight_shape, node.dtype
        )
        shift = Node(f"{node.name}_shift", folded_bias, (bias, mean, beta, Ref(scale.name)), {}, channels, node.dtype)
        kwargs = {key: value for key, value in conv.kwargs.items() if key != "bias"}
        args = (conv.args[0], Ref(weight.name), Ref(shift.name), *conv.args[3:])
        result = [kept for kept in result if kept.name != conv.name]
        result += [scale, weight, shift, replace(conv, name=node.name, args=args, kwargs=kwargs)]
    return tuple(result)


def _foldable(node: Node, conv: Node, readers: dict[str, int], dependent: set[str]) -> bool:
    if conv.op != "aten.conv2d" or readers[conv.name] != 1 or conv.name not in dependent or node.dtype.itemsize < 4:
        return False
    if node.target is aten.batch_norm.default and node.args[5]:
        return False
    others = [arg for arg in (*conv.args[1:3], *node.args[1:5]) if isinstance(arg, Ref)]
    return not any(arg.name in dependent for arg in others)


def _weight_shape(captured: Captured, by_name: dict[str, Node], conv: Node) -> tuple[int, ...]:
    name = conv.args[1].name
    return by_name[name].shape if name in by_name else captured.shapes[name][0]


def folded_scale(gamma: Tensor | None, var: Tensor, eps: float) -> Tensor:
    """gamma / sqrt(var + eps), of shape (C,)."""
    scale = torch.rsqrt(var + eps)
    return scale if gamma is None else gamma * scale


def folded_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """A convolution's weight (C, ...) with each output channel scaled."""
    return weight * scale.view(-1, *[1] * (weight.ndim - 1))


def folded_bias(bias: Tensor | None, mean: Tensor, beta: Tensor | None, scale: Tensor) -> Tensor:
    """beta + (bias - mean) * scale, of shape (C,)."""
    shift = (-mean if bias is None else bias - mean) * scale
    return shift if beta is None else shift + beta
