"""Sorted nodes, cut into stages: what each scan computes, what it leaves for later ones, what is computed twice instead."""

from collections.abc import Mapping, Sequence

import torch

from widefield.streaming.captured import Captured, Node
from widefield.streaming.extents import identity
from widefield.streaming.local import LocalCall
from widefield.streaming.program import Stage, Value
from widefield.streaming.rules import Maps, Placed, Reduction
from widefield.streaming.rules.rewriting import parts_of
from widefield.streaming.rules.rolled import straight, turn


def cut(
    captured: Captured,
    maps: Maps,
    levels: Mapping[str, int],
    placed: Mapping[str, Placed],
    nodes: Sequence[Node],
    wanted: set[str],
    dtypes: Mapping[str, torch.dtype],
) -> dict[int, Stage]:
    """The stages by level. `nodes` are the maps and reductions that are needed, `wanted` the maps that are needed whole."""
    by_name = {node.name: node for node in nodes}
    stored = _stored(maps, levels, placed, nodes)
    stages = {}
    for level in sorted({levels.get(name, 0) for name in (*by_name, *wanted)}):
        leaving = [
            name
            for name in (*captured.spatial_inputs, *by_name)
            if levels.get(name, 0) == level
            and (name in wanted or (name in stored and name not in captured.spatial_inputs))
        ]
        reductions = [n.name for n in nodes if levels[n.name] == level and isinstance(n.target, Reduction)]
        if not leaving and not reductions:
            continue
        needed, stack = {*leaving, *reductions}, [*leaving, *reductions]
        inputs: dict[str, None] = {}
        while stack:
            name = stack.pop()
            if name not in placed or (levels[name] < level and name in stored):
                inputs[name] = None
                continue
            for read in placed[name].reads:
                if read.source not in needed:
                    needed.add(read.source)
                    stack.append(read.source)
        order = [name for name in (*captured.spatial_inputs, *maps.broadcast, *by_name) if name in inputs]
        own = {name: placed[name] for name in by_name if name in needed and name not in inputs}
        stages[level] = _stage(maps, by_name, dtypes, order, own, leaving, frozenset(stored - wanted))
    return stages


def narrow_maps(maps: Maps, placed: Mapping[str, Placed], nodes: Sequence[Node]) -> list[str]:
    """Return the maps through which everything goes, those that are no larger than any such map before.

    Of a map and what follows from it by one cheap operation, the latter counts.
    """
    last_read = {read.source: k for k, node in enumerate(nodes) for read in placed[node.name].reads}
    found: list[Node] = []
    alive: set[str] = set()
    for k, node in enumerate(nodes):
        alive = {name for name in (*alive, node.name) if last_read.get(name, k) > k}
        usable = not is_view(node) and node.dtype.is_floating_point and node.name not in maps.begin
        if alive != {node.name} or not usable or (found and size_of(node) > size_of(found[-1])):
            continue
        if found and placed[node.name].op.cheap and {x.source for x in placed[node.name].reads} == {found[-1].name}:
            found.pop()
        found.append(node)
    return [node.name for node in found]


def _stored(maps: Maps, levels: Mapping[str, int], placed: Mapping[str, Placed], nodes: Sequence[Node]) -> set[str]:
    """The maps that are kept for later stages.

    A map that follows by cheap operations from a single map which is kept is computed again where it is needed.
    """
    crossing = {
        read.source
        for node in nodes
        for read in placed[node.name].reads
        if levels.get(read.source, 0) < levels[node.name]
    }
    by_name = {node.name: node for node in nodes}
    stored: set[str] = set()
    for node in nodes:
        if node.name in crossing and not _follows(node.name, maps, placed, by_name, stored):
            stored.add(node.name)
    return stored


def _follows(
    name: str, maps: Maps, placed: Mapping[str, Placed], by_name: Mapping[str, Node], stored: set[str]
) -> bool:
    """True if cheap operations lead from a map in `stored` to map `name`."""
    while name in placed and len({read.source for read in placed[name].reads}) == 1:
        read = placed[name].reads[0]
        height, width = maps.extent(read.source)
        if (read.rows, read.cols) != (identity(height), identity(width)) or not placed[name].op.cheap:
            return False
        name = read.source
        if name in stored:
            return True
    return False


def _stage(
    maps: Maps,
    by_name: Mapping[str, Node],
    dtypes: Mapping[str, torch.dtype],
    inputs: Sequence[str],
    placed: dict[str, Placed],
    leaving: Sequence[str],
    stored: frozenset[str],
) -> Stage:
    rectified = _merge_rectifiers(placed, by_name, set(leaving))
    order = [*inputs, *placed]
    index = {name: v for v, name in enumerate(order)}
    values = []
    for name in inputs:
        key = maps.broadcast.get(name, name)
        values.append(Value(name, maps.shapes[name], dtypes[key], maps.axes[name]))
    for name, rule in placed.items():
        node = by_name[rectified.get(name, name)]
        reduction = node.target if isinstance(node.target, Reduction) else None
        weights = _weights(node, rule, maps)
        sizes = [weight_size(name, maps, dtypes) for name in weights]
        values.append(
            Value(
                name=name,
                shape=node.shape,
                dtype=node.dtype,
                axes=rule.axes,
                placed=rule,
                sources=tuple(index[read.source] for read in rule.reads),
                weights=weights,
                module_path=node.module_path,
                op=node.op,
                view=is_view(node),
                rectified=name in rectified,
                reduction=reduction,
                parts=parts_of(node) if reduction else (),
                # Of a whole module, one gradient is computed at a time.
                weight_bytes=max(sizes) if isinstance(node.target, LocalCall) and sizes else sum(sizes),
                begin=maps.begin.get(name, (0, 0)),
            )
        )
    return Stage(
        values=tuple(values),
        inputs=tuple(range(len(inputs))),
        outputs=tuple(index[name] for name in leaving),
        reductions=tuple(v for v, value in enumerate(values) if value.reduction is not None),
        operands=tuple(dict.fromkeys(weight for value in values for weight in value.weights)),
        stored=frozenset(index[name] for name in leaving if name in stored),
    )


def _merge_rectifiers(placed: dict[str, Placed], by_name: Mapping[str, Node], leaving: set[str]) -> dict[str, str]:
    """Merge each ReLU into the op before it, if nobody else reads that op's result. Returns the merged op of each such ReLU.

    The sum before the ReLU then never has to be kept: the ReLU is applied as the result is written to its buffer.
    """
    readers: dict[str, int] = {}
    for rule in placed.values():
        for read in rule.reads:
            readers[read.source] = readers.get(read.source, 0) + 1
    merged: dict[str, str] = {}
    for name in list(placed):
        if by_name[name].target is not torch.ops.aten.relu.default:
            continue
        source = placed[name].reads[0].source
        if source in placed and source not in leaving and readers[source] == 1 and placed[source].op.carries_relu:
            placed[name] = placed.pop(source)
            merged[name] = merged.pop(source, source)  # several in a row are one
    return merged


def _weights(node: Node, rule: Placed, maps: Maps) -> tuple[str, ...]:
    """Return what a node reads that is neither a map nor, broadcast to the image's size, read as one."""
    broadcast = {maps.broadcast[read.source] for read in rule.reads if read.source in maps.broadcast}
    return tuple(ref for ref in node.refs if ref not in maps and ref not in broadcast)


def size_of(node: Node) -> int:
    """Bytes of a node's result, none for views."""
    return 0 if is_view(node) else torch.Size(node.shape).numel() * node.dtype.itemsize


def weight_size(name: str, maps: Maps, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of what a stage uses as a weight; parts of reductions, whose dtype is not known here, are taken for float32."""
    return torch.Size(maps.shapes[name]).numel() * dtypes.get(name, torch.float32).itemsize


def is_view(node: Node) -> bool:
    """True if a node's result shares the memory of what it reads."""
    if node.target in (turn, straight):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.op == "aten.reshape")
