"""From a memory budget to a plan: which program, which tiles, and what is recorded instead of recomputed."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
import torch

from widefield.streaming.budget import format_bytes, free_memory
from widefield.streaming.drafts import Draft, PlanRequest, TileOptions, fitting, places_of, scaled, smallest, tiles_of
from widefield.streaming.grid import Grid, make_grid
from widefield.streaming.layers import layers_of
from widefield.streaming.memory import Footprint
from widefield.streaming.memory_model import Array
from widefield.streaming.need import PartialGrid, Wanted, needs
from widefield.streaming.plan import Plan
from widefield.streaming.program import Program
from widefield.streaming.time_model import amounts, relative_time

SHARE_OF_FREE_MEMORY = 0.5
_GAIN = 0.05  # of a plain pass's time: what a stage more must save
_LOOKS = 6  # places along the network where a cut is tried first
_ON_THE_HOST = 10.0  # times the predicted time, of a pass whose maps a GPU moves to the host; see docs/benchmarks.md


@dataclass(frozen=True)
class StagePlan:
    """The scan of one stage: its `grid`, or the part of it that is needed, the bytes of carries that it saves, how many of its last
    steps are recorded.
    """

    grid: Grid | PartialGrid
    carry_sizes: Mapping[torch.dtype, int]
    recorded: int


@dataclass(frozen=True, eq=False)
class Planner:
    """Tiles for a program within a budget, of which `plan` makes plans: for the whole image, or for parts of it."""

    program: Program
    request: PlanRequest
    draft: Draft
    footprints: tuple[Footprint, ...]
    limit: int | None
    tile: tuple[int, int]

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        zipped = zip(self.program.stages, self.footprints, strict=True)
        return tuple(make_grid(stage, found.rows.schedule, found.cols.schedule) for stage, found in zipped)

    def plan(self, wanted: Wanted | None = None) -> tuple[Plan, tuple[StagePlan, ...]]:
        """The plan of a pass that computes what is `wanted` (None: all), and how each stage is scanned."""
        return self._whole if wanted is None else _finished(self, needs(self.program, self.grids, wanted))

    @property
    def fits(self) -> bool:
        """False if nothing fits, so that what needs least is tried, and where there is no limit."""
        return self.limit is not None and self.draft.total <= self.limit

    @property
    def overhead(self) -> float:
        return self._whole[0].predicted_overhead

    @cached_property
    def _whole(self) -> tuple[Plan, tuple[StagePlan, ...]]:
        return _finished(self, [None] * len(self.grids))


def make_planner(program: Program, request: PlanRequest) -> Planner:
    """Find tiles, which maps live between stages, and whether a deep part of the network is worth a stage of its own.

    Raises ValueError when the budget is too small for any tile, naming the smallest that would do.
    """
    best = _planner(program, request)
    if best is None or best.draft.maps != "device":
        thinner, elsewhere = _thinner(program, request), 1.0 if request.device.type == "cpu" else _ON_THE_HOST
        if best is None or (thinner is not None and thinner.overhead < best.overhead * elsewhere):
            best = thinner
    if best is not None:
        return best if request.ranks > 1 else _divided(best, request)
    others = [(program, request)]
    if request.ranks == 1:
        others += [(choice(), request) for choice in program.thinner()[-1:]]
        others += [(division(), replace(request, divided=True)) for division in (*program.divisions, *program.waists)]
    found = [planner for each in others[1:] if (planner := _planner(*each)) is not None]
    if not found:
        raise _too_small(others)
    return min(found, key=_rank)


def _thinner(program: Program, request: PlanRequest) -> Planner | None:
    """The planner that keeps most maps between stages, of those that keep all on the device; None if there is none."""
    best, choices = None, program.thinner() if request.ranks == 1 and request.maps in (None, "device") else ()
    first, end = 0, len(choices)
    while first < end:
        middle = (first + end) // 2
        found = _planner(choices[middle](), replace(request, maps="device"))
        if found is None or not found.fits or found.draft.carries != "device":
            first = middle + 1
        else:
            best, end = found, middle
    return best


def _divided(best: Planner, request: PlanRequest) -> Planner:
    """`best`, or one with a stage of its own for the deep part of the network.

    The deep part has most weights and small maps: its steps can be large and few, and recorded. The later the stage is cut, the
    less memory it needs, and the more the shallow one recomputes. Of a network with skip connections all waists are looked at.
    """
    along, request = len(best.program.divisions), replace(request, divided=True)
    divisions = (*best.program.divisions, *best.program.waists)
    recorded = all(count == steps for count, steps in best.plan()[0].recorded)
    if best.limit is None or not divisions or best.overhead <= 1 + _GAIN or (recorded and request.training):
        return best
    found: dict[int, Planner] = {}

    def look(numbers: Iterable[int]) -> int:
        """Make planners for these places of the cut; return the number of the best so far."""
        for k in numbers:
            if k in range(len(divisions)) and k not in found:
                found[k] = _planner(divisions[k](), request) or best
        return min(found, key=lambda k: _rank(found[k]))

    distance = max(1, -(-along // _LOOKS))
    at = look((*range(distance // 2, along, distance), *range(along, len(divisions))))
    while distance > 1:
        distance = (distance + 1) // 2
        at = look((at - distance, at + distance))
    *places, target = _rank(best)
    return found[at] if _rank(found[at]) < (*places, target - _GAIN) else best


def _rank(planner: Planner) -> tuple[bool, int, float]:
    """Return a key for sorting: what fits before what does not, then on a GPU what moves less to the host, then what is faster."""
    draft = planner.draft
    moved = 0 if planner.request.device.type == "cpu" else (draft.maps, draft.carries).count("device")
    return not planner.fits, -moved, planner.overhead


def _planner(program: Program, request: PlanRequest) -> Planner | None:
    """Find tiles; None if the budget is too small for any, or a map that is to be kept nowhere would be read later."""
    if request.written and request.written.replaced & {name for item in program.items for name in program.reads(item)}:
        return None
    limit, tile, options = _options(program, request)
    drafts = (fitting(program, request, options, places, limit) for places in places_of(request))
    draft = next((draft for draft in drafts if draft is not None), None)
    if draft is None:
        if request.budget is not None:
            return None
        # Where nothing fits the share of the free memory, what needs least is tried.
        draft = smallest(program, request, options)
    footprints = tuple(option.footprint(k) for option, k in zip(options, draft.choice, strict=True))
    return Planner(program, request, draft, footprints, limit, tile or options[0].tiles[draft.choice[0]])


def _options(program: Program, request: PlanRequest) -> tuple[int | None, tuple[int, int] | None, list["TileOptions"]]:
    """Return the limit in bytes and the tile, if there are such, and the options of each stage."""
    height, width = program.captured.image_shape[2:]
    limit, tile = request.budget, None
    if request.tile is not None:
        tile = (min(request.tile[0], height), min(request.tile[1] or width, width))
    elif limit is None:
        limit = usable_memory(request.device) if request.limit is None else request.limit
    options = [
        TileOptions(
            stage,
            program.captured.image,
            [scaled(tile, stage, (height, width))] if tile else tiles_of(stage, (height, width), request),
            request.training,
        )
        for stage in program.stages
    ]
    return limit, tile, options


def _too_small(programs: Sequence[tuple[Program, PlanRequest]]) -> ValueError:
    """The error that names the smallest budget with which one of `programs` works."""
    found = []
    for program, request in programs:
        *_, options = _options(program, request)
        draft = smallest(program, request, options)
        found.append((draft.total, options[0].tiles[draft.choice[0]]))
    (total, tile), (program, request) = min(found), programs[0]
    assert request.budget is not None
    return ValueError(
        f"memory_budget of {format_bytes(request.budget)} is too small for an image of shape "
        f"{program.captured.image_shape}: the smallest that works is {format_bytes(total + 2**20)} "
        f"({total + 2**20} bytes, with tile_size={tile})"
    )


def _finished(planner: Planner, needed: Sequence[PartialGrid | None]) -> tuple[Plan, tuple[StagePlan, ...]]:
    """The plan of what is needed, with as many steps recorded as the budget has room for, and how each stage is scanned."""
    program, training, draft, grids = planner.program, planner.request.training, planner.draft, planner.grids
    footprints = [replace(found, need=need) for found, need in zip(planner.footprints, needed, strict=True)]
    sizes = _sizes_of_parts(planner, footprints)
    recorded, shares = [0] * len(footprints), [0.0] * len(footprints)
    if training:
        recorded, shares = _recorded(planner, footprints, sizes)
    did = amounts(footprints, shares, training, (draft.maps == "file", draft.carries == "file"))
    stage_plans = [
        StagePlan(footprint.need or grid, footprint.carries if training else {}, count)
        for grid, footprint, count in zip(grids, footprints, recorded, strict=True)
    ]
    computed, of_all = (sum(of) for of in zip(*(found.computed for found in footprints), strict=True))
    plan = Plan(
        image_shape=program.captured.image_shape,  # type: ignore[arg-type]
        tile_size=planner.tile,
        steps=sum(len(_in_order(found)) for found in footprints),
        predicted_bytes=MappingProxyType(sizes),
        predicted_overhead=relative_time(*did, planner.request.device.type),
        layers=layers_of(program, grids),
        streamed_fraction=program.streamed_fraction,
        stages=len(program.stages),
        map_bytes=draft.map_bytes,
        map_place=draft.maps,
        carry_place=draft.carries,
        refused=program.refused,
        computed_fraction=computed / of_all,
        recorded=tuple((count, len(_in_order(found))) for count, found in zip(recorded, footprints, strict=True)),
    )
    return plan, tuple(stage_plans)


def _recorded(
    planner: Planner, footprints: Sequence[Footprint], sizes: dict[str, int]
) -> tuple[list[int], list[float]]:
    """Return the number of each stage's last steps that are recorded, and their share of it; add their bytes to `sizes`.

    As many as the budget has room for, from the last step backwards. What the last step needs is there anyhow: it is the first in
    the backward pass, and without recording it would be recomputed in the same place. So is what the gradients of a row of carries
    need, which come when the first recorded steps are gone.
    """
    excess, last = planner.request.heap_excess[1], footprints[-1]
    there = max(0.0, sizes["step"] - planner.footprints[-1].cost.step + float(last.recorded.max()))
    there += max(footprint.cost.row for footprint in planner.footprints)
    free = 0 if planner.limit is None else planner.limit - sum(sizes.values())
    room, used = free / (1 + excess) + there if free > 0 else 0.0, 0.0
    counts, shares = [0] * len(footprints), [0.0] * len(footprints)
    for s in reversed(range(len(footprints))):
        sums = np.cumsum(_in_order(footprints[s])[::-1])
        counts[s] = int(np.searchsorted(sums, room, side="right"))
        taken = float(sums[counts[s] - 1]) if counts[s] else 0.0
        room, used = (room - taken if counts[s] == len(sums) else 0.0), used + taken
        shares[s] = taken / max(1.0, float(sums[-1])) if len(sums) else 0.0  # nothing of the image may be wanted
    sizes["recorded"] = int(max(0.0, used - there))
    sizes["allocator"] += int(sizes["recorded"] * excess)
    return counts, shares


def _in_order(footprint: Footprint) -> Array:
    """Return the bytes that autograd keeps of each step, in the order of the steps."""
    if footprint.need is None:
        return footprint.recorded.ravel()
    order = footprint.need.order
    return footprint.recorded[[i for i, _ in order], [j for _, j in order]]


def _sizes_of_parts(planner: Planner, footprints: Sequence[Footprint]) -> dict[str, int]:
    """The sizes of the draft, less what is not needed of carries and maps."""
    program, draft, sizes = planner.program, planner.draft, dict(planner.draft.sizes)
    if planner.request.training and draft.carries == "device":
        saved = (
            sum(found.carries.values()) - sum(whole.carries.values())
            for found, whole in zip(footprints, planner.footprints, strict=True)
        )
        sizes["carries"] += sum(saved)
    shares = dict[str, float]()
    for stage, grid, found in zip(program.stages, planner.grids, footprints, strict=True):
        if found.need is None:
            continue
        for v in stage.outputs:
            height, width = grid.extent(v)
            *_, rows, cols = found.need.part(v)
            shares[stage.values[v].name] = share = rows * cols / (height * width)
            if v not in stage.stored and planner.request.written is None:
                sizes["outputs"] = max(0, sizes["outputs"] - int(stage.values[v].bytes * (1 - share)))
    if shares and draft.maps == "device":
        sizes["maps"] = program.map_bytes(planner.request.training, shares)
    return sizes


def usable_memory(device: torch.device) -> int:
    """Return the bytes that a scan without a budget may use."""
    return int(SHARE_OF_FREE_MEMORY * free_memory(device) / _processes(device))


def _processes(device: torch.device) -> int:
    """Return the number of processes of a distributed run that share the memory of this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if device.type == "cpu" else 1
