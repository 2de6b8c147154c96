"""A captured module, taken apart: what does not depend on the image, what is streamed, what runs whole afterwards.

    weights   parameters, and all that is computed from them alone: once per forward pass, by ordinary autograd
    stage     maps: computed tile by tile, by the scan
    tail      everything that needs a whole map (a classifier after global pooling): once, by ordinary autograd

`build` does this for one image size; the result holds no tensors, so it can be kept and used for every image of that size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from widefield.streaming.capture import Captured, Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.fold import fold_batch_norms
from widefield.streaming.rules import Axes, Maps, Placed, place
from widefield.streaming.schedule import Flow

aten = torch.ops.aten

# Factories that take only dtype and device from their first argument.
_FACTORIES: dict[Any, Callable[..., torch.Tensor]] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}


@dataclass(frozen=True)
class Value:
    """A map of a stage: its whole `shape` and dtype, where height and width stand, and how it is computed (`view`: not at all;
    `rectified`: with a ReLU behind the op).

    `placed` is None for a stage input. `sources` are the indices of the maps that it reads, in the order of `placed.reads`.
    `weights` names the weights that it uses.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: Axes
    placed: Placed | None = None
    sources: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    module_path: str = ""
    op: str = ""
    view: bool = False
    rectified: bool = False

    @cached_property
    def pixel_bytes(self) -> int:
        """Bytes of one position of the map, over all other dimensions."""
        height, width = self.shape[self.axes.rows], self.shape[self.axes.cols]
        return torch.Size(self.shape).numel() // (height * width) * self.dtype.itemsize

    def flow(self, axis: int) -> Flow:
        """The value along rows (axis 0) or columns (axis 1)."""
        maps = () if self.placed is None else tuple(read.cols if axis else read.rows for read in self.placed.reads)
        return Flow(self.shape[self.axes[axis]], self.sources, maps)


@dataclass(frozen=True)
class Stage:
    """What one scan executes: maps and weights in, maps and their sums over space out.

    `values` are in topological order, stage inputs first; `inputs`, `outputs` and `sums` are indices into them. The first
    input is the image, others are weights as large as the image. `weights` names the other tensors used; `random` says
    whether masks are drawn.
    """

    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    sums: tuple[int, ...]
    weights: tuple[str, ...]
    random: bool


@dataclass(frozen=True)
class Program:
    """See the module's page. `prologue` computes weights; `spread` names each further stage input's weight and whole shape."""

    captured: Captured
    prologue: tuple[Node, ...]
    stage: Stage
    spread: dict[str, tuple[str, tuple[int, ...]]]
    tail: tuple[Node, ...]
    streamed_fraction: float
    refused: tuple[UnsupportedOpError, ...]

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what leaves the stage: maps, then sums."""
        names = [value.name for value in self.stage.values]
        return (*(names[v] for v in self.stage.outputs), *(names[v] + SUM for v in self.stage.sums))


def build(captured: Captured, *, allow_tail: bool) -> Program:
    """Take `captured` apart. What cannot be streamed goes to the tail if `allow_tail`, else raises `UnsupportedOpError`."""
    nodes = fold_batch_norms(captured)
    maps = Maps(shapes={name: shape for name, (shape, _) in captured.shapes.items()})
    maps.axes[captured.image] = Axes(2, 3)
    prologue: list[Node] = []
    tail: list[Node] = []
    late: set[str] = set()
    refused: list[UnsupportedOpError] = []
    placed: dict[str, Placed] = {}
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        maps.shapes[node.name] = node.shape
        if node.target in _FACTORIES:
            node = _independent(node)
        names = set(node.refs)
        if not any(name in maps or name in late for name in names):
            prologue.append(node)
        elif names & late:
            late.add(node.name)
            tail.append(node)
        else:
            try:
                placed[node.name] = found = place(node, maps)
                maps.axes[node.name] = found.axes
            except UnsupportedOpError as error:
                if not allow_tail:
                    raise
                late.add(node.name)
                pooled = global_mean(node, maps)
                tail.append(pooled or node)
                if pooled is None:
                    refused.append(error)
    outputs = [leaf.name for leaf in captured.outputs if isinstance(leaf, Ref)]
    read = [name for node in tail for name in node.refs]
    needed = dict.fromkeys(name for name in (*read, *outputs) if name in maps)
    summed = dict.fromkeys(name.removesuffix(SUM) for name in read if name.endswith(SUM))
    if not (needed.keys() | summed.keys()) - {captured.image}:
        first = tail[0] if tail else None
        raise UnsupportedOpError(
            first.module_path if first else "",
            first.op if first else "forward",
            "is the first operation on the image, so that nothing is left to stream",
            "run this model as it is, without streaming",
        )
    stage = _stage(captured, maps, placed, by_name, list(needed), list(summed))
    streamed = sum(_bytes(node) for node in nodes if node.name in placed)
    whole = sum(_bytes(node) for node in tail)
    tail_used = _used(tail, set(outputs))
    spread = {name: maps.spread[name] for name in (stage.values[v].name for v in stage.inputs[1:])}
    roots = {
        *stage.weights,
        *outputs,
        *(weight for weight, _ in spread.values()),
        *(ref for node in tail_used for ref in node.refs),
    }
    fraction = streamed / max(1, streamed + whole)
    return Program(captured, _used(prologue, roots), stage, spread, tail_used, fraction, tuple(refused))


def _stage(
    captured: Captured,
    maps: Maps,
    placed: dict[str, Placed],
    by_name: dict[str, Node],
    outputs: Sequence[str],
    summed: Sequence[str],
) -> Stage:
    """The stage that computes `outputs` and the sums of `summed`, without what nobody needs."""
    needed, stack = {*outputs, *summed}, [*outputs, *summed]
    while stack:
        for read in placed[name].reads if (name := stack.pop()) in placed else ():
            if read.source not in needed:
                needed.add(read.source)
                stack.append(read.source)
    placed = {name: rule for name, rule in placed.items() if name in needed}
    rectified = _merge_rectifiers(placed, by_name, {*outputs, *summed})
    inputs = [captured.image, *(name for name in maps.spread if name in needed)]
    order = [*inputs, *placed]
    index = {name: v for v, name in enumerate(order)}
    values = []
    for name in inputs:
        key = maps.spread[name][0] if name in maps.spread else name
        dtype = captured.shapes[key][1] if key in captured.shapes else by_name[key].dtype
        values.append(Value(name, maps.shapes[name], dtype, maps.axes[name]))
    for name, rule in placed.items():
        node = by_name[rectified.get(name, name)]
        sources = tuple(index[read.source] for read in rule.reads)
        values.append(
            Value(
                *(name, node.shape, node.dtype, maps.axes[name], rule, sources, _weights(node, rule, maps)),
                *(node.module_path, node.op, _is_view(node), name in rectified),
            )
        )
    weights = tuple(dict.fromkeys(weight for value in values for weight in value.weights))
    random = any("dropout" in value.op or "bernoulli" in value.op for value in values)
    maps_out, sums_out = (tuple(index[name] for name in names) for names in (outputs, summed))
    return Stage(tuple(values), tuple(range(len(inputs))), maps_out, sums_out, weights, random)


# Operators whose result is a tensor of its own that their derivative does not need.
_RECTIFIABLE = {
    "aten.conv2d",
    "aten.conv_transpose2d",
    "aten.add",
    "aten.batch_norm",
    "aten._native_batch_norm_legit_no_training",
}


def _merge_rectifiers(placed: dict[str, Placed], by_name: dict[str, Node], outputs: set[str]) -> dict[str, str]:
    """Merge each ReLU into the op before it, if nobody else reads that op's result. Returns the merged op of each such ReLU.

    The sum before the ReLU then never has to be kept: the ReLU is applied as the result is written to its buffer.
    """
    readers: dict[str, int] = {}
    for rule in placed.values():
        for read in rule.reads:
            readers[read.source] = readers.get(read.source, 0) + 1
    merged: dict[str, str] = {}
    for name in list(placed):
        if by_name[name].op != "aten.relu":
            continue
        source = placed[name].reads[0].source
        if source in placed and source not in outputs and readers[source] == 1 and by_name[source].op in _RECTIFIABLE:
            placed[name] = placed.pop(source)
            merged[name] = source
    return merged


def _weights(node: Node, rule: Placed, maps: Maps) -> tuple[str, ...]:
    """What a node reads that is neither a map nor, spread out to the image's size, read as one."""
    spread = {maps.spread[read.source][0] for read in rule.reads if read.source in maps.spread}
    return tuple(ref for ref in node.refs if ref not in maps and ref not in spread)


def _used(nodes: Sequence[Node], roots: set[str]) -> tuple[Node, ...]:
    """The nodes that `roots` depend on, in order."""
    needed, kept = set(roots), []
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.refs)
            kept.append(node)
    return tuple(reversed(kept))


SUM = "@sum"  # the name of a map with this behind it is that of its sum over height and width


def global_mean(node: Node, maps: Maps) -> Node | None:
    """A global average pooling as a function of its map's sum, which the scan adds up tile by tile; None for other nodes."""
    name = next(node.refs)
    if name not in maps or maps.axes[name].rows > maps.axes[name].cols:
        return None
    axes, ndim = maps.axes[name], len(maps.shapes[name])
    if node.op == "aten.mean":
        over = node.args[1] if len(node.args) > 1 else None
        fits = over is not None and {d % ndim for d in over} == set(axes) and "dtype" not in node.kwargs
    else:
        fits = node.op == "aten.adaptive_avg_pool2d" and list(node.args[1]) == [1, 1] and axes == (2, 3)
    height, width = maps.extent(name)
    args = (Ref(name + SUM), height * width, node.shape, node.dtype)
    return replace(node, target=divide, args=args, kwargs={}) if fits else None


def divide(total: torch.Tensor, count: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`total / count` in another shape of as many elements."""
    return (total / count).reshape(tuple(shape)).to(dtype)


def _independent(node: Node) -> Node:
    """`x.new_zeros(size)` and the like as a factory that does not read `x`."""
    kwargs = {
        "dtype": node.dtype,
        "device": torch.device("cpu"),
        **{k: v for k, v in node.kwargs.items() if v is not None},
    }
    return Node(
        node.name,
        _FACTORIES[node.target],
        node.args[1:],
        kwargs,
        node.shape,
        node.dtype,
        None,
        node.module_path,
        node.source,
    )


def _bytes(node: Node) -> int:
    """Size of a node's result, nothing for views."""
    return 0 if _is_view(node) else torch.Size(node.shape).numel() * node.dtype.itemsize


def _is_view(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def fill(structure: Any, values: dict[str, Any]) -> Any:
    """`structure` with every `Ref` replaced by its value."""
    return pytree.tree_map(lambda leaf: values[leaf.name] if isinstance(leaf, Ref) else leaf, structure)
