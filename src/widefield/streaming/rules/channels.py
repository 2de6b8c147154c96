"""Operations along the channels (or any dimension that is neither height nor width): every position by itself."""

from collections.abc import Callable, Sequence
from string import ascii_letters

import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.rules import flat, ranges
from widefield.streaming.rules.base import (
    Axes,
    Flattened,
    Maps,
    Placed,
    TileContext,
    argument,
    called,
    caller,
    declare,
    dims,
    only_map,
    refuse_whole,
    rule,
    sources,
)
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.rewriting import Rewriting

aten = torch.ops.aten


# Their default overloads take no dimension: they reduce over all of them.
WITHOUT_DIM = {
    *("mean", "sum", "var", "std", "var_mean", "std_mean", "max", "min", "prod", "any", "all"),
    *("median", "nanmedian"),
}


@rule(
    *(aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax),
    saves=("result",),
    flat=flat.along(1, whole=True, keeps_shape=True),
)
@rule(aten.cumsum, saves=(), flat=flat.along(1))
@rule(aten.sort, aten.topk, saves=("indices",))
@rule(aten.cummax, aten.cummin, saves=("inputs", "indices"))
@rule(aten.argsort)
@rule(aten.logcumsumexp, saves=("inputs", "result"), flat=flat.along(1))
@rule(aten.cumprod, saves=("inputs", "result"), flat=flat.along(1))
@rule(aten.glu, flat=flat.along(1, default=-1))
def along(node: Node, maps: Maps) -> Placed:
    """Along one dimension, which stays."""
    name = only_map(node, maps)
    position, default = {"aten.glu": (1, -1), "aten.sort": (1, -1), "aten.argsort": (1, -1), "aten.topk": (2, -1)}.get(
        node.op, (1, None)
    )
    dim = dims(node, argument(node, position, "dim", default), len(maps.shapes[name]))[0]
    if dim in maps.axes[name]:
        raise refuse_whole(node, "runs along")
    return called(node, maps, maps.axes[name])


@rule(aten.gather, saves=("inputs", "indices"))
@rule(aten.scatter, aten.scatter_add)
@rule(aten.linalg_cross)
def gather(node: Node, maps: Maps) -> Placed:
    """Picking among the channels of each position by a map of indices, putting them there, products of channels."""
    names = sources(node, maps)
    ndim = len(node.shape)
    (dim,) = dims(node, argument(node, 2 if node.op == "aten.linalg_cross" else 1, "dim", -1), ndim)
    needed = sum(isinstance(arg, Ref) for arg in node.args)
    kinds = {(maps.axes[name], maps.extent(name), len(maps.shapes[name])) for name in names}
    if len(names) != needed or len(kinds) > 1:
        raise node.refuse("picks by indices of another height or width", "pick from a map by a map of the same size")
    if dim in maps.axes[names[0]] or ndim != len(maps.shapes[names[0]]):
        raise refuse_whole(node, "picks along")
    return called(node, maps, maps.axes[names[0]])


@rule(aten.avg_pool3d)
def pool_channels(node: Node, maps: Maps) -> Placed:
    """Pooling of a dimension before height and width, as local response normalisation does."""
    name = only_map(node, maps)
    ndim = len(maps.shapes[name])
    kernel, stride, padding = (
        list(argument(node, k, key, [])) for k, key in ((1, "kernel_size"), (2, "stride"), (3, "padding"))
    )
    stride, padding = (list(x) * (3 if len(x) == 1 else 1) for x in (stride or kernel, padding or [0]))
    if maps.axes[name] != (ndim - 2, ndim - 1) or (kernel[1:], stride[1:], padding[1:]) != ([1, 1], [1, 1], [0, 0]):
        raise node.refuse("pools height or width with another dimension", "pool them by avg_pool2d")
    return called(node, maps, maps.axes[name])


@rule(aten.mean, aten.sum, saves=(), flat=flat.along(1, whole=True))
@rule(
    *(aten.amax, aten.amin, aten.std, aten.std_mean, aten.logsumexp),
    saves=("inputs", "result"),
    flat=flat.along(1, whole=True),
)
@rule(aten.prod, saves=("inputs", "result"))
@rule(aten.linalg_vector_norm, aten.norm, saves=("inputs", "result"), flat=flat.along(2, whole=True))
@rule(aten.max, aten.min, saves=("indices",), flat=flat.along(1, whole=True))
@rule(aten.median, aten.nanmedian, aten.kthvalue, aten.mode, saves=("indices",))
@rule(aten.nansum)
@rule(aten.aminmax, saves=("inputs", "result", "mask"))
@rule(aten.count_nonzero)
@rule(aten.var, aten.var_mean, aten.argmax, aten.argmin, flat=flat.along(1, whole=True))
@rule(aten.any, aten.all)
def reduction(node: Node, maps: Maps) -> Placed:
    """Over some dimensions, none of them height or width."""
    name = sources(node, maps)[0]
    position = 2 if node.op in ("aten.linalg_vector_norm", "aten.norm", "aten.kthvalue") else 1
    value = argument(node, position, "dim", -1 if node.op in ("aten.kthvalue", "aten.mode") else None)
    if getattr(node.target, "_overloadname", "") == "default" and node.op.split(".")[1] in WITHOUT_DIM:
        value = None
    if isinstance(value, Ref):  # aten.max.other compares two maps
        raise node.refuse("has no streaming rule", "use torch.maximum")
    over = dims(node, value, len(maps.shapes[name]))
    axes = maps.axes[name]
    if set(over) & set(axes):
        raise refuse_whole(node, "reduces over")
    if len(node.shape) < len(maps.shapes[name]):  # keepdim=False
        axes = Axes(*(axis - sum(d < axis for d in over) for axis in axes))
    return called(node, maps, axes)


declare(aten.softmax, aten._softmax, range_of=ranges.limited(0.0, 1.0))
declare(aten.mean, aten.amax, aten.amin, range_of=ranges.anywhere)


@rule(aten.searchsorted, aten.bucketize)
def between(node: Node, maps: Maps) -> Placed:
    """The place of each value among those of one sorted list."""
    name = sources(node, maps)[0]
    if [ref for ref in node.refs if ref != name and maps.shapes[ref][1:]] or len(sources(node, maps)) > 1:
        raise node.refuse("searches in another list at each position", "search in one list (K,) for all of them")
    call = caller(node, maps)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        return call([tiles[0].contiguous()], context.weights)  # PyTorch warns of other tensors

    return Placed((maps.read(name),), maps.axes[name], run)


@rule(aten.embedding)
def embedding(node: Node, maps: Maps) -> Placed:
    """The row of a weight for each position, as a last dimension."""
    name = sources(node, maps)[-1]
    if len(sources(node, maps)) > 1 or any(node.args[3:]):
        raise node.refuse("scales gradients by what the whole image holds", "leave scale_grad_by_freq and sparse off")
    return called(node, maps, maps.axes[name])


@rule(aten.tril, aten.triu, saves=())
def triangle(node: Node, maps: Maps) -> Placed:
    """Half of the matrices in the last two dimensions, none of them height or width."""
    name = only_map(node, maps)
    if max(maps.axes[name]) >= len(node.shape) - 2:
        raise refuse_whole(node, "cuts")
    return called(node, maps, maps.axes[name])


@rule(aten.layer_norm, keeps_batch=True, flat=flat.normalised)
@rule(aten.native_layer_norm, aten.rms_norm, keeps_batch=True)
def layer_norm(node: Node, maps: Maps) -> Placed:
    """Over the last dimensions of the map, none of them height or width."""
    name = only_map(node, maps)
    ndim = len(maps.shapes[name])
    if max(maps.axes[name]) >= ndim - len(node.args[1]) or node.pick not in (None, 0):
        raise refuse_whole(node, "normalises over")
    return called(node, maps, maps.axes[name])


@rule(aten.linear, keeps_batch=True, flat=flat.linear)
def linear(node: Node, maps: Maps) -> Placed:
    """Map (..., C) times a weight: the last dimension is contracted."""
    name = only_map(node, maps)
    if len(maps.shapes[name]) - 1 in maps.axes[name]:
        raise refuse_whole(node, "multiplies along")
    return called(node, maps, maps.axes[name])


def _flat_matmul(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    return flat.contraction(as_einsum(node, [flat.seen_shape(maps, ref.name) for ref in node.args[:2]]), maps, names)


@rule(aten.matmul, aten.bmm, flat=_flat_matmul)
def matmul(node: Node, maps: Maps) -> Placed:
    """A product of matrices that are not the height and the width."""
    return einsum(as_einsum(node, [maps.shapes[ref.name] for ref in node.args[:2]]), maps)


def attention_inside(node: Node, maps: Maps, dtype_of: Callable[[str], torch.dtype]) -> list[Node] | None:
    """`scaled_dot_product_attention` among positions of other dimensions than height and width, step by step: inside of windows.

    None for other attention.
    """
    query, key, value, *_ = node.args
    mask, p = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    causal, grouped = argument(node, 5, "is_causal", False), node.kwargs.get("enable_gqa", False)
    shapes = [flat.seen_shape(maps, ref.name) for ref in (query, key, value)]
    inside = 3 if grouped else 2  # dimensions of what attends, heads among them where they are matched
    apart = all(
        ref.name in maps and flat.last_of_image(maps, ref.name) < len(shape) - inside
        for ref, shape in zip((query, key, value), shapes, strict=True)
    )
    if not apart:
        return None
    scale = node.kwargs.get("scale")
    scale = shapes[0][-1] ** -0.5 if scale is None else scale
    new = Rewriting(node)
    if grouped and shapes[1][-3] != shapes[0][-3]:
        each = shapes[0][-3] // shapes[1][-3]
        for k in (1, 2):
            shapes[k] = (*shapes[k][:-3], shapes[0][-3], *shapes[k][-2:])
        key = new.add("keys of all heads", aten.repeat_interleave.self_int, (key, each, -3), shapes[1])
        value = new.add("values of all heads", aten.repeat_interleave.self_int, (value, each, -3), shapes[2])
    scores = (*node.shape[:-1], shapes[1][-2])
    turned = new.add("key", aten.transpose.int, (key, -2, -1), (*shapes[1][:-2], *shapes[1][:-3:-1]))
    scaled = new.add("query", aten.mul.Tensor, (query, scale), shapes[0])
    weights = new.add("scores", aten.matmul.default, (scaled, turned), scores)
    if mask is not None and dtype_of(mask.name) == torch.bool:
        weights = new.add("masked", aten.where.ScalarOther, (mask, weights, -torch.inf), scores)
    elif mask is not None:
        weights = new.add("masked", aten.add.Tensor, (weights, mask), scores)
    if causal:
        weights = new.add("causal", without_later, (weights,), scores)
    weights = new.add("weights", aten._safe_softmax.default, (weights, -1), scores)
    if p:
        weights = new.add("dropout", aten.dropout.default, (weights, p, True), scores)
    return new.result(aten.matmul.default, weights, value)


def without_later(scores: Tensor) -> Tensor:
    """Scores of queries (rows) and keys (columns) without those of keys that come after the query."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


rule(without_later, saves=("mask",), cheap=True, keeps_batch=True, flat=flat.elementwise)(pointwise)


def as_einsum(node: Node, shapes: Sequence[Sequence[int]]) -> Node:
    """A product of (batches of) matrices or vectors of these shapes as an einsum."""
    batch = ascii_letters[3 : 3 + max(*map(len, shapes), 2) - 2]
    left, right = (batch[len(batch) - max(len(shape) - 2, 0) :] for shape in shapes)
    row, column = "a" if len(shapes[0]) > 1 else "", "c" if len(shapes[1]) > 1 else ""
    equation = f"{left}{row}b,{right}b{column}->{batch}{row}{column}"
    return node.derived(aten.einsum.default, equation, list(node.args[:2]))


def explicit(equation: str, ndims: Sequence[int]) -> str:
    """An einsum equation for operands of `ndims` dimensions with a letter for each of them, and the result written out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = [letter for letter in ascii_letters if letter not in equation]
    widths = [ndim - len(term.replace("...", "")) for term, ndim in zip(terms, ndims, strict=True)]
    dots = "".join(spare[: max(widths)])
    if not arrow:
        letters = sorted({c for c in left if c.isalpha() and left.count(c) == 1})
        right = "..." * ("..." in left) + "".join(letters)
    terms = [term.replace("...", dots[len(dots) - width :]) for term, width in zip(terms, widths, strict=True)]
    return f"{','.join(terms)}->{right.replace('...', dots)}"


@rule(aten.einsum, flat=flat.contraction)
def einsum(node: Node, maps: Maps) -> Placed:
    """Maps and weights: neither height nor width is summed over or shared with a weight."""
    equation, operands = node.args[:2]
    left, right = equation.split("->")
    terms = dict(zip(range(len(operands)), left.split(","), strict=True))
    letters = {tuple(terms[k][d] for d in maps.axes[o.name]) for k, o in enumerate(operands) if o.name in maps}
    weights = "".join(terms[k] for k, o in enumerate(operands) if o.name not in maps)
    if len(letters) != 1 or any(letter not in right or letter in weights for letter in next(iter(letters))):
        raise refuse_whole(node, "sums over")
    rows, cols = letters.pop()
    if any(term.count(letter) > 1 for term in terms.values() for letter in (rows, cols)):
        raise refuse_whole(node, "takes the diagonal of")
    return called(node, maps, Axes(right.index(rows), right.index(cols)))
