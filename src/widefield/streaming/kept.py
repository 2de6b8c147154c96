"""The maps that live between scans, and what is computed again instead.

A map that a later scan reads is kept whole, or made again there from what is kept: the image, at last. Both are exact, and what is
made again has its share in the gradients wherever it is made. Less memory is more work: in a residual network with group norms,
say, the wide map of a bottleneck follows from the narrow one before it by one convolution more in each pass.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import prod
from typing import NamedTuple

import torch

from widefield.streaming.captured import Node
from widefield.streaming.extents import identity
from widefield.streaming.rules import Maps, Placed, Reduction, op_of

# Of each choice of maps that are kept: the share of the bytes that it must save, and how much may be computed in all.
_LESS = 0.04
_MOST = 2.5
_MOST_OF_A_CUT = 4  # maps


class Scan(NamedTuple):
    """The work of one scan: the maps that leave it and the reductions, computed from what it reads."""

    leaving: list[str]
    reductions: list[str]
    computed: set[str]
    read: set[str]


@dataclass(frozen=True, eq=False)
class Scans:
    """All that scans compute, to be divided among them.

    `given` are the maps that come from outside, `nodes` the maps and reductions in order, `levels` the first scan that can
    compute each, `wanted` the maps that are needed whole.
    """

    maps: Maps
    given: Sequence[str]
    nodes: Sequence[Node]
    placed: Mapping[str, Placed]
    levels: Mapping[str, int]
    wanted: Collection[str]

    def all(self, kept: Collection[str]) -> dict[int, Scan]:
        """The scans by level, if the maps `kept` are."""
        scans: dict[int, Scan] = {}
        for name in self.given:
            if name in self.wanted:
                scans.setdefault(0, Scan([], [], set(), set())).leaving.append(name)
        for node in self.nodes:
            reduction = isinstance(node.target, Reduction)
            if reduction or node.name in self.wanted or node.name in kept:
                scan = scans.setdefault(self.levels[node.name], Scan([], [], set(), set()))
                (scan.reductions if reduction else scan.leaving).append(node.name)
        for level, (leaving, reductions, computed, read) in scans.items():
            todo = [*leaving, *reductions]
            while todo:
                name = todo.pop()
                if name not in self.placed or (name in kept and self.levels[name] < level):
                    read.add(name)
                elif name not in computed:
                    computed.add(name)
                    todo += [each.source for each in self.placed[name].reads]
        return dict(sorted(scans.items()))

    def crossing(self) -> set[str]:
        """The maps that are read by a later scan than that which makes them.

        Those that follow by cheap operations from a single one that is kept are not among them: they are always made again.
        """
        read = {
            each.source
            for node in self.nodes
            for each in self.placed[node.name].reads
            if self.levels.get(each.source, 0) < self.levels[node.name]
        }
        kept: set[str] = set()
        for node in self.nodes:
            if node.name in read and not self._follows(node.name, kept):
                kept.add(node.name)
        return kept

    def _follows(self, name: str, kept: set[str]) -> bool:
        """True if cheap operations lead from a map in `kept` to map `name`."""
        while name in self.placed and len({each.source for each in self.placed[name].reads}) == 1:
            each = self.placed[name].reads[0]
            height, width = self.maps.extent(each.source)
            if (each.rows, each.cols) != (identity(height), identity(width)) or not self.placed[name].op.cheap:
                return False
            name = each.source
            if name in kept:
                return True
        return False

    def narrow(self) -> list[str]:
        """The maps through which everything goes, those that are no larger than any such map before.

        Of a map and what follows from it by one cheap operation, the latter counts.
        """
        last_read = {read.source: k for k, node in enumerate(self.nodes) for read in self.placed[node.name].reads}
        found: list[Node] = []
        alive: set[str] = set()
        for k, node in enumerate(self.nodes):
            alive = {name for name in (*alive, node.name) if last_read.get(name, k) > k}
            if alive != {node.name} or not self._can_be_kept(node) or (found and size_of(node) > size_of(found[-1])):
                continue
            placed = self.placed[node.name]
            if found and placed.op.cheap and {read.source for read in placed.reads} == {found[-1].name}:
                found.pop()
            found.append(node)
        return [node.name for node in found]

    def waists(self) -> list[frozenset[str]]:
        """The maps that lead to the deep part of a network with skip connections and back, from the smallest such part on.

        The deep part is all that is no larger than some map in height and width; what goes beside it is kept too.
        """
        by_name = {node.name: node for node in self.nodes if not isinstance(node.target, Reduction)}
        areas = {name: prod(self.maps.extent(name)) for name in by_name}
        reads = [(each.source, name) for name in by_name for each in self.placed[name].reads]
        found = list[frozenset[str]]()
        for area in sorted(set(areas.values()))[:-1]:
            deep = {name for name, size in areas.items() if size <= area}
            back = {source for source, reader in reads if source in deep and reader not in deep}
            there = {source for source, reader in reads if reader in deep and source not in deep}
            cut = frozenset((there | back).intersection(by_name))
            if back and len(cut) <= _MOST_OF_A_CUT and all(self._can_be_kept(by_name[name]) for name in cut):
                found.append(cut)
        return found

    def _can_be_kept(self, node: Node) -> bool:
        return not is_view(node) and node.dtype.is_floating_point and node.name not in self.maps.begin

    def thinner(self, work: Mapping[str, float], fixed: Collection[str]) -> list[frozenset[str]]:
        """Choices of maps to keep, each with fewer bytes than the one before, at the least work; `fixed` ones are always kept.

        One map after the other is given up: that which costs least for its bytes. `work` is that of each node, of ReLUs with what
        is before them.
        """
        sizes = {node.name: _whole_size(node) for node in self.nodes}
        kept, once = self.crossing(), sum(work.values())

        def work_with(kept: set[str]) -> float:
            return sum(work.get(name, 0.0) for scan in self.all(kept).values() for name in scan.computed)

        left = sum(sizes[name] for name in kept if name in sizes and name not in self.wanted)
        now, noted, found = work_with(kept), left, list[frozenset[str]]()
        queue = [(0.0, name) for name in kept if sizes.get(name) and name not in {*fixed, *self.wanted}]
        heapify(queue)
        while queue:
            _, name = heappop(queue)
            more = work_with(kept - {name})
            price = (more - now) / sizes[name]
            if queue and price > queue[0][0]:  # what a map costs grows only as others are given up
                heappush(queue, (price, name))
                continue
            if more > _MOST * once:
                continue
            kept, now, left = kept - {name}, more, left - sizes[name]
            if left < noted * (1 - _LESS):
                noted = left
                found.append(frozenset(kept))
        return found


def size_of(node: Node) -> int:
    """Bytes of a node's result, none for views."""
    return 0 if is_view(node) else _whole_size(node)


def _whole_size(node: Node) -> int:
    """Bytes of a node's result where it is kept."""
    return torch.Size(node.shape).numel() * node.dtype.itemsize


def is_view(node: Node) -> bool:
    """True if a node's result shares the memory of what it reads."""
    op = op_of(node.target)
    if node.target is torch.ops.aten.to.dtype:  # is marked as one, and copies
        return False
    return getattr(node.target, "is_view", False) or (op is not None and op.is_view)
