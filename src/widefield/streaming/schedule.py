"""When each row of each map is computed, and how long it is kept: one axis, plain integers.

Tiles arrive along the axis; every map follows as far as its inputs allow. `ready[v][t]` counts the positions of map `v` that
exist after step `t`, `kept[v][t]` is the first one still needed by a later step. What lies between is the map's carry. Steps
are numbered from 1; index 0 is the state before the first. A 2-D scan is one such schedule for rows and one for columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
import numpy.typing as npt

from widefield.streaming.extents import AxisMap, Span, identity


@dataclass(frozen=True, slots=True)
class Flow:
    """How one map follows from others along one axis: `sources[k]` is read through `maps[k]`. No sources: a stage input."""

    size: int
    sources: tuple[int, ...] = ()
    maps: tuple[AxisMap, ...] = ()

    @property
    def strided(self) -> bool:
        return any(m.stride > 1 for m in self.maps)


@dataclass(frozen=True)
class Schedule:
    """The scan along one axis: `ready[v][t]` and `kept[v][t]` (see the module's page) for `t` in `0 ... steps`."""

    flows: tuple[Flow, ...]
    ready: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.ready[0]) - 1

    @cached_property
    def ready_array(self) -> npt.NDArray[np.float64]:
        """`ready` as an array (maps, steps + 1)."""
        return np.array(self.ready, dtype=np.float64)

    @cached_property
    def kept_array(self) -> npt.NDArray[np.float64]:
        """`kept` as an array (maps, steps + 1)."""
        return np.array(self.kept, dtype=np.float64)

    def span(self, v: int, k: int, t: int) -> Span:
        """What map `v` reads from its `k`-th source in step `t`."""
        return self.flows[v].maps[k].span(self.ready[v][t - 1], self.ready[v][t])


def schedule(flows: Sequence[Flow], tile: int, gate: int = 1, limit: int | None = None) -> Schedule:
    """Scan `flows` (in topological order) with `tile` new positions of the longest input a step, of the others in proportion.

    No map is begun before its sources are. `gate`: a strided op waits until it can compute that many positions, so that no deep
    layer runs on a sliver. After the last input, no map advances by much more than in a steady step: extra steps without new
    input drain the network, so that the last step is no larger than the others. `limit`: only so many steps, for an estimate.
    """
    length = max(flow.size for flow in flows if not flow.sources)
    rate = [max(ceil(1.5 * tile * flow.size / length), ceil(tile * flow.size / length) + gate) for flow in flows]
    # A map that follows another one position by position is computed with it.
    alias = list(range(len(flows)))
    for v, flow in enumerate(flows):
        if len({alias[s] for s in flow.sources}) == 1 and all(m == identity(flow.size) for m in flow.maps):
            alias[v] = alias[flow.sources[0]]
    own = [v for v in range(len(flows)) if alias[v] == v]
    ready = [[0] for _ in flows]
    t = 0
    while t != limit and any(ready[v][-1] < flows[v].size for v in own):
        t += 1
        for v in own:
            flow, before = flows[v], ready[v][-1]
            if not flow.sources:
                now = min(-(-t * tile * flow.size // length), flow.size)
            else:
                now = flow.size
                for s, m in zip(flow.sources, flow.maps, strict=True):
                    there = ready[alias[s]][t]
                    now = min(now, m.ready(there) if there else 0)
                if flow.strided and now < flow.size and now - before < gate:
                    now = before
                now = min(now, before + rate[v])
            ready[v].append(now)
    kept = [list(r) if alias[v] == v else r for v, r in enumerate(ready)]
    for v, flow in enumerate(flows):
        for s, m in zip(flow.sources, flow.maps, strict=True):
            if alias[v] == alias[s]:
                continue
            last = flows[s].size - 1  # kept while there is padding to compute that reads nothing
            if kept[s] is ready[s]:
                kept[s] = list(ready[alias[s]])
            kept[s] = [
                min(b, m.first(r) if r >= flow.size else min(m.first(r), last))
                for b, r in zip(kept[s], ready[alias[v]], strict=True)
            ]
    whole = [tuple(r) for r in ready]
    return Schedule(
        tuple(flows),
        tuple(whole[a] for a in alias),
        tuple(whole[alias[v]] if kept[v] is ready[v] else tuple(kept[v]) for v in range(len(flows))),
    )
