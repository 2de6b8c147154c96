"""Operations over the whole image, rewritten: reductions, what is computed from their results, and pointwise operations.

Each function returns nodes to put in the place of one, the last of which has its name; or None where the operation is local.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce

from widefield.streaming.capture import Node, Ref
from widefield.streaming.rules.base import Maps, Placed, argument, caller, dims, only_map, rule, sources
from widefield.streaming.rules.channels import WITHOUT_DIM, as_einsum
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.reductions import (
    ExpSum,
    FirstMaximum,
    Maximum,
    Moments,
    Reduction,
    Sum,
    cell,
    precise,
    sum_of_cells,
    sum_of_product,
    sum_over,
)

aten = torch.ops.aten
Rewrite = Callable[[Node, Maps], list[Node] | None]
REWRITES: dict[Any, Rewrite] = {}


def rewrite(*packets: Any) -> Callable[[Rewrite], Rewrite]:
    """Register a rewriting of ATen operators, all overloads."""

    def register(function: Rewrite) -> Rewrite:
        for packet in packets:
            REWRITES.update({getattr(packet, overload): function for overload in packet.overloads()})
        return function

    return register


class _Rewriting:
    """The nodes that take the place of `node`, as they are added."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.nodes: list[Node] = []

    def add(self, suffix: str, target: Callable[..., Any], args: Sequence[Any], shape: Sequence[int]) -> Ref:
        name = f"{self.node.name}@{suffix}"
        node = self.node
        self.nodes.append(
            replace(node, name=name, target=target, args=tuple(args), kwargs={}, shape=tuple(shape), pick=None)
        )
        return Ref(name)

    def reduce(self, names: Sequence[str], reduction: Reduction, *shapes: Sequence[int]) -> list[Ref]:
        """The parts of a reduction of maps `names`, of these shapes. The same reduction of the same map is done once."""
        name = f"{self.node.name}@sum" if isinstance(reduction, Sum) else f"{'+'.join(names)}@{reduction}"
        args, kwargs = tuple(map(Ref, names)), {"shapes": tuple(map(tuple, shapes))}
        self.nodes.append(
            replace(self.node, name=name, target=cast("Any", reduction), args=args, kwargs=kwargs, pick=None)
        )
        return [Ref(part) for part in parts_of(self.nodes[-1])]

    def result(self, target: Callable[..., Any], *args: Any) -> list[Node]:
        self.nodes.append(replace(self.node, target=target, args=args, kwargs={}, pick=None))
        return self.nodes


def parts_of(reduction: Node) -> tuple[str, ...]:
    """The names of the tensors that a reduction gives."""
    return tuple(f"{reduction.name}.{k}" for k in range(len(reduction.kwargs["shapes"])))


def _kept(shape: Sequence[int], over: Sequence[int]) -> tuple[int, ...]:
    """`shape` with dimensions `over` of size 1."""
    return tuple(1 if d in over else size for d, size in enumerate(shape))


def _over(node: Node, maps: Maps, position: int = 1) -> tuple[str, tuple[int, ...]] | None:
    """The map that is reduced, and the dimensions; None where neither height nor width is among them."""
    name = only_map(node, maps)
    value = argument(node, position, "dim")
    if getattr(node.target, "_overloadname", "") == "default" and node.op.split(".")[1] in WITHOUT_DIM:
        value = None
    over = dims(node, value, len(maps.shapes[name]))
    return (name, over) if set(over) & set(maps.axes[name]) else None


def divide(total: Tensor, count: float | Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`total / count` in another shape of as many elements."""
    if isinstance(count, Tensor):
        count = count.to(total.device, total.dtype)
    return (total if not isinstance(count, Tensor) and count == 1 else total / count).reshape(tuple(shape)).to(dtype)


@rewrite(aten.mean, aten.sum)
def average(node: Node, maps: Maps) -> list[Node] | None:
    """Sum or mean."""
    if (found := _over(node, maps)) is None:
        return None
    name, over = found
    new, shape = _Rewriting(node), maps.shapes[name]
    (total,) = new.reduce([name], sum_over(over, maps.axes[name], maps.extent(name)), _kept(shape, over))
    count = prod(shape[d] for d in over) if node.op == "aten.mean" else 1
    return new.result(divide, total, count, node.shape, node.dtype)


@rewrite(aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin)
def extremum(node: Node, maps: Maps) -> list[Node] | None:
    """Maximum or minimum over height and width. Values and indices (`max(dim)`) along the flattened image only."""
    if (
        len(sources(node, maps)) != 1
        or (found := _over(node, maps)) is None
        or not set(maps.axes[found[0]]) <= set(found[1])
    ):
        return None
    name, over = found
    new, shape, sign = _Rewriting(node), maps.shapes[name], -1 if "min" in node.op else 1
    index = node.op in ("aten.argmax", "aten.argmin")
    if not index and node.pick is None:
        value = new.reduce([name], Maximum(over, sign), *[_kept(shape, over)] * 2)[0]
        return new.result(divide, value, 1, node.shape, node.dtype)
    if set(over) != set(maps.axes[name]):
        return None
    return _first_maximum(node, maps, name, 1 if index else node.pick, (1, 1), sign)


def _first_maximum(
    node: Node, maps: Maps, name: str, pick: int | None, cells: tuple[int, int], sign: int = 1
) -> list[Node]:
    new = _Rewriting(node)
    shape = (*(size for d, size in enumerate(maps.shapes[name]) if d not in maps.axes[name]), *cells)
    parts = new.reduce([name], FirstMaximum(maps.axes[name], maps.extent(name), cells, sign), shape, shape)
    return new.result(divide, parts[pick or 0], 1, node.shape, node.dtype)


@rewrite(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d)
def adaptive_pool(node: Node, maps: Maps) -> list[Node] | None:
    """Pooling to a grid of cells, which may overlap."""
    name = only_map(node, maps)
    shape, axes, extent = maps.shapes[name], maps.axes[name], maps.extent(name)
    if axes != (len(shape) - 2, len(shape) - 1):
        return None
    cells = (node.shape[-2], node.shape[-1])
    if "max" in node.op:
        return _first_maximum(node, maps, name, node.pick, cells)
    new = _Rewriting(node)
    (total,) = new.reduce([name], sum_of_cells(axes, extent, cells), (*shape[:-2], *cells))
    rows, cols = ([cell(i, n, k)[1] - cell(i, n, k)[0] for i in range(k)] for n, k in zip(extent, cells, strict=True))
    count = torch.tensor(rows)[:, None] * torch.tensor(cols)
    return new.result(divide, total, count if count.numel() > 1 else int(count), node.shape, node.dtype)


@rewrite(aten.avg_pool2d, aten.max_pool2d, aten.max_pool2d_with_indices)
def pool_of_everything(node: Node, maps: Maps) -> list[Node] | None:
    """A pooling window as large as the map."""
    name = only_map(node, maps)
    kernel = argument(node, 1, "kernel_size")
    padding = argument(node, 3, "padding", 0)
    override = argument(node, 6, "divisor_override") if "avg" in node.op else None
    whole = tuple(kernel) * (2 // len(kernel)) == maps.extent(name) and not any(padding or ()) and override is None
    return adaptive_pool(node, maps) if whole and node.shape[-2:] == (1, 1) else None


@rewrite(aten.linalg_vector_norm, aten.norm)
def vector_norm(node: Node, maps: Maps) -> list[Node] | None:
    """(sum |x|^p)^(1/p)."""
    p = argument(node, 1, "ord" if node.op == "aten.linalg_vector_norm" else "p", 2)
    if (found := _over(node, maps, position=2)) is None:
        return None
    name, over = found
    new, shape, axes = _Rewriting(node), maps.shapes[name], maps.axes[name]
    p = 2.0 if p is None else float(p)
    if abs(p) == torch.inf and not set(axes) <= set(over):
        return None
    powers = new.add("power", power_of_norm, (Ref(name), p), shape).name
    if abs(p) == torch.inf:
        total = new.reduce([powers], Maximum(over, 1 if p > 0 else -1), *[_kept(shape, over)] * 2)[0]
    else:
        (total,) = new.reduce([powers], sum_over(over, axes, maps.extent(name)), _kept(shape, over))
    return new.result(root_of_norm, total, p, node.shape, node.dtype)


def power_of_norm(x: Tensor, p: float) -> Tensor:
    """What a p-norm adds up: |x|^p; |x| for the maximum norm; x != 0 for p = 0."""
    if p == 2.0:
        return x * x
    if p == 0.0:
        return (x != 0).to(x.dtype)
    return x.abs() if abs(p) in (1.0, torch.inf) else x.abs() ** p


def root_of_norm(total: Tensor, p: float, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The p-th root; its gradient at zero is zero, as PyTorch has it."""
    if p not in (0.0, 1.0) and abs(p) != torch.inf:
        zero = total == 0
        total = torch.where(zero, 0, torch.where(zero, 1, total) ** (1.0 / p))
    return total.reshape(tuple(shape)).to(dtype)


@rewrite(aten.var, aten.std, aten.var_mean, aten.std_mean)
def variance(node: Node, maps: Maps) -> list[Node] | None:
    """Variance, standard deviation, with the mean."""
    if (found := _over(node, maps)) is None or not set(maps.axes[found[0]]) <= set(found[1]):
        return None
    name, over = found
    overload = getattr(node.target, "_overloadname", "")
    flag: Any = argument(node, 1 if overload == "default" else 2, "unbiased", True)
    correction = float(node.kwargs.get("correction", 1) or 0) if "correction" in overload else float(bool(flag))
    new, (mean, squares, count) = _moments(node, maps, name, over)
    if node.pick == 1:
        return new.result(divide, mean, 1, node.shape, node.dtype)
    return new.result(spread, squares, count - correction, "std" in node.op, node.shape, node.dtype)


def spread(squares: Tensor, count: float, root: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Variance or standard deviation from a sum of squared deviations."""
    value = squares / max(count, 0.0)
    return (value.sqrt() if root else value).reshape(tuple(shape)).to(dtype)


def _moments(node: Node, maps: Maps, name: str, over: Sequence[int]) -> tuple[_Rewriting, tuple[Ref, Ref, int]]:
    new, shape = _Rewriting(node), maps.shapes[name]
    count = prod(shape[d] for d in over)
    mean, squares = new.reduce([name], Moments(tuple(sorted(over)), count), *[_kept(shape, over)] * 2)
    return new, (mean, squares, count)


@rewrite(aten.logsumexp, aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax)
def softmax(node: Node, maps: Maps) -> list[Node] | None:
    """exp(x - L), x - L or L itself, where L = log(sum(exp(x)))."""
    if (found := _over(node, maps)) is None or not set(maps.axes[found[0]]) <= set(found[1]):
        return None
    name, over = found
    new, kept = _Rewriting(node), _kept(maps.shapes[name], over)
    top, total = new.reduce([name], ExpSum(over), kept, kept)
    if node.op == "aten.logsumexp":
        return new.result(log_of_sum, top, total, node.shape, node.dtype)
    log = new.add("log", log_of_sum, (top, total, kept, precise(node.dtype)), kept)
    return new.result(
        exp_minus if node.op.endswith("aten.softmax") or node.op == "aten._softmax" else minus,
        Ref(name),
        log,
        node.dtype,
    )


def log_of_sum(top: Tensor, total: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """log(sum(exp(x)))."""
    return (top + total.log()).reshape(tuple(shape)).to(dtype)


def exp_minus(x: Tensor, log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(x - log)."""
    return (x - log).exp().to(dtype)


def minus(x: Tensor, log: Tensor, dtype: torch.dtype) -> Tensor:
    """x - log."""
    return (x - log).to(dtype)


rule(power_of_norm, exp_minus, minus)(pointwise)


@rewrite(aten.instance_norm, aten.group_norm, aten.native_group_norm)
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
    new, (mean, squares, count) = _moments(node, maps, name, space)
    args = (mean, squares, count, groups, weight, bias, eps)
    return new.result(apply_affine, Ref(name), new.add("affine", scale_and_shift, args, (2, *_kept(shape, space))))


@rewrite(aten.batch_norm, aten._native_batch_norm_legit)
def batch_norm(node: Node, maps: Maps) -> list[Node] | None:
    """Batch normalisation by the statistics of the batch, or of the batches of all processes."""
    name = only_map(node, maps)
    shape = maps.shapes[name]
    by_batch = node.args[5] if node.op == "aten.batch_norm" else getattr(node.target, "_overloadname", "") == "no_stats"
    if not by_batch or min(maps.axes[name]) < 2 or node.pick not in (None, 0):
        return None
    weight, bias, eps = node.args[1], node.args[2], node.args[7 if node.op == "aten.batch_norm" else 5]
    over = (0, *range(2, len(shape)))
    new, (mean, squares, count) = _moments(node, maps, name, over)
    kept, everywhere = _kept(shape, over), node.module_path in maps.synchronised
    batch = new.add("batch", statistics_of_batch, (mean, squares, count, everywhere), (3, *kept))
    affine = new.add("affine", scale_and_shift_of_batch, (batch, weight, bias, eps), (2, *kept))
    return new.result(apply_affine, Ref(name), affine)


def statistics_of_batch(mean: Tensor, squares: Tensor, count: int, everywhere: bool) -> Tensor:
    """Mean, sum of squared deviations and count, stacked; merged over all processes if `everywhere`."""
    if not (everywhere and distributed.is_initialized() and distributed.get_world_size() > 1):
        return torch.stack([mean, squares, torch.full_like(mean, count)])
    sizes, sums = all_reduce(torch.stack([torch.full_like(mean, count), mean * count]))
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
    mean: Tensor, squares: Tensor, count: int, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """A normalisation as `x * scale + shift`: both of them in one tensor (2, N or 1, C, 1, ...).

    `mean` and `squares` (sum of squared deviations from it) are those of `count` elements of each channel; the channels of a
    group are merged.
    """
    shape = mean.shape
    mean, squares = (x.reshape(shape[0], groups, -1) for x in (mean, squares))
    centre = mean.mean(-1, keepdim=True)
    total = (squares + count * (mean - centre) ** 2).sum(-1, keepdim=True)
    scale = torch.rsqrt(total / (count * mean.shape[-1]) + eps).expand_as(mean)
    if weight is not None:
        scale = scale * weight.reshape(groups, -1)
    shift = -centre * scale
    if bias is not None:
        shift = shift + bias.reshape(groups, -1)
    return torch.stack([scale.reshape(shape), shift.reshape(shape)])


def apply_affine(x: Tensor, affine: Tensor) -> Tensor:
    """`x * scale + shift`, in the dtype of `x`."""
    if x.dtype == affine.dtype:
        return torch.addcmul(affine[1], x, affine[0])
    return (x * affine[0] + affine[1]).to(x.dtype)


@rule(apply_affine)
def affine(node: Node, maps: Maps) -> Placed:
    """Position by position."""
    name, call = only_map(node, maps), caller(node, maps)
    return Placed((maps.read(name),), maps.axes[name], lambda tiles, work: call(tiles, work.weights))


@rewrite(aten.layer_norm, aten.native_layer_norm)
def layer_norm(node: Node, maps: Maps) -> list[Node] | None:
    """Layer normalisation over dimensions that include height and width."""
    name = only_map(node, maps)
    axes, shape = maps.axes[name], maps.shapes[name]
    over = tuple(range(len(shape) - len(node.args[1]), len(shape)))
    if not set(axes) <= set(over) or node.pick not in (None, 0):
        return None
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    new, (mean, squares, count) = _moments(node, maps, name, over)
    eps, kept = argument(node, 4, "eps", 1e-5), _kept(shape, over)
    stacked = new.add("affine", scale_and_shift_of_layer, (mean, squares, count, eps), (2, *kept))
    if weight is None and bias is None:
        return new.result(apply_affine, Ref(name), stacked)
    last = new.add("standard", apply_affine, (Ref(name), stacked), shape)
    if weight is not None and bias is not None:
        last = new.add("scaled", aten.mul.Tensor, (last, weight), shape)
    return new.result(aten.mul.Tensor if bias is None else aten.add.Tensor, last, weight if bias is None else bias)


def scale_and_shift_of_layer(mean: Tensor, squares: Tensor, count: int, eps: float) -> Tensor:
    """As `scale_and_shift`, for statistics over `count` elements each."""
    scale = torch.rsqrt(squares / count + eps)
    return torch.stack([scale, -mean * scale])


@rewrite(aten.einsum, aten.matmul, aten.bmm)
def contraction(node: Node, maps: Maps) -> list[Node] | None:
    """A product of maps, summed over height and width."""
    if node.op != "aten.einsum":
        if min(len(maps.shapes[ref.name]) for ref in node.args[:2]) < 2:
            return None
        node = as_einsum(node, [maps.shapes[ref.name] for ref in node.args[:2]])
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    if "->" not in equation or "." in equation or not all(isinstance(o, Ref) and o.name in maps for o in operands):
        return None
    left, right = equation.split("->")
    letters = {
        tuple(term[axis] for axis in maps.axes[operand.name])
        for term, operand in zip(left.split(","), operands, strict=True)
    }
    if len(letters) != 1 or set(*letters) & set(right):
        return None
    new = _Rewriting(node)
    (total,) = new.reduce([operand.name for operand in operands], sum_of_product(equation), node.shape)
    return new.result(divide, total, 1, node.shape, node.dtype)
