"""The stages of a program: of each scan, its values in order, what it reads, and what it leaves for later ones."""

from collections.abc import Collection, Mapping

import torch

from widefield.streaming.captured import Node
from widefield.streaming.kept import Scan, Scans, is_view
from widefield.streaming.local import LocalCall
from widefield.streaming.program import Stage, Value
from widefield.streaming.rules import Maps, Placed, Reduction
from widefield.streaming.rules.rewriting import parts_of


def make_stages(
    scans: Scans, kept: Collection[str], dtypes: Mapping[str, torch.dtype], computed: Mapping[str, torch.dtype]
) -> dict[int, Stage]:
    """The stages by level, if the maps `kept` live between them; `computed` are dtypes under autocast."""
    return {level: _stage(scans, scan, dtypes, computed) for level, scan in scans.all(kept).items()}


def _stage(scans: Scans, scan: Scan, dtypes: Mapping[str, torch.dtype], computed: Mapping[str, torch.dtype]) -> Stage:
    maps, by_name = scans.maps, {node.name: node for node in scans.nodes}
    inputs = [name for name in (*scans.given, *maps.broadcast, *by_name) if name in scan.read]
    placed = {name: scans.placed[name] for name in by_name if name in scan.computed}
    rectified = _merge_rectifiers(placed, by_name, set(scan.leaving))
    order = [*inputs, *placed]
    index = {name: v for v, name in enumerate(order)}
    values = []
    for name in inputs:
        key = maps.broadcast.get(name, name)
        values.append(
            Value(
                name,
                maps.shapes[name],
                dtypes[key],
                maps.axes[name],
                itemsize=computed.get(key, dtypes[key]).itemsize,
                begin=maps.begin.get(name, (0, 0)),
            )
        )
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
                itemsize=computed.get(name, node.dtype).itemsize,
                axes=rule.axes,
                placed=rule,
                sources=tuple(index[read.source] for read in rule.reads),
                weights=weights,
                module_path=node.module_path,
                target=node.target,
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
        outputs=tuple(index[name] for name in scan.leaving),
        reductions=tuple(v for v, value in enumerate(values) if value.reduction is not None),
        operands=tuple(dict.fromkeys(weight for value in values for weight in value.weights)),
        stored=frozenset(index[name] for name in scan.leaving if name not in scans.wanted),
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


def weight_size(name: str, maps: Maps, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of what a stage uses as a weight; parts of reductions, whose dtype is not known here, are taken for float32."""
    return torch.Size(maps.shapes[name]).numel() * dtypes.get(name, torch.float32).itemsize
