"""Sampling where a map says: local if it is known how far from its own place each position looks.

A bound is known of a map that an operation keeps within fixed numbers (tanh, sigmoid, clamp, softmax), and of what is made of such
maps with numbers (`2 * x.tanh() + 1`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.streaming.captured import Node, Ref
from widefield.streaming.extents import Window
from widefield.streaming.rules.base import Axes, Maps, Placed, Read, TileContext, rule, sources

aten = torch.ops.aten
Bounds = tuple[float, float]
_KEPT_WITHIN: dict[str, Bounds] = {
    **dict.fromkeys(("aten.tanh", "aten.sin", "aten.cos", "aten.erf"), (-1.0, 1.0)),
    **dict.fromkeys(("aten.sigmoid", "aten.softmax", "aten._softmax", "aten.hardsigmoid"), (0.0, 1.0)),
}
_MOVED = frozenset(
    (
        *("aten.view", "aten.reshape", "aten._unsafe_view", "apart", "aten.flatten", "aten.unflatten", "aten.permute"),
        *("aten.transpose", "aten.slice", "aten.select", "aten.unbind", "aten.split", "aten.split_with_sizes"),
        *("aten.chunk", "aten.alias", "aten.clone", "aten.contiguous", "aten.unsqueeze", "aten.squeeze", "aten.cat"),
        *("aten.stack", "aten.roll", "turn", "aten.flip", "aten.index_select"),
    )
)
_COMBINED: dict[str, Callable[[float, float], float]] = {
    "aten.add": lambda a, b: a + b,
    "aten.sub": lambda a, b: a - b,
    "aten.mul": lambda a, b: a * b,
    "aten.div": lambda a, b: a / b,
}


def bounds_of(node: Node, bounds: dict[str, Bounds]) -> Bounds | None:
    """Return the least and the largest value that `node` can have, from those of what it reads; None if they are not known."""
    if node.op in _KEPT_WITHIN:
        return _KEPT_WITHIN[node.op]
    if node.op in ("aten.clamp", "aten.hardtanh"):
        low, high = node.args[1:3] if len(node.args) > 2 else (node.kwargs.get("min"), node.kwargs.get("max"))
        if node.op == "aten.hardtanh" and low is None:
            return -1.0, 1.0
        return (float(low), float(high)) if _is_number(low) and _is_number(high) else None
    if node.op in _MOVED:
        read = [bounds.get(name) for name in node.refs]
        known = [each for each in read if each is not None]
        return (
            (min(low for low, _ in known), max(high for _, high in known))
            if known and len(known) == len(read)
            else None
        )
    if node.op in _COMBINED and len(node.args) == 2 and not node.kwargs:
        found = [bounds.get(arg.name) if isinstance(arg, Ref) else (arg, arg) for arg in node.args]
        if any(each is None or not all(map(_is_number, each)) for each in found):
            return None
        one, other = found
        if node.op == "aten.div" and (isinstance(node.args[1], Ref) or not node.args[1]):
            return None
        values = [_COMBINED[node.op](a, b) for a in one for b in other]  # type: ignore[union-attr]
        return min(values), max(values)
    if node.op == "aten.neg" and (one := bounds.get(node.refs[0])) is not None:
        return -one[1], -one[0]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


_WHOLE = "stream(model), which runs such a layer on the whole map after streaming what comes before it"


def deformed(*args: Any) -> Tensor:
    """Deformable convolution, as torchvision has it."""
    return torch.ops.torchvision.deform_conv2d(*args)  # type: ignore[no-any-return]


@rule(deformed, keeps_batch=True, is_layer=True)
def deformable_convolution(node: Node, maps: Maps) -> Placed:
    """See `deformed`: windows that are larger by how far offsets reach."""
    x, weight, offset, mask = (ref.name for ref in node.args[:4])
    stride, padding, dilation = node.args[5:7], node.args[7:9], node.args[9:11]
    bounds = maps.bounds.get(offset)
    if bounds is None:
        raise node.refuse(
            "reads at offsets that may be as large as the image",
            f"keep them within numbers that forward names (2 * offsets.tanh(), offsets.clamp(-4, 4)); or {_WHOLE}",
        )
    expected = {x, offset, mask} if node.args[13] else {x, offset}
    if set(sources(node, maps)) != expected or any(
        maps.axes[n] != (2, 3) or len(maps.shapes[n]) != 4 for n in expected
    ):
        raise node.refuse(
            "needs offsets and a mask that are maps (N, C, H, W), as its input is", "compute them from the image"
        )
    low, high = (1.01 * bound for bound in bounds)  # of numbers that bfloat16 rounds
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
    reads = [Read(x, rows, cols), *(maps.read(name) for name in sources(node, maps)[1:])]
    return Placed(tuple(reads), Axes(2, 3), run, exclusive=True, forward_bytes=columns, backward_bytes=columns)


@rule(aten.grid_sampler)
def grid_sample(node: Node, maps: Maps) -> Placed:
    """Sampling at positions of the whole map."""
    raise node.refuse(
        "reads at positions in the whole map, and how far each is from its own place is not known",
        f"resize by interpolate; bounded offsets stream as torchvision.ops.deform_conv2d; or {_WHOLE}",
    )
