"""When each row of each map is computed, and how long it is kept: one axis, plain integers.

Tiles arrive along the axis; every map follows as far as its inputs allow. `ready[v][t]` counts the positions of map `v` that
exist after step `t`, `kept[v][t]` is the first one still needed by a later step. What lies between is the map's carry. Steps
are numbered from 1; index 0 is the state before the first. A 2-D scan is one such schedule for rows and one for columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from widefield.streaming.extents import AxisMap, Positions, Span, identity


@dataclass(frozen=True, slots=True)
class Flow:
    """One map along one axis, as it follows from others: `sources[k]` is read through `axis_maps[k]`. No sources: a stage input.

    `waits`: if it is strided, it waits until there is enough to compute, see `schedules`.
    """

    size: int
    sources: tuple[int, ...] = ()
    axis_maps: tuple[AxisMap, ...] = ()
    waits: bool = True

    @property
    def strided(self) -> bool:
        return any(m.stride > 1 for m in self.axis_maps)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The scan along one axis: `ready[v][t]` and `kept[v][t]` (see the module's docstring) for `t` in `0 ... steps`.

    `ready_array` and `kept_array` are the same as arrays (maps, steps + 1). One that is not `whole` is the beginning of
    a schedule with about `parts` times as many steps.
    """

    flows: tuple[Flow, ...]
    ready_array: Positions
    kept_array: Positions
    whole: bool = True
    parts: float = 1.0

    @property
    def steps(self) -> int:
        return self.ready_array.shape[1] - 1

    @cached_property
    def ready(self) -> list[list[int]]:
        return self.ready_array.tolist()

    @cached_property
    def kept(self) -> list[list[int]]:
        return self.kept_array.tolist()

    def span(self, v: int, k: int, t: int) -> Span:
        """Return what map `v` reads from its `k`-th source in step `t`."""
        return self.flows[v].axis_maps[k].span(self.ready[v][t - 1], self.ready[v][t])


def schedules(
    flows: Sequence[Flow], tiles: Sequence[int], gate: int = 1, limit: int | None = None
) -> tuple[Schedule, ...]:
    """Scan `flows` (in topological order) with so many new positions of the longest input a step, of the others in proportion.

    One schedule for each of `tiles`. No map is begun before its sources are. `gate`: a strided op waits until it can compute that
    many positions, so that no deep layer runs on a sliver. After the last input, no map advances by much more than in a steady
    step: extra steps without new input drain the network, so that the last step is no larger than the others. `limit`: about so
    many steps, for an estimate.
    """
    length = max(flow.size for flow in flows if not flow.sources)
    alias = _aliases(flows)
    sizes = np.array([flow.size for flow in flows])[:, None]
    most = -(-length // min(tiles)) + 16  # a guess of how many it takes to drain the network
    while True:
        steps = most if limit is None else min(most, limit)
        ready = _ready(flows, alias, np.array(tiles)[:, None], length, gate, steps)
        whole = (ready[:, :, -1] == sizes).all(0)
        if whole.all() or steps == limit:
            break
        most += most // 2
    kept = _kept(flows, alias, ready)
    ends = (ready < sizes[..., None]).sum(2).max(0) + 1
    parts = [1.0 if done else max(1.0, length / (tile * steps)) for done, tile in zip(whole, tiles, strict=True)]
    return tuple(
        Schedule(tuple(flows), ready[:, k, :end].copy(), kept[:, k, :end].copy(), bool(whole[k]), parts[k])
        for k, end in enumerate(ends.tolist())
    )


def _aliases(flows: Sequence[Flow]) -> list[int]:
    """For each map the first one that it follows position by position, with which it is computed; itself if there is none."""
    alias = list(range(len(flows)))
    for v, flow in enumerate(flows):
        first = {alias[s] for s in flow.sources}
        if len(first) == 1 and all(m == identity(flow.size) for m in flow.axis_maps):
            alias[v] = first.pop()
    return alias


def _ready(
    flows: Sequence[Flow], alias: Sequence[int], tiles: Positions, length: int, gate: int, steps: int
) -> Positions:
    """`ready` of all maps for so many steps: (maps, tiles, steps + 1)."""
    t = np.arange(steps + 1)
    ready = np.empty((len(flows), len(tiles), steps + 1), dtype=np.int64)
    for v, flow in enumerate(flows):
        if alias[v] != v:
            ready[v] = ready[alias[v]]
        elif not flow.sources:
            ready[v] = np.minimum(-(-t * tiles * flow.size // length), flow.size)
        else:
            possible = flow.axis_maps[0].ready_all(ready[flow.sources[0]])
            for s, m in zip(flow.sources[1:], flow.axis_maps[1:], strict=True):
                possible = np.minimum(possible, m.ready_all(ready[s]))
            steady = tiles * flow.size / length
            most = np.maximum(np.ceil(1.5 * steady), np.ceil(steady) + (gate if flow.waits else 0)).astype(np.int64)
            if flow.strided and flow.waits:
                for k, limit in enumerate(most[:, 0].tolist()):
                    ready[v, k] = _gated(possible[k].tolist(), limit, gate, flow.size)
            else:  # no step makes more than `most`
                ready[v] = np.minimum.accumulate(possible - t * most, axis=1) + t * most
    return ready


def _gated(possible: Sequence[int], most: int, gate: int, size: int) -> list[int]:
    """Follow `possible`, at least `gate` positions a step or none, and at most `most`."""
    ready, now = [], 0
    for there in possible:
        if there == size or there - now >= gate:
            now = min(there, now + most)
        ready.append(now)
    return ready


def _kept(flows: Sequence[Flow], alias: Sequence[int], ready: Positions) -> Positions:
    """`kept` of all maps: (maps, tiles, steps + 1)."""
    kept = ready.copy()
    for v, flow in enumerate(flows):
        for s, m in zip(flow.sources, flow.axis_maps, strict=True):
            if alias[v] != alias[s]:
                first = m.first_all(ready[v])
                # kept while there is padding to compute that reads nothing
                padding = np.minimum(first, flows[s].size - 1)
                first = np.where(ready[v] < flow.size, padding, first)
                np.minimum(kept[s], first, out=kept[s])
    return kept
