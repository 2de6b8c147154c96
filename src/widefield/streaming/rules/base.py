"""Rules: each says how one operation is placed in a scan.

A rule looks at a captured `Node` whose inputs are maps (tensors with a height and a width) and weights (tensors that do not
depend on the image), and returns a `Placed`: what the op reads along each axis, where height and width stand in its result,
and how it runs on a tile. A rule that cannot do so exactly raises `node.refuse(reason, remedy)`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CAPTURE_DEVICE, Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.extents import AxisMap, Span, identity

if TYPE_CHECKING:
    from widefield.streaming.rules.ranges import Range, RangeOf


class Axes(NamedTuple):
    """The dimensions of a tensor that are its height and its width."""

    rows: int
    cols: int


class TileContext(NamedTuple):
    """One run of an op: what it computes and reads along both axes (one span per map read), and what it may use.

    `masks` tell foreground (True) from background in each tile read, of an op that looks at it (`Op.masked`) and an image that has
    a mask. They broadcast to the tiles.
    """

    rows: tuple[Span, ...]
    cols: tuple[Span, ...]
    weights: Mapping[str, Tensor]
    seed: int
    masks: tuple[Tensor, ...] | None = None


Run = Callable[[Sequence[Tensor], TileContext], Tensor]


@dataclass(frozen=True, slots=True)
class Read:
    """A map that an op reads, and how."""

    source: str
    rows: AxisMap
    cols: AxisMap


Saved = Literal["inputs", "result", "indices", "mask"]


@dataclass(frozen=True, slots=True)
class Op:
    """Facts about an operation that hold whatever its arguments are; planner, stages and layers ask for them.

    Args:
        rule: the rule; None where there is none.
        rewrite: how it becomes reductions and local operations where it is one over the whole image.
        flat: how it looks on maps with height and width apart, where the model has flattened them (see `rules.flat`).
        flattens: what it is before its result is flattened, of an operation that does both (`F.unfold`).
        range_of: what is known of the numbers of its result (see `rules.ranges`).
        exact: its result is not rounded, so that `range_of` needs no room for that.
        is_view: its result shares the memory of what it reads, even where PyTorch does not say so.
        saves: what autograd keeps for the derivative: the maps that the operation reads, its result, the position of each maximum
            (8 bytes per element), a mask like the result.
        cheap: computing it again costs less than storing its result.
        carries_relu: its result is a tensor of its own that its derivative does not need, so that a ReLU after it may be applied as
            the result is written to its buffer.
        sends_same: the gradients of what it reads are the gradient of its result, and take no memory of their own.
        stops_gradients: its result does not require grad, whatever it reads.
        draws: it takes random numbers.
        masked: it gives something else where an image has a mask.
        keeps_batch: image n of a batch stays in place n of the first dimension, if that has the same size before and after.
        repeats: it holds positions of a map a second time.
        is_layer: it is a layer of the network to its users even where it looks at one position only.
        waits: it computes several rows of its result in a step, or none, if it is strided: one row alone would be slow.
        on_tokens: tokens are made by it or go through it: where attention begins.
    """

    rule: "Rule | None" = None
    rewrite: "Rewrite | None" = None
    flat: "Flat | None" = None
    flattens: "Callable[[Node, Maps], Node] | None" = None
    range_of: "RangeOf | None" = None
    exact: bool = False
    is_view: bool = False
    saves: frozenset[Saved] = frozenset(("inputs",))
    cheap: bool = False
    carries_relu: bool = False
    sends_same: bool = False
    stops_gradients: bool = False
    draws: bool = False
    masked: bool = False
    keeps_batch: bool = False
    repeats: bool = False
    is_layer: bool = False
    waits: bool = True
    on_tokens: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """An op in a scan: the maps that it reads, in order, where height and width stand in its result, and how it runs on a tile.

    `exclusive`: the derivative of the op allocates the gradient of what it reads (a convolution does), so that nobody else holds
    that tensor and the gradients of other readers may be added into it. An op that passes its gradient on (`add`) is not.
    `saved_bytes`, `forward_bytes` and `backward_bytes` are what an op needs of its own for each position of its result: what
    autograd keeps, and what is there while it runs.
    """

    reads: tuple[Read, ...]
    axes: Axes
    run: Run
    exclusive: bool = False
    op: Op = Op()
    saved_bytes: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0


class Flattened(NamedTuple):
    """The number of dimensions of a map that the model sees as one, and how many of them stand behind the width."""

    width: int
    behind: int = 0


class PooledFrom(NamedTuple):
    """For a map of positions in another one: that one's height and width, and the windows in which they lie."""

    extent: tuple[int, int]
    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass
class Maps:
    """The maps placed so far: where their height and width stand. `shapes` holds the whole size of every value, weights too.

    `broadcast` collects weights that are as large as the image (position grids): they enter the scan as maps of their own. `flat`
    names maps that the model has flattened (see `rules.flat`), and counts the dimensions of `shapes` that the model sees as one: 2
    for height and width, 3 where the batch is flattened with them. `begin` holds the row and column of a rolled map at which
    its scan begins (see `rules.rolled`), `flipped` the axes of a map that the model sees the other way round (see `rules.flipped`),
    `ranges` what is known of the numbers that a map or another value holds
    (see `rules.ranges`). `positions` are maps that hold positions in others, as max pooling returns them.
    `synchronised` are the paths of batch norm layers whose statistics are those of all processes.
    """

    axes: dict[str, Axes] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    broadcast: dict[str, str] = field(default_factory=dict)
    flat: dict[str, Flattened] = field(default_factory=dict)
    begin: dict[str, tuple[int, int]] = field(default_factory=dict)
    flipped: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    ranges: "dict[str, Range]" = field(default_factory=dict)
    positions: dict[str, PooledFrom] = field(default_factory=dict)
    synchronised: frozenset[str] = frozenset()

    def __contains__(self, name: object) -> bool:
        return name in self.axes

    def extent(self, name: str) -> tuple[int, int]:
        """Height and width of a map."""
        axes, shape = self.axes[name], self.shapes[name]
        return shape[axes.rows], shape[axes.cols]

    def read(self, name: str) -> Read:
        """Reading a map position by position."""
        height, width = self.extent(name)
        return Read(name, identity(height), identity(width))

    def broadcast_weight(self, name: str, axes: Axes, shape: tuple[int, ...]) -> str:
        """The name of the map that weight `name` becomes when broadcast to `shape`."""
        broadcast = f"{name}@{'x'.join(map(str, shape))}@{axes.rows},{axes.cols}"
        self.broadcast[broadcast] = name
        self.axes[broadcast], self.shapes[broadcast] = axes, shape
        return broadcast


Rule = Callable[[Node, Maps], Placed]
# The nodes to put in the place of one, the last of which has its name; None where the operation is local.
Rewrite = Callable[[Node, Maps], list[Node] | None]
# Likewise for a node that reads flattened maps, by name, and how many dimensions of the result the model sees as one.
Flat = Callable[[Node, Maps, list[str]], tuple[list[Node], Flattened | None]]
OPS: dict[Any, Op] = {}


def declare(*targets: Any, **facts: Any) -> None:
    """Note facts of `Op` about ATen operators: all overloads of a packet, or single overloads."""
    for target in targets:
        packet = isinstance(target, torch._ops.OpOverloadPacket)
        for overload in (getattr(target, name) for name in target.overloads()) if packet else (target,):
            OPS[overload] = replace(op_of(overload) or Op(), **facts)


def rule(*targets: Any, saves: Iterable[Saved] = ("inputs",), **facts: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators, with the facts of `Op` about them.

    A rule for operators of which different facts hold is decorated once for each kind.
    """

    def register(function: Rule) -> Rule:
        declare(*targets, rule=function, saves=frozenset(saves), **facts)
        return function

    return register


def rewrite(*targets: Any, **facts: Any) -> Callable[[Rewrite], Rewrite]:
    """Register how ATen operators are rewritten, with the facts of `Op` about them."""

    def register(function: Rewrite) -> Rewrite:
        declare(*targets, rewrite=function, **facts)
        return function

    return register


def op_of(target: Any) -> Op | None:
    """Return what is known of an operator; of those that PyTorch tags as pointwise, it is known without being registered."""
    tags = getattr(target, "tags", ())
    elementwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return OPS.get(target) or OPS.get(type(target)) or (OPS.get(torch.ops.aten.where.self) if elementwise else None)


def apply_rule(node: Node, maps: Maps) -> Placed:
    """Apply the rule of `node`'s operator. Raises `UnsupportedOpError` where there is none."""
    op = op_of(node.target)
    if op is None or op.rule is None:
        raise node.refuse(
            "has no streaming rule", f"end the streamed module before this layer, or replace it; or {STREAM}"
        )
    placed = replace(op.rule(node, maps), op=op)
    planned = node.shape[placed.axes.rows], node.shape[placed.axes.cols]
    if any((read.rows.n_out, read.cols.n_out) != planned for read in placed.reads):
        raise node.refuse(
            f"makes a map of height and width {planned} of one of {[maps.extent(read.source) for read in placed.reads]}",
            "bring all operands to the same height and width first",
        )
    return placed


def sources(node: Node, maps: Maps) -> list[str]:
    """The maps among a node's arguments, in order, repeated where an argument is."""
    return [name for name in node.refs if name in maps]


def only_map(node: Node, maps: Maps) -> str:
    """The one map that a node reads, which must be its first argument."""
    names = sources(node, maps)
    first = node.args[0] if node.args else None
    if len(names) != 1 or not isinstance(first, Ref) or first.name != names[0]:
        raise node.refuse(
            "takes weights or scales that depend on the image",
            "compute them from parameters, or keep this layer out of the trunk",
        )
    return names[0]


def swap_refs(node: Node, names: Mapping[str, str]) -> Node:
    """`node` with references to other values, by old and new name."""
    if not any(name in names for name in node.refs):
        return node

    def swap(value: Any) -> Any:
        return Ref(names.get(value.name, value.name)) if isinstance(value, Ref) else value

    args, kwargs = pytree.tree_map(swap, (node.args, node.kwargs), is_leaf=lambda value: isinstance(value, Ref))
    return replace(node, args=args, kwargs=kwargs)


STREAM = "stream(model), which runs such a layer on the whole map after streaming what comes before it"


def refuse_whole(
    node: Node, what: str, of: str = "the whole height or width of the image, which no tile holds"
) -> UnsupportedOpError:
    """For operations over the whole height or width, or what else no tile holds."""
    return node.refuse(f"{what} {of}", f"end the streamed module here; or {STREAM}")


def dims(node: Node, value: Any, ndim: int) -> tuple[int, ...]:
    """Dimension arguments as non-negative numbers; None or empty means all."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return tuple(range(ndim))
    return tuple(d % ndim for d in (value if isinstance(value, (list, tuple)) else [value]))


def groups(shape_in: Sequence[int], shape_out: Sequence[int]) -> list[tuple[range, range]]:
    """The finest cut of both shapes into runs of dimensions with equal products."""
    groups, i, j = [], 0, 0
    while i < len(shape_in) or j < len(shape_out):
        i1, j1 = min(i + 1, len(shape_in)), min(j + 1, len(shape_out))
        while prod(shape_in[i:i1]) != prod(shape_out[j:j1]):
            if prod(shape_in[i:i1]) < prod(shape_out[j:j1]):
                i1 += 1
            else:
                j1 += 1
        groups.append((range(i, i1), range(j, j1)))
        i, j = i1, j1
    return groups


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# How an argument of a call is filled in: a plain value, the k-th tile, a weight, or a list of these.
_Slot = Callable[[Sequence[Tensor], Mapping[str, Tensor]], Any]


def caller(node: Node, maps: Maps) -> Callable[[Sequence[Tensor], Mapping[str, Tensor]], Any]:
    """A function of (tiles, weights) that calls the node's operator with them in place of its references.

    Tiles are taken in the order of `sources(node, maps)`. A device argument becomes the tiles' device: the captured one is
    only the capture's.
    """
    count = 0

    def slot(value: Any) -> _Slot:
        nonlocal count
        if isinstance(value, Ref):
            name = value.name
            if name not in maps:
                return lambda tiles, weights: weights[name]
            k = count
            count += 1
            return lambda tiles, weights: tiles[k]
        if isinstance(value, (list, tuple)) and any(isinstance(item, Ref) for item in value):
            items = [slot(item) for item in value]
            return lambda tiles, weights: [item(tiles, weights) for item in items]
        if isinstance(value, torch.device) and value == CAPTURE_DEVICE:
            return lambda tiles, weights: tiles[0].device
        return lambda tiles, weights: value

    args = [slot(value) for value in node.args]
    kwargs = {key: slot(value) for key, value in node.kwargs.items()}
    target, pick = node.target, node.pick

    def call(tiles: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Any:
        result = target(*[a(tiles, weights) for a in args], **{key: a(tiles, weights) for key, a in kwargs.items()})
        return result if pick is None else result[pick]

    return call


def called(node: Node, maps: Maps, axes: Axes) -> Placed:
    """Place an operation whose operator runs on tiles as it does on whole maps: each position by itself."""
    call = caller(node, maps)
    reads = tuple(maps.read(name) for name in sources(node, maps))
    return Placed(reads, axes, lambda tiles, context: call(tiles, context.weights))
