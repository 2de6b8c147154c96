"""Flattened maps: tensors in which height and width are one dimension, as in `x.flatten(2)` or tokens (N, H * W, C).

Tiles keep the two apart. An operation on a flattened map is turned into the same operation on a map that is not, so that no
other rule has to know. A map's shape in `Maps` is the one with all dimensions apart; `Maps.flat` says how many of them the
model sees as one: height, width, and any that stand beside them (3 for tokens of the whole batch, (N * H * W, C)).
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.captured import Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.rules.base import (
    Flat,
    Flattened,
    Maps,
    apply_rule,
    argument,
    declare,
    dims,
    groups,
    op_of,
    refuse_whole,
    sources,
    swap_refs,
)

aten = torch.ops.aten


def unflatten(node: Node, maps: Maps) -> tuple[list[Node], Flattened | None]:
    """Nodes on maps with all dimensions apart that do what `node` does, and how many dimensions of the result are one in `node`."""
    names = sources(node, maps)
    op = op_of(node.target)
    flat = None if op is None else op.flat
    if not maps.flat.keys() & set(names):
        if op is not None and op.flattens is not None:
            return [op.flattens(node, maps)], Flattened(2)
        found = _flattening(node, maps, names[0]) if flat is reshaping else None
        return ([node], None) if found is None else found
    shapes = {(maps.flat.get(n), maps.shapes[n][_position(maps, n) :][: _width(maps, n)]) for n in names}
    if len(shapes) > 1:
        raise node.refuse(
            "combines maps of a flattened image that are flattened in different ways: "
            + ", ".join(str(maps.shapes[name]) for name in names),
            "flatten the same dimensions of all of them",
        )
    if flat is None:
        raise _refuse(node, "works along")
    return flat(node, maps, names)


def _refuse(node: Node, what: str) -> UnsupportedOpError:
    return refuse_whole(node, what, "the positions of a flattened image, of which no tile holds all")


def seen_shape(maps: Maps, name: str) -> tuple[int, ...]:
    """The shape of a value as the model sees it."""
    shape = maps.shapes[name]
    if name not in maps.flat:
        return shape
    p, width = _position(maps, name), _width(maps, name)
    return (*shape[:p], prod(shape[p : p + width]), *shape[p + width :])


def _width(maps: Maps, name: str) -> int:
    """Return the number of dimensions of a map that the model sees as one."""
    return maps.flat[name].width if name in maps.flat else 1


def _position(maps: Maps, name: str) -> int:
    """The dimension that holds height and width of a flattened map."""
    width, behind = maps.flat.get(name, Flattened(2))
    return maps.axes[name].rows - (width - 2 - behind)


def last_of_image(maps: Maps, name: str) -> int:
    """The last dimension of a map, as the model sees it, that holds height or width."""
    return _position(maps, name) if name in maps.flat else max(maps.axes[name])


def _apart(d: int, p: int, width: int) -> int:
    """Return the position of dimension `d` of what the model sees, with dimension `p` cut in `width` of them."""
    return d if d <= p else d + width - 1


def dim_apart(maps: Maps, name: str, d: int) -> int:
    """Return where dimension `d` of a map as the model sees it stands in `maps.shapes`."""
    return _apart(d, _position(maps, name), _width(maps, name))


def _reshaped_weight(node: Node, name: str, shape: Sequence[int]) -> Node:
    made = f"{name}@{'x'.join(map(str, shape))}"
    return node.derived(aten.reshape.default, Ref(name), list(shape), name=made, shape=shape)


def apart(x: Tensor, shape: Sequence[int], rows: int, cols: int) -> Tensor:
    """A map in another shape, in which `rows` and `cols` are the dimensions of its height and its width."""
    return x.reshape(tuple(shape))


def _apart_node(node: Node, name: str, shape: Sequence[int], rows: int, cols: int) -> Node:
    return node.derived(apart, Ref(name), list(shape), rows, cols, shape=shape)


def _flattening(node: Node, maps: Maps, name: str) -> tuple[list[Node], Flattened] | None:
    """If `node` merges height and width of map `name`, and maybe what stands beside them: with all apart, and how many."""
    axes, shape = maps.axes[name], maps.shapes[name]
    if axes.cols != axes.rows + 1:
        return None
    if maps.extent(name) == (1, 1):
        return _flattening_one_position(node, maps, name)
    group_in, group_out = next(g for g in groups(shape, node.shape) if axes.rows in g[0])
    wide = [d for d in group_out if node.shape[d] > 1]
    if axes.cols not in group_in and shape[axes.cols] == 1 and not _places(node, maps):
        group_in = range(group_in.start, axes.cols + 1)  # one column: its dimension stands in whichever group
    if axes.cols not in group_in or len(wide) != 1:
        return None
    before = [shape[d] for d in group_in if d < axes.rows and shape[d] > 1]
    behind = [shape[d] for d in group_in if d > axes.cols and shape[d] > 1]
    merged, rows = (*before, *maps.extent(name), *behind), wide[0] + len(before)
    whole = (*node.shape[: wide[0]], *merged, *node.shape[wide[0] + 1 :])
    return [_apart_node(node, name, whole, rows, rows + 1)], Flattened(len(merged), len(behind))


def _flattening_one_position(node: Node, maps: Maps, name: str) -> tuple[list[Node], Flattened] | None:
    """`_flattening` of a map with a single position: any dimension of size 1 may be both, where there are not two of them."""
    if _places(node, maps):
        return None
    before = prod(maps.shapes[name][: maps.axes[name].rows])
    ones = [d for d, size in enumerate(node.shape) if size == 1 and prod(node.shape[:d]) == before]
    if ones:
        rows = ones[-1]
        return [
            _apart_node(node, name, (*node.shape[:rows], 1, 1, *node.shape[rows + 1 :]), rows, rows + 1)
        ], Flattened(2)
    if maps.axes[name] == (1, 2) and maps.shapes[name][0] == node.shape[0]:  # with the batch
        return [_apart_node(node, name, (node.shape[0], 1, 1, *node.shape[1:]), 1, 2)], Flattened(3)
    return None


def _places(node: Node, maps: Maps) -> bool:
    """True if the operator's own rule tells where height and width stand in the result."""
    try:
        apply_rule(node, maps)
    except UnsupportedOpError:
        return False
    return True


def reshaping(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """A reshape of what the model has flattened, with H = 12 and W = 20 for example:

    (2, 240, 8) -> (2, 12, 20, 8)            height and width apart again: no longer flat
    (2, 240, 8) -> (2, 240, 2, 4)            the flattened dimension stays whole
    (2, 240, 8) -> (480, 8)                  it is merged with those beside it, `Flattened(3)`
    (480, 8) -> (2, 240, 8)                  and taken apart from them again
    """
    name = names[0]
    p, shape, (width, behind) = _position(maps, name), seen_shape(maps, name), maps.flat[name]
    group_in, group_out = next(g for g in groups(shape, node.shape) if p in g[0])
    after = shape[p + 1 : group_in[-1] + 1]
    inner = [*shape[group_in[0] : p], *maps.shapes[name][p : p + width], *after]
    cols = p - group_in[0] + width - behind - 1  # the place of the width among them; the height stands before it
    if (found := _taken_apart(node.shape, group_out, inner, cols)) is not None:
        return [_apart_node(node, name, node.shape, *found)], None
    at, result, merged, rows = 0, list(node.shape[: group_out[0]]), None, 0
    for d in group_out:
        end, size = at, node.shape[d]
        if at < len(inner) and at not in (cols - 1, cols) and inner[at] > size > 1 and inner[at] % size == 0:
            inner[at : at + 1] = size, inner[at] // size
            cols += at < cols
        while prod(inner[at:end]) < size or (size == 1 and end < len(inner) and inner[end] == 1 and end == at):
            end += 1
        if d == group_out[-1] and prod(inner[end:]) == 1:
            end = len(inner)
        if prod(inner[at:end]) != size or at < cols == end or at == cols:
            raise _refuse(node, "cuts")
        if at < cols < end:
            while at < cols - 1 and inner[at] == 1:
                at += 1
            merged, rows = Flattened(end - at, end - 1 - cols), len(result) + cols - 1 - at
            result += inner[at:end]
        else:
            result.append(size)
        at = end
    if at < len(inner) or merged is None:
        raise _refuse(node, "cuts")
    return [_apart_node(node, name, (*result, *node.shape[group_out[-1] + 1 :]), rows, rows + 1)], merged


def _taken_apart(shape: Sequence[int], group: range, inner: Sequence[int], cols: int) -> tuple[int, int] | None:
    """The places of height and width in `shape`, if each has a dimension of its own in `group`; of several, the last ones."""
    height, width = inner[cols - 1 : cols + 1]
    before, behind = prod(inner[: cols - 1]), prod(inner[cols + 1 :])
    start, stop = group.start, group.stop
    if behind == 1:  # dimensions of size 1 that follow are in the group after this one
        stop += next((k for k, size in enumerate(shape[stop:]) if size != 1), len(shape) - stop)
    places = [
        (row, col)
        for row in range(start, stop)
        for col in range(row + 1, stop)
        if (shape[row], shape[col], prod(shape[start:row])) == (height, width, before)
        and prod(shape[row + 1 : col]) == 1
        and prod(shape[col + 1 : stop]) == behind
    ]
    return min(places, key=lambda place: (place[1] - place[0], -place[0]), default=None)


def elementwise(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Weights that are as large as the image are cut in as many dimensions as well."""
    p, width = _position(maps, names[0]), _width(maps, names[0])
    from_the_end = len(seen_shape(maps, names[0])) - p
    nodes: list[Node] = []
    for name in dict.fromkeys(name for name in node.refs if name not in maps):
        shape = maps.shapes[name]
        d = len(shape) - from_the_end
        if d < 0:
            continue
        apart = maps.shapes[names[0]][p : p + width] if shape[d] > 1 else (1,) * width
        nodes.append(_reshaped_weight(node, name, (*shape[:d], *apart, *shape[d + 1 :])))
        node = swap_refs(node, {name: nodes[-1].name})
    shapes = [maps.shapes[name] for name in sources(node, maps)] + [n.shape for n in nodes]
    return [*nodes, replace(node, shape=tuple(torch.broadcast_shapes(*shapes)))], maps.flat[names[0]]


def contraction(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """The letter of the flattened dimension becomes two."""
    equation, operands = node.args[:2]
    terms = equation.split("->")[0].split(",")
    letters = {term[_position(maps, o.name)] for term, o in zip(terms, operands, strict=True) if o.name in maps}
    if len(letters) != 1 or any(
        letters & set(term) for term, o in zip(terms, operands, strict=True) if o.name not in maps
    ):
        raise _refuse(node, "multiplies along")
    spare = [c for c in ascii_letters if c not in equation][: _width(maps, names[0]) - 1]
    letter = letters.pop()
    node = replace(node, args=(equation.replace(letter, "".join((letter, *spare))), operands))
    flat = letter in equation.split("->")[1]
    return [_with_shape(node, maps) if flat else node], maps.flat[names[0]] if flat else None


def _cut_weights(node: Node, maps: Maps, like: str) -> tuple[Node, list[Node]]:
    """`node` with the weights that it joins to map `like` reshaped as that is."""
    p, width, nodes = _position(maps, like), _width(maps, like), []
    for name in dict.fromkeys(name for name in node.refs if name not in maps):
        shape = maps.shapes[name]
        nodes.append(_reshaped_weight(node, name, (*shape[:p], *maps.shapes[like][p : p + width], *shape[p + 1 :])))
    return swap_refs(node, {n.args[0].name: n.name for n in nodes}), nodes


def _with_shape(node: Node, maps: Maps, more: Sequence[Node] = ()) -> Node:
    """`node` with the shape that its operator gives on maps with height and width apart. `more` are nodes that it reads."""
    shapes = {**maps.shapes, **{other.name: other.shape for other in more}}

    def empty(value: Any) -> Any:
        if isinstance(value, Ref):
            index = node.op in ("aten.index", "aten.index_select") and value.name not in maps
            return torch.empty(shapes[value.name], device="meta", dtype=torch.int64 if index else None)
        return [empty(item) for item in value] if isinstance(value, (list, tuple)) else value

    kwargs = {key: empty(value) for key, value in node.kwargs.items() if key not in ("device", "dtype")}
    result = node.target(*[empty(arg) for arg in node.args], **kwargs)
    return replace(node, shape=tuple((result if node.pick is None else result[node.pick]).shape))


def along(
    position: int,
    name: str = "dim",
    default: Any = None,
    *,
    whole: bool = False,
    keeps_shape: bool = False,
    inserts: bool = False,
    joins: bool = False,
) -> Flat:
    """For operators with dimensions at argument `position`; `whole`: they may include the flattened one.

    `keeps_shape`: it is still there in the result then. `inserts`: the dimension is a new one. `joins`: of weights among the maps,
    the flattened dimension is cut as theirs is.
    """

    def translate(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
        p, width, ndim = _position(maps, names[0]), _width(maps, names[0]), len(seen_shape(maps, names[0]))
        value = argument(node, position, name, default)
        if isinstance(value, bool):  # var(unbiased): of everything
            value = None
        many = isinstance(value, (list, tuple)) or value is None
        if inserts:
            ndim += 1
            p += value % ndim <= p
        given = dims(node, value, ndim)
        if p in given and not whole:
            raise _refuse(node, "cuts, joins or reorders")
        apart = [_apart(d, p, width) for d in given]
        apart += range(p + 1, p + width) if p in given else []
        kwargs = {key: v for key, v in node.kwargs.items() if key != name}
        args = list(node.args) + [None] * (position + 1 - len(node.args))
        if value is not None:
            args[position] = apart if many or len(apart) > 1 else apart[0]
        elif len(node.args) <= position:
            args = list(node.args)
        node = replace(node, args=tuple(args), kwargs=kwargs)
        stays = p not in given or keeps_shape
        if p in given:
            shape = maps.shapes[names[0]] if stays else node.shape
            return [replace(node, shape=shape)], maps.flat[names[0]] if stays else None
        node, apart_weights = _cut_weights(node, maps, names[0]) if joins else (node, [])
        return [*apart_weights, _with_shape(node, maps, apart_weights)], maps.flat[names[0]]

    return translate


def permuted(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Dimensions in another order."""
    p, width = _position(maps, names[0]), _width(maps, names[0])
    # What the operator does to the dimensions shows on a tensor whose sizes are their numbers.
    numbers = torch.empty(tuple(range(len(seen_shape(maps, names[0])))), device="meta")
    order = list(node.target(numbers, *node.args[1:], **node.kwargs).shape)
    order = [e for d in order for e in (range(p, p + width) if d == p else (_apart(d, p, width),))]
    return [_with_shape(node.derived(aten.permute.default, node.args[0], order), maps)], maps.flat[names[0]]


def sizes(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """`expand` and `repeat`."""
    sizes, kept = list(node.args[1]), -1 if node.op == "aten.expand" else 1
    p = _position(maps, names[0]) + len(sizes) - len(seen_shape(maps, names[0]))
    if sizes[p] not in (kept, seen_shape(maps, names[0])[p] if kept == -1 else 1):
        raise _refuse(node, "repeats")
    return [
        _with_shape(
            replace(node, args=(node.args[0], [*sizes[:p], *[kept] * _width(maps, names[0]), *sizes[p + 1 :]])), maps
        )
    ], maps.flat[names[0]]


def indexed(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Picking by index along another dimension."""
    p, width = _position(maps, names[0]), _width(maps, names[0])
    indices = list(node.args[1])
    if indices[p : p + 1] not in ([], [None]):
        raise _refuse(node, "picks by index among")
    indices[p:p] = [None] * (width - 1)
    return [_with_shape(replace(node, args=(node.args[0], indices)), maps)], maps.flat[names[0]]


def padded(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Padding of the dimensions behind the flattened one."""
    if len(node.args[1]) // 2 >= len(seen_shape(maps, names[0])) - _position(maps, names[0]):
        raise _refuse(node, "pads")
    return [_with_shape(node, maps)], maps.flat[names[0]]


def pointwise_conv1d(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """A convolution with a kernel of one position, as one over height and width."""
    weight = node.args[1].name
    shape, groups_of = maps.shapes[weight], argument(node, 6, "groups", 1)
    strides = (*dims(node, argument(node, 3, "stride", 1), 99), *dims(node, argument(node, 4, "padding", 0), 99))
    if (
        weight in maps
        or shape[-1] != 1
        or strides != (1, 0)
        or (_position(maps, names[0]), _width(maps, names[0])) != (2, 2)
    ):
        raise _refuse(node, "convolves along")
    apart = _reshaped_weight(node, weight, (*shape, 1))
    args = (node.args[0], Ref(apart.name), argument(node, 2, "bias"), [1, 1], [0, 0], [1, 1], groups_of)
    made = node.derived(aten.conv2d.default, *args, shape=(*node.shape[:2], *maps.extent(names[0])))
    return [apart, made], maps.flat[names[0]]


def normalised(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Normalisation over dimensions behind the flattened one."""
    p, ndim = _position(maps, names[0]), len(seen_shape(maps, names[0]))
    if p >= ndim - len(node.args[1]):
        raise _refuse(node, "normalises over")
    return [_with_shape(node, maps)], maps.flat[names[0]]


def linear(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """A product along the last dimension, which is not the flattened one."""
    if _position(maps, names[0]) == len(seen_shape(maps, names[0])) - 1 or names != [node.args[0].name]:
        raise _refuse(node, "multiplies along")
    return [_with_shape(node, maps)], maps.flat[names[0]]


def channels_second(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Operators that know dimensions 0 and 1 only."""
    if _position(maps, names[0]) < 2:
        raise _refuse(node, "takes for channels")
    return [replace(node, shape=maps.shapes[names[0]])], maps.flat[names[0]]


def unchanged(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Whatever keeps the shape."""
    return [replace(node, shape=maps.shapes[names[0]])], maps.flat[names[0]]


def pooled(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """Pooling to one position."""
    p = _position(maps, names[0])
    if list(node.args[1]) != [1] or p != len(seen_shape(maps, names[0])) - 1:
        raise _refuse(node, "pools along")
    return [node.derived(aten.mean.dim, node.args[0], list(range(p, p + _width(maps, names[0]))), True)], None


declare(
    *(aten.matmul, aten.mm, aten.bmm, aten.baddbmm, aten.addmm, aten.linear, aten.einsum, aten.softmax),
    *(aten.scaled_dot_product_attention, aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten),
    *(aten.permute, aten.transpose, aten.unfold, aten.im2col),
    on_tokens=True,
)
