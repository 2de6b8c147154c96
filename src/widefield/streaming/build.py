"""A captured module, taken apart into stages and plain operations.

Every value gets a level. What is computed from the image by local operations has level 0; what is computed from a reduction
over maps of level n is of level n + 1, and so are the maps that depend on it. Stage n computes the maps of level n.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from widefield.streaming.captured import Captured, Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.extents import identity
from widefield.streaming.fold import fold_batch_norms
from widefield.streaming.graph import Program, Stage
from widefield.streaming.rules import REWRITES, Axes, Maps, Placed, Read, Reduction, op_of, place, swap_refs, unflatten
from widefield.streaming.rules.channels import explicit
from widefield.streaming.rules.flat import seen_shape
from widefield.streaming.rules.norms import batch_norm_of_tensor, by_batch, statistics_of_batch, statistics_of_tensor
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.resize import MODES
from widefield.streaming.rules.rewriting import parts_of
from widefield.streaming.rules.shapes import groups, reshape
from widefield.streaming.stages import cut, is_view, size_of, weight_size

aten = torch.ops.aten

# Factories that take only dtype and device from their first argument.
_FACTORIES: dict[Any, Callable[..., torch.Tensor]] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}
# Operators that are others under the name of a reduction.
_NAMESAKES: dict[Any, Any] = {aten.max.other: aten.maximum.default, aten.min.other: aten.minimum.default}
_OF_BATCH = (statistics_of_batch, statistics_of_tensor)
# Operators that take only the shape from their second argument.
_SHAPED_LIKE: dict[str, Any] = {
    "aten.view_as": aten.reshape.default,
    "aten.reshape_as": aten.reshape.default,
    "aten.expand_as": aten.expand.default,
}


def build(captured: Captured, *, allow_whole: bool) -> Program:
    """Take `captured` apart. What cannot be streamed runs on whole maps if `allow_whole`, else raises `UnsupportedOpError`."""
    sorter = _Sorter(captured, allow_whole)
    for node in fold_batch_norms(captured):
        sorter.add(node)
    return sorter.program()


@dataclass
class _Sorter:
    """The nodes so far: those in `placed` are maps and reductions, the others are plain. `levels` of nodes and reductions' parts.

    `expanded` names what was expanded to give a value; `whole` are plain nodes that depend on a whole map.
    """

    captured: Captured
    allow_whole: bool
    maps: Maps = field(default_factory=Maps)
    levels: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    expanded: dict[str, str] = field(default_factory=dict)
    refused: list[UnsupportedOpError] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.maps.shapes.update({name: shape for name, (shape, _) in self.captured.shapes.items()})
        self.maps.axes[self.captured.image] = Axes(2, 3)
        self.maps.synchronised = self.captured.synchronised

    def add(self, node: Node) -> None:
        """Sort a captured node."""
        node = self._normal_form(node)
        if not any(name in self.maps for name in node.refs):
            self._add(node)
            return
        try:
            if node.dtype.is_complex:  # the gradients of complex maps would be lost, and no rule takes |x|^2 for x * x
                raise node.refuse(
                    f"makes a complex map ({node.dtype}), and only real ones are streamed",
                    "compute with the real and the imaginary part as two real maps; "
                    "or stream(model), which runs such a layer on the whole map after streaming what comes before it",
                )
            steps, flattened = unflatten(node, self.maps)
            rewrite = REWRITES.get(steps[-1].target)
            last = (rewrite and rewrite(steps[-1], self.maps)) or [steps[-1]]
            for step in (*steps[:-1], *last):
                self._add(step)
        except UnsupportedOpError as error:
            if not self.allow_whole:
                raise
            self.refused.append(error)
            self._add_plain(self._on_whole_maps(node))
        else:
            if flattened:
                self.maps.flat[node.name] = flattened

    def _normal_form(self, node: Node) -> Node:
        """Operators that only look at another tensor's shape or dtype, and broadcasting written out, in a form without it."""
        if node.target in _FACTORIES:
            given = {key: value for key, value in node.kwargs.items() if value is not None}
            kwargs = {"dtype": node.dtype, "device": torch.device("cpu"), **given}
            return replace(node, target=_FACTORIES[node.target], args=node.args[1:], kwargs=kwargs)
        if node.op == "aten.einsum":
            equation = explicit(node.args[0], [len(seen_shape(self.maps, operand.name)) for operand in node.args[1]])
            node = replace(node, args=(equation, *node.args[1:]))
        if node.target in _NAMESAKES:
            node = replace(node, target=_NAMESAKES[node.target])
        if node.op in _SHAPED_LIKE:
            node = replace(node, target=_SHAPED_LIKE[node.op], args=(node.args[0], list(node.shape)), kwargs={})
        source = next(iter(node.refs), "")
        small = source not in self.maps and self.maps.shapes.get(source, ())[-2:] == (1, 1)
        if node.op in MODES and small:  # one pixel, resized
            node = replace(node, target=aten.expand.default, args=(Ref(source), list(node.shape)), kwargs={})
        if node.op == "aten.slice_scatter" and self.maps.shapes[node.args[1].name] == node.shape:  # all of it
            node = replace(node, target=aten.to.dtype, args=(node.args[1], node.dtype), kwargs={})
        if node.op == "aten.expand" and source not in self.maps:
            self.expanded[node.name] = source
        if node.op in ("aten.clone", "aten.contiguous") and source in self.expanded:
            self.expanded[node.name] = self.expanded[source]
        if _rule(node) is reshape and source in self.expanded:
            self._reshape_broadcast(node, source)
        if _rule(node) is pointwise:
            shapes = {name: seen_shape(self.maps, name) for name in node.refs}
            for name in [name for name in shapes if name in self.expanded]:
                shapes[name] = seen_shape(self.maps, self.expanded[name])
                if torch.broadcast_shapes(*shapes.values()) == node.shape:
                    node = swap_refs(node, {name: self.expanded[name]})
                else:
                    shapes[name] = seen_shape(self.maps, name)
        return node

    def _reshape_broadcast(self, node: Node, source: str) -> None:
        """Reshape what was expanded before it is expanded: dimensions that stay as they are need not be written out."""
        base = self.maps.shapes[self.expanded[source]]
        full = self.maps.shapes[source]
        base = (1,) * (len(full) - len(base)) + tuple(base)
        before, after = list(full), list(node.shape)
        for group_in, group_out in groups(full, node.shape):
            if len(group_in) == len(group_out) == 1 and base[group_in[0]] == 1:
                before[group_in[0]] = after[group_out[0]] = 1
        partly = replace(node, name=f"{node.name}@part", target=aten.expand.default, kwargs={}, pick=None)
        self._add_plain(replace(partly, args=(Ref(self.expanded[source]), before), shape=tuple(before)))
        small = replace(partly, name=f"{node.name}@small", target=aten.reshape.default, shape=tuple(after))
        self._add_plain(replace(small, args=(Ref(partly.name), after)))
        self.expanded[node.name] = small.name

    def _add(self, node: Node) -> None:
        if isinstance(node.target, Reduction):
            self._add_reduction(node)
        elif any(name in self.maps for name in node.refs):
            found = place(node, self.maps)
            if 0 in (node.shape[found.axes.rows], node.shape[found.axes.cols]):
                raise node.refuse(
                    f"makes an empty map of shape {node.shape}",
                    "pass a larger image, or leave this output out where it is empty",
                )
            self.placed[node.name] = found
            self.maps.axes[node.name] = found.axes
            self._record(node, max(self._level(name) for name in node.refs))
        else:
            self._add_plain(node)

    def _add_plain(self, node: Node) -> None:
        if _rule(node) is reshape and node.target is not aten.view.dtype:  # a streamed map may have other strides
            node = replace(node, target=aten.reshape.default, args=(node.args[0], list(node.shape)), kwargs={})
        if by_batch(node) and node.pick in (None, 0):
            for step in batch_norm_of_tensor(node, node.module_path in self.captured.synchronised):
                self._add_plain(step)
            return
        if any(name in self.maps or name in self.whole for name in node.refs):
            self.whole.add(node.name)
        self._record(node, max((self._level(name) + (name in self.maps) for name in node.refs), default=0))

    def _add_reduction(self, node: Node) -> None:
        if node.name in self.nodes:
            return
        height, width = self.maps.extent(node.refs[0])
        reads = tuple(Read(name, identity(height), identity(width)) for name in node.refs)
        self.placed[node.name] = Placed(reads, Axes(0, 1), lambda tiles, work: tiles[0])
        level = max(self._level(name) for name in node.refs)
        self._record(replace(node, shape=(height, width)), level)
        for part, shape in zip(parts_of(node), node.kwargs["shapes"], strict=True):
            self.levels[part] = level + 1
            self.maps.shapes[part] = shape

    def _on_whole_maps(self, node: Node) -> Node:
        """`node` with flattened maps as the model sees them."""
        for name in self.maps.flat.keys() & set(node.refs):
            whole = f"{name}@whole"
            if whole not in self.nodes:
                shape = seen_shape(self.maps, name)
                made = replace(self.nodes[name], name=whole, target=aten.reshape.default, args=(Ref(name), list(shape)))
                self._add_plain(replace(made, kwargs={}, pick=None, shape=shape))
            node = swap_refs(node, {name: whole})
        return node

    def _record(self, node: Node, level: int) -> None:
        self.nodes[node.name] = node
        self.levels[node.name] = level
        self.maps.shapes[node.name] = node.shape

    def _level(self, name: str) -> int:
        return self.levels.get(name, 0)

    def program(self) -> Program:
        """All that the outputs need, as a list of stages and plain operations."""
        outputs = self._on_whole_maps(Node("", tuple, self.captured.outputs, {}, (), torch.float32))
        live = self._live(set(outputs.refs))
        plain = [node for node in live if node.name not in self.placed]
        maps = [node for node in live if node.name in self.placed]
        if all(is_view(node) for node in maps):
            first = self.refused[0] if self.refused else None
            raise UnsupportedOpError(
                first.module_path if first else "",
                first.op if first else "forward",
                "is the first operation on the image, so that nothing is left to stream",
                "run this model as it is, without streaming",
            )
        wanted = {name for node in (*plain, outputs) for name in node.refs if name in self.maps}
        dtypes = {name: dtype for name, (_, dtype) in self.captured.shapes.items()}
        dtypes |= {name: node.dtype for name, node in self.nodes.items()}
        stages = cut(self.captured, self.maps, self.levels, self.placed, maps, wanted, dtypes)
        items: list[Node | Stage] = []
        for level in range(max(self.levels.values()) + 1):
            items += [node for node in plain if self.levels[node.name] == level]
            items += [stages[level]] if level in stages else []
        used = {name for stage in stages.values() for name in stage.weights}
        streamed = sum(size_of(node) for node in maps if not isinstance(node.target, Reduction))
        of_image = [node for node in plain if self.levels[node.name] > 0]
        extents = {self.maps.extent(name) for name in self.maps.axes} - {(1, 1)}
        whole = sum(size_of(node) for node in of_image if self._is_whole(node, extents))
        return Program(
            replace(self.captured, outputs=outputs.args),
            tuple(items),
            dict(self.maps.broadcast),
            tuple((node.module_path, node.name) for node in live if node.target in _OF_BATCH),
            streamed / max(1, streamed + whole),
            sum(map(size_of, of_image)),
            sum(size_of(node) for node in plain if self.levels[node.name] == 0),
            sum(weight_size(name, self.maps, dtypes) for name in used),
            tuple(self.refused),
            any(op.draws for op in (op_of(node.target) for node in live) if op is not None),
        )

    def _is_whole(self, node: Node, extents: set[tuple[int, int]]) -> bool:
        """Whether a plain node depends on a whole map, or has one of these `extents` of what scans have reduced."""
        return node.name in self.whole or any(
            height * width in node.shape or (height, width) in itertools.pairwise(node.shape)
            for height, width in extents
        )

    def _live(self, needed: set[str]) -> list[Node]:
        """The nodes that `needed` depend on, in order."""
        live = []
        for node in reversed(self.nodes.values()):
            parts = parts_of(node) if isinstance(node.target, Reduction) else (node.name,)
            if not needed.isdisjoint(parts):
                needed.update(node.refs)
                live.append(node)
        return live[::-1]


def _rule(node: Node) -> Any:
    """The rule of a node's operator, None if there is none."""
    op = op_of(node.target)
    return op and op.place
