"""Each operation in its place: a map that is computed tile by tile, a reduction of maps, or a plain operation."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.captured import Captured, Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.rules import (
    Axes,
    Maps,
    Placed,
    Reduction,
    TileContext,
    apply_rule,
    op_of,
    swap_refs,
    unflatten,
)
from widefield.streaming.rules.base import STREAM, groups
from widefield.streaming.rules.channels import attention_inside
from widefield.streaming.rules.flat import seen_shape
from widefield.streaming.rules.flipped import mirror, turned_round
from widefield.streaming.rules.norms import batch_norm_of_tensor, by_batch
from widefield.streaming.rules.pointwise import pointwise
from widefield.streaming.rules.ranges import constant, range_of
from widefield.streaming.rules.resize import interpolate
from widefield.streaming.rules.rewriting import parts_of
from widefield.streaming.rules.rolled import around, straight, turn
from widefield.streaming.rules.shapes import reshape

aten = torch.ops.aten


@dataclass
class Placing:
    """The nodes so far: those in `placed` are maps and reductions, the others are plain.

    `expanded` names what was expanded to give a value; `whole` are plain nodes that depend on a whole map. With `weights_as_maps`,
    weights as large as a map are maps from where they are cut in windows on: `read_as_maps` are their names. `computed` are dtypes
    under autocast, as coarse as which a range is.
    """

    captured: Captured
    allow_whole: bool
    computed: Mapping[str, torch.dtype] = field(default_factory=dict)
    weights_as_maps: bool = True
    read_as_maps: set[str] = field(default_factory=set)
    maps: Maps = field(default_factory=Maps)
    nodes: dict[str, Node] = field(default_factory=dict)
    placed: dict[str, Placed] = field(default_factory=dict)
    expanded: dict[str, str] = field(default_factory=dict)
    refused: list[UnsupportedOpError] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.maps.shapes.update({name: shape for name, (shape, _) in self.captured.shapes.items()})
        for name in self.captured.spatial_inputs:
            ndim = len(self.maps.shapes[name])
            self.maps.axes[name] = Axes(ndim - 2, ndim - 1)
        self.maps.synchronised = self.captured.synchronised
        known = {name: constant(value) for name, value in self.captured.constants.items()}
        self.maps.ranges.update({name: found for name, found in known.items() if found is not None})

    def add(self, node: Node) -> None:
        """Place a captured node; what cannot be streamed runs on whole maps, or raises UnsupportedOpError if none may."""
        node = self._note_expansion(node)
        if self.weights_as_maps and _rule(node) is reshape:
            node = self._cut_in_windows(node)
        if _rule(node) is pointwise:
            node = self._read_unexpanded(node)
        if not any(name in self.maps for name in node.refs):
            self._add(node)
            return
        if node.target is aten.scaled_dot_product_attention.default:
            steps = attention_inside(node, self.maps, self._dtype)
            if steps is not None:
                for each in steps:
                    self.add(each)
                return
        try:
            steps, flattened = unflatten(node, self.maps)
            *before, last = steps
            op = op_of(last.target)
            rewritten = op.rewrite(last, self.maps) if op is not None and op.rewrite is not None else None
            parts = (*before, *(rewritten or [last]))
            if any(isinstance(each.target, Reduction) for each in parts) and self._is_complex(node):
                raise node.refuse(  # no reduction takes |x|^2 for x * x
                    "reduces a complex map over positions",
                    f"reduce its real and its imaginary part, or its absolute value; or {STREAM}",
                )
            for each in parts:
                self._add(each)
        except UnsupportedOpError as error:
            if not self.allow_whole:
                raise
            self.refused.append(error)
            self._add_plain(self.unflattened(node))
        else:
            if flattened:
                self.maps.flat[node.name] = flattened

    def _cut_in_windows(self, node: Node) -> Node:
        """Return `node`, a view of a weight as large as a map that cuts it in windows, as one of a map.

        What is compared among the positions of each window, as the masks of shifted windows are, is many times as large.
        """
        source = node.refs[0]
        if source in self.maps or source not in self.maps.shapes or len(node.refs) > 1:
            return node
        shape = self.maps.shapes[source]
        cut = [group_in[0] for group_in, group_out in groups(shape, node.shape) if len(group_in) == 1 < len(group_out)]
        extents = {self.maps.extent(name) for name in self.maps.axes}
        for rows, cols in itertools.pairwise(cut):
            if cols == rows + 1 and (shape[rows], shape[cols]) in extents:
                self.read_as_maps.add(source)
                return swap_refs(node, {source: self.maps.broadcast_weight(source, Axes(rows, cols), shape)})
        return node

    def _note_expansion(self, node: Node) -> Node:
        """Return `node`, an expansion to the size of a map for one that resizes a single position; what expands is noted."""
        source = next(iter(node.refs), "")
        if source not in self.maps:
            if _rule(node) is interpolate and self.maps.shapes.get(source, ())[-2:] == (1, 1):
                node = node.derived(aten.expand.default, Ref(source), list(node.shape))
            if node.target is aten.expand.default:
                if not self.maps.shapes[source]:  # as a number it would not take part in the choice of a dtype
                    one = f"{node.name}@one"
                    self._add_plain(node.derived(aten.reshape.default, Ref(source), [1], name=one, shape=(1,)))
                    source = one
                self.expanded[node.name] = source
        if source in self.expanded:
            if node.target in (aten.clone.default, aten.contiguous.default):
                self.expanded[node.name] = self.expanded[source]
            if _rule(node) is reshape:
                self._reshape_expanded(node, source)
        return node

    def _read_unexpanded(self, node: Node) -> Node:
        """An elementwise `node` that reads what was expanded as it was before: it broadcasts by itself.

        `x * gate.expand_as(x)` reads `gate` (N, C, 1, 1), so that no tensor as large as the map is made of it.
        """
        shapes = {name: seen_shape(self.maps, name) for name in node.refs}
        for name in [name for name in shapes if name in self.expanded]:
            small = seen_shape(self.maps, self.expanded[name])
            if torch.broadcast_shapes(*({**shapes, name: small}).values()) == node.shape:
                shapes[name] = small
                node = swap_refs(node, {name: self.expanded[name]})
        return node

    def _reshape_expanded(self, node: Node, source: str) -> None:
        """Reshape what was expanded before it is expanded: dimensions that stay as they are need not be written out."""
        base = self.maps.shapes[self.expanded[source]]
        full = self.maps.shapes[source]
        base = (1,) * (len(full) - len(base)) + tuple(base)
        before, after = list(full), list(node.shape)
        for group_in, group_out in groups(full, node.shape):
            if len(group_in) == len(group_out) == 1 and base[group_in[0]] == 1:
                before[group_in[0]] = after[group_out[0]] = 1
        part, small = f"{node.name}@part", f"{node.name}@small"
        self._add_plain(node.derived(aten.expand.default, Ref(self.expanded[source]), before, name=part, shape=before))
        self._add_plain(node.derived(aten.reshape.default, Ref(part), after, name=small, shape=after))
        self.expanded[node.name] = small

    def _add(self, node: Node) -> None:
        if isinstance(node.target, Reduction):
            self._add_reduction(node)
        elif any(name in self.maps for name in node.refs):
            found = apply_rule(node, self.maps)
            if 0 in (node.shape[found.axes.rows], node.shape[found.axes.cols]):
                raise node.refuse(
                    f"makes an empty map of shape {node.shape}",
                    "pass a larger image, or leave this output out where it is empty",
                )
            self._note_range(node)
            if not found.op.repeats:
                node, found = self._adapted(node, found)
            self.placed[node.name] = found
            self.maps.axes[node.name] = found.axes
            self._record(node)
        else:
            self._add_plain(node)

    def _adapted(self, node: Node, found: Placed) -> tuple[Node, Placed]:
        """Return `node`, placed as it runs on maps that are rolled or flipped, if any are; what it reads is placed before."""
        if node.target is mirror or any(name in self.maps.flipped for name in node.refs):
            nodes, node, found, flips = turned_round(node, found, self.maps)
            for each in nodes:
                self._add_plain(replace(each, dtype=self._dtype(each.refs[0])))
            if node.target is mirror:
                flips = flips[0] != node.args[1], flips[1] != node.args[2]
            if any(flips):
                self.maps.flipped[node.name] = flips
        begin = (0, 0)
        if any(name in self.maps.begin for name in node.refs):
            nodes, node, found, begin = around(node, found, self.maps)
            for each in nodes:
                self._add(replace(each, dtype=self._dtype(each.refs[0])))
        if node.target is turn:
            height, width = self.maps.extent(found.reads[0].source)
            begin = (begin[0] + node.args[1]) % height, (begin[1] + node.args[2]) % width
        if begin != (0, 0):
            self.maps.begin[node.name] = begin
        return node, found

    def _is_complex(self, node: Node) -> bool:
        """True if an operation reads a complex map, or makes one."""
        return node.dtype.is_complex or any(self._dtype(name).is_complex for name in node.refs if name in self.maps)

    def _dtype(self, name: str) -> torch.dtype:
        return self.nodes[name].dtype if name in self.nodes else self.captured.shapes[name][1]

    def _add_plain(self, node: Node) -> None:
        if _rule(node) is reshape and node.target is not aten.view.dtype:  # a streamed map may have other strides
            node = node.derived(aten.reshape.default, node.args[0], list(node.shape))
        if by_batch(node) and node.pick in (None, 0):
            for step in batch_norm_of_tensor(node, node.module_path in self.captured.synchronised):
                self._add_plain(step)
            return
        if any(name in self.maps or name in self.whole for name in node.refs):
            self.whole.add(node.name)
        self._note_range(node)
        self._record(node)

    def _add_reduction(self, node: Node) -> None:
        if node.name in self.nodes:
            return
        extent = self.maps.extent(node.refs[0])
        reads = tuple(map(self.maps.read, node.refs))
        node, self.placed[node.name] = self._adapted(node, Placed(reads, Axes(0, 1), _gathered))
        self._record(replace(node, shape=extent))
        for part, shape in zip(parts_of(node), node.kwargs["shapes"], strict=True):
            self.maps.shapes[part] = shape

    def unflattened(self, node: Node) -> Node:
        """`node` with flattened, rolled and flipped maps as the model sees them."""
        maps = self.maps
        for name in maps.begin.keys() & set(node.refs):
            node = self._read_made(node, name, self._add, "straight", straight)
            if name in maps.flat:
                maps.flat[f"{name}@straight"] = maps.flat[name]
        for name in maps.flipped.keys() & set(node.refs):
            over = [d for d, flip in zip(maps.axes[name], maps.flipped[name], strict=True) if flip]
            node = self._read_made(node, name, self._add_plain, "turned round", aten.flip.default, over)
        for name in [name for name in node.refs if name.removesuffix("@turned round") in maps.flat]:
            shape = seen_shape(maps, name.removesuffix("@turned round"))
            node = self._read_made(node, name, self._add_plain, "whole", aten.reshape.default, list(shape), shape=shape)
        return node

    def _read_made(
        self,
        node: Node,
        name: str,
        add: Callable[[Node], None],
        suffix: str,
        target: Callable[..., Any],
        *args: Any,
        shape: Sequence[int] | None = None,
    ) -> Node:
        """Return `node` reading what `target` makes of map `name`."""
        made = f"{name}@{suffix}"
        if made not in self.nodes:
            add(self.nodes[name].derived(target, Ref(name), *args, name=made, shape=shape))
        return swap_refs(node, {name: made})

    def _record(self, node: Node) -> None:
        self.nodes[node.name] = node
        self.maps.shapes[node.name] = node.shape

    def _note_range(self, node: Node) -> None:
        node = replace(node, dtype=self.computed.get(node.name, node.dtype))
        if (found := range_of(node, self.maps.ranges, self.maps.shapes)) is not None:
            self.maps.ranges[node.name] = found


def _gathered(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
    raise AssertionError("a reduction is gathered over all tiles, and not computed on one")


def _rule(node: Node) -> Any:
    """The rule of a node's operator, None if there is none."""
    op = op_of(node.target)
    return op and op.rule
