"""From a memory budget to tiles: which sizes, what is recorded instead of recomputed, and where things are kept."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import log2, prod, sqrt
from types import MappingProxyType

import numpy as np
import torch

from widefield.streaming.budget import format_bytes, free_memory
from widefield.streaming.grid import GATE, Grid, make_grid
from widefield.streaming.layers import layers_of
from widefield.streaming.memory import Axis, Cost, Footprint, estimates
from widefield.streaming.memory_model import Array, MemoryModel, bytes_of_kernels
from widefield.streaming.need import PartialGrid, Wanted, needs
from widefield.streaming.plan import Plan
from widefield.streaming.program import Program, Stage
from widefield.streaming.schedule import schedules
from widefield.streaming.store import PLACES, Place

# A step should have about this many pixels of the image: enough to pay for reading the weights, few enough for the cache. Of a
# small image half as many, so that there are some steps, of which some are recorded.
PREFERRED_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 23}
_SOME_STEPS = 8
SHARE_OF_FREE_MEMORY = 0.5
_GAIN = 0.02  # of a step's time: what a stage more must save
# Times the compute: what maps in a file cost, and what those that a GPU moves to the host do; measured, see docs/benchmarks.md.
_ELSEWHERE = {"cpu": 1.3, "cuda": 10.0}
_NEAR = 8  # tiles whose exact size is looked at, for the smallest budget that works
_STEPS_OF_ESTIMATE = 128  # along an axis: enough for the deepest layers to have begun
# What the C library's heap holds beyond what is in use, relative to the largest step (of a network of one stage, of several),
# and to what is recorded; measured, see docs/benchmarks.md. On CUDA, PyTorch's own allocator reuses blocks.
_HEAP_EXCESS = (0.5, 0.8, 0.1)


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan has to heed.

    `tile`: (height, None) is a strip of the whole width. `budget` in bytes. `training`: gradients are wanted. `maps`: where maps
    between stages must live. `copied_weights`: the weights are copied into another memory format. `stages`: how many the program
    has. `partial`: a part of the image is wanted, so that tiles are as high as wide. `limit`: bytes to
    be used where there is no budget; None: a share of what is free. `ranks`: so many processes share the image. `written`: maps are
    written to a sink, which changes the bytes of output maps by so many, and by so many for each row of a tile. `divided`: the
    stages are parts of one, with its kind of steps, which they take for their parts of the image.
    """

    tile: tuple[int, int | None] | None
    budget: int | None
    device: torch.device
    maps: Place | None
    training: bool
    copied_weights: bool
    stages: int
    partial: bool = False
    limit: int | None = None
    ranks: int = 1
    written: tuple[int, float] | None = None
    divided: bool = False

    @property
    def heap_excess(self) -> tuple[float, float]:
        """Relative to the largest step, and to what is recorded."""
        if self.device.type != "cpu":
            return 0.0, 0.0
        one, several, recorded = _HEAP_EXCESS
        return one if self.stages == 1 else several, recorded


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
    draft: "_Draft"
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
        """False if nothing fits, so that what needs least is tried."""
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
        thinner, elsewhere = _thinner(program, request), _ELSEWHERE.get(request.device.type, 1.3)
        if best is None or (thinner is not None and thinner.overhead < best.overhead * elsewhere):
            best = thinner
    if best is None:
        thinnest = [choice() for choice in program.thinner()[-1:] if request.ranks == 1]
        best = next((found for each in thinnest if (found := _planner(each, request)) is not None), None)
        if best is None:
            raise _too_small([program, *thinnest], request)
    return _divided(best, request)


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
    """`best`, or one with a stage of its own for the deep part of the network, of which more is recorded.

    The later the stage is cut, the less memory the deep part needs, and the more the shallow one recomputes: best is the first cut
    behind which all fits, or one near it.
    """
    places, divisions = (best.draft.maps, best.draft.carries), best.program.divisions
    if not request.training or request.ranks > 1 or places != ("device", "device") or not best.fits:
        return best
    target, (first, end) = best.overhead - _GAIN, (0, len(divisions))
    while first < end and best.overhead > 1 + _GAIN:
        middle = (first + end) // 2
        found = _planner(divisions[middle](), replace(request, divided=True))
        if found is None:
            first = middle + 1
            continue
        if (found.draft.maps, found.draft.carries) == places and found.overhead < target:
            best, target = found, found.overhead
        last = found.plan()[1][-1]
        first, end = (first, middle) if last.recorded == len(last.grid.order) else (middle + 1, end)
    return best


def _planner(program: Program, request: PlanRequest) -> Planner | None:
    """Find tiles; None if the budget is too small for any."""
    limit, tile, options = _options(program, request)
    drafts = (_fitting(program, request, options, places, limit) for places in _places(request))
    draft = next((draft for draft in drafts if draft is not None), None)
    if draft is None:
        if request.budget is not None:
            return None
        # Where nothing fits the share of the free memory, what needs least is tried.
        draft = _smallest(program, request, options)
    footprints = tuple(option.footprint(k) for option, k in zip(options, draft.choice, strict=True))
    return Planner(program, request, draft, footprints, limit, tile or options[0].tiles[draft.choice[0]])


def _options(program: Program, request: PlanRequest) -> tuple[int | None, tuple[int, int] | None, list["_Options"]]:
    """Return the limit in bytes and the tile, if there are such, and the options of each stage."""
    height, width = program.captured.image_shape[2:]
    limit, tile = request.budget, None
    if request.tile is not None:
        tile = (min(request.tile[0], height), min(request.tile[1] or width, width))
    elif limit is None:
        limit = usable_memory(request.device) if request.limit is None else request.limit
    options = [
        _Options(
            stage,
            program.captured.image,
            [_scaled(tile, stage, (height, width))] if tile else _tiles(stage, (height, width), request),
            request.training,
        )
        for stage in program.stages
    ]
    return limit, tile, options


def _too_small(programs: Sequence[Program], request: PlanRequest) -> ValueError:
    """The error that names the smallest budget with which one of `programs` works."""
    found = []
    for each in programs:
        *_, options = _options(each, request)
        draft = _smallest(each, request, options)
        found.append((draft.total, options[0].tiles[draft.choice[0]]))
    total, tile = min(found)
    assert request.budget is not None
    return ValueError(
        f"memory_budget of {format_bytes(request.budget)} is too small for an image of shape "
        f"{programs[0].captured.image_shape}: the smallest that works is {format_bytes(total + 2**20)} "
        f"({total + 2**20} bytes, with tile_size={tile})"
    )


class _Options:
    """The tiles that a stage can be scanned with, the best first, and what they cost.

    With many steps along an axis the costs are estimates from the first ones; `footprint` is exact.
    """

    def __init__(self, stage: Stage, image: str, tiles: Sequence[tuple[int, int]], training: bool) -> None:
        self.tiles = tiles
        self._flows = [[value.flow(axis) for value in stage.values] for axis in (0, 1)]
        self._needs, self._training = MemoryModel(stage, image), training
        sizes = [list(dict.fromkeys(tile[axis] for tile in tiles)) for axis in (0, 1)]
        self._axes = [
            dict(zip(of, map(Axis, schedules(flows, of, GATE, _STEPS_OF_ESTIMATE)), strict=True))
            for flows, of in zip(self._flows, sizes, strict=True)
        ]
        rows, cols = (tuple(axes.values()) for axes in self._axes)
        table = estimates(self._needs, rows, cols, training)
        at = [{size: k for k, size in enumerate(of)} for of in sizes]
        self.costs = [table[at[0][height]][at[1][width]] for height, width in tiles]
        self.footprint = cache(self._footprint)

    def _footprint(self, k: int) -> Footprint:
        """The exact bytes of tile `k`."""
        rows, cols = (self._whole(axis, tile) for axis, tile in enumerate(self.tiles[k]))
        return Footprint(self._needs, rows, cols, self._training)

    def _whole(self, which: int, tile: int) -> Axis:
        axis = self._axes[which][tile]
        return axis if axis.schedule.whole else Axis(*schedules(self._flows[which], [tile], GATE))

    def sizes(self, request: PlanRequest, carries: Place) -> list[float]:
        """Memory that each tile needs beyond what depends on no tile."""
        return [_size(cost, request, carries) for cost in self.costs]


def _size(cost: Cost, request: PlanRequest, carries: Place) -> float:
    saved = cost.carries if request.training and carries == "device" else cost.row
    return saved + 2 * cost.beside + cost.step * (1 + request.heap_excess[0])


@dataclass(frozen=True)
class _Draft:
    """The number of a tile for each stage, where maps and carries live, and the bytes of everything."""

    choice: tuple[int, ...]
    maps: Place
    carries: Place
    sizes: dict[str, int]
    map_bytes: int

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def _within(
    program: Program, request: PlanRequest, options: Sequence[_Options], places: tuple[Place, Place], limit: int | None
) -> _Draft:
    """The first options of all stages; while they exceed `limit`, the largest one gives way to a smaller one."""
    at, sizes = [0] * len(options), [option.sizes(request, places[1]) for option in options]
    while True:
        draft = _draft(program, request, options, at, [o.costs[k] for o, k in zip(options, at, strict=True)], *places)
        if limit is None or draft.total <= limit:
            return draft
        for s in sorted(range(len(options)), key=lambda s: -sizes[s][at[s]]):
            smaller = (k for k in range(at[s] + 1, len(sizes[s])) if sizes[s][k] < sizes[s][at[s]])
            if (k := next(smaller, None)) is not None:
                at[s] = k
                break
        else:
            return draft


def _fitting(
    program: Program, request: PlanRequest, options: Sequence[_Options], places: tuple[Place, Place], limit: int | None
) -> _Draft | None:
    """`_within`, with exact costs; where the estimates were too low, again with less. None if nothing fits."""
    aim = limit
    for _ in range(3):
        estimate = _within(program, request, options, places, aim)
        if aim is not None and estimate.total > aim:
            break
        exact = [option.footprint(k).cost for option, k in zip(options, estimate.choice, strict=True)]
        draft = _draft(program, request, options, estimate.choice, exact, *places)
        if limit is None or aim is None or draft.total <= limit:
            return draft
        aim = int(aim * limit / draft.total * 0.98)
    return None


def _smallest(program: Program, request: PlanRequest, options: Sequence[_Options]) -> _Draft:
    """The tiles that need least, found among those that seem to, wherever maps and carries may live."""
    drafts = []
    for maps, carries in _places(request):
        choice = []
        for option in options:
            sizes = option.sizes(request, carries)
            near = sorted(range(len(sizes)), key=lambda k: sizes[k])[:_NEAR]
            choice.append(min(near, key=lambda k: _size(option.footprint(k).cost, request, carries)))
        costs = [option.footprint(k).cost for option, k in zip(options, choice, strict=True)]
        drafts.append(_draft(program, request, options, choice, costs, maps, carries))
    return min(drafts, key=lambda draft: draft.total)


def _draft(
    program: Program,
    request: PlanRequest,
    options: Sequence[_Options],
    choice: Sequence[int],
    costs: Sequence[Cost],
    maps: Place,
    carries: Place,
) -> _Draft:
    tiles = [option.tiles[k] for option, k in zip(options, choice, strict=True)]
    parts = [
        [-(-n // t) for n, t in zip(s.extent, tile, strict=True)] for s, tile in zip(program.stages, tiles, strict=True)
    ]
    # Of what is carried down, a whole row is alive, or its gradients; of what is carried to the right, a step receives one piece
    # and hands on another. Of what lies in files, the pages that a step reads and writes are in memory.
    alive, step = max(cost.row + 2 * cost.beside for cost in costs), max(cost.step for cost in costs)
    saved = 0.0
    if request.training and carries == "device":
        saved = sum(cost.carries for cost in costs)
    elif request.training:
        saved = max(cost.row / across + cost.beside for cost, (_, across) in zip(costs, parts, strict=True))
    kept, pages = program.map_bytes(request.training), 0
    if maps == "file" and kept:
        touched = [
            sum(
                stage.values[v].bytes
                for v in (*stage.inputs, *stage.stored)
                if stage.values[v].name != program.captured.image
            )
            for stage in program.stages
        ]
        pages = int((1 + request.training) * max(size / prod(of) for size, of in zip(touched, parts, strict=True)))
    sizes = {
        "weights": program.combined_bytes
        + program.cast_bytes * (1 + request.training)  # of the forward pass, and of the backward pass
        + program.weight_bytes * (request.copied_weights + request.training)
        + program.plain_weight_bytes * request.training,  # whose gradients wait for those of the stages
        "carries": int(saved + alive),
        "step": int(step),
        "recorded": 0,
        "outputs": _output_bytes(program, request, options, choice),
        "maps": kept if maps == "device" else pages,
        "plain": program.plain_bytes,
        "kernels": bytes_of_kernels(program.stages, [prod(of) for of in parts], request.training),
        "allocator": int(step * request.heap_excess[0]),
    }
    return _Draft(tuple(choice), maps, carries, sizes, kept)


def _output_bytes(program: Program, request: PlanRequest, options: Sequence[_Options], choice: Sequence[int]) -> int:
    """Return the bytes of maps that leave the program; of those that are written, what waits to be."""
    if request.written is None:
        return program.output_bytes
    fixed, per_row = request.written
    height = program.captured.image_shape[2]
    zipped = zip(options, choice, program.stages, strict=True)
    tallest = max(option.tiles[k][0] * height / stage.extent[0] for option, k, stage in zipped)
    return program.output_bytes + fixed + int(per_row * tallest)


def _finished(planner: Planner, needed: Sequence[PartialGrid | None]) -> tuple[Plan, tuple[StagePlan, ...]]:
    """The plan of what is needed, with as many steps recorded as the budget has room for, from the last one backwards.

    What the last step needs is there anyhow: it is the first in the backward pass, and without recording it would be recomputed
    in the same place. So is what the gradients of a row of carries need, which come when the first recorded steps are gone.
    """
    program, request, draft, grids = planner.program, planner.request, planner.draft, planner.grids
    footprints = [replace(found, need=need) for found, need in zip(planner.footprints, needed, strict=True)]
    sizes = _sizes_of_parts(planner, footprints)
    spare = 0 if planner.limit is None or not request.training else max(0, planner.limit - sum(sizes.values()))
    room, used, recorded = float(spare), 0.0, [0] * len(footprints)
    work = [found.work for found in footprints]
    everything = sum(sum(of.values()) for of in work)
    once = sum({name: size for of in work[::-1] for name, size in of.items()}.values())
    passes = 3 if request.training else 1  # backward takes as long as two forward
    again = passes * (everything - once)  # what later stages make again
    if request.training:
        last = footprints[-1]
        there = max(0.0, sizes["step"] - planner.footprints[-1].cost.step + float(last.recorded.max()))
        there += max(footprint.cost.row for footprint in planner.footprints)
        room = room / (1 + request.heap_excess[1]) + (there if spare else 0.0)
        for s in reversed(range(len(footprints))):
            sums = np.cumsum(_in_order(footprints[s])[::-1])
            recorded[s] = int(np.searchsorted(sums, room, side="right"))
            taken = float(sums[recorded[s] - 1]) if recorded[s] else 0.0
            room, used = (room - taken if recorded[s] == len(sums) else 0.0), used + taken
            whole = sums[-1] if len(sums) else 0.0  # nothing of the image may be wanted
            again += sum(work[s].values()) * (1 - taken / max(1.0, float(whole)))
        sizes["recorded"] = int(max(0.0, used - there))
        sizes["allocator"] += int(sizes["recorded"] * request.heap_excess[1])
    stage_plans = [
        StagePlan(footprint.need or grid, footprint.carries if request.training else {}, count)
        for grid, footprint, count in zip(grids, footprints, recorded, strict=True)
    ]
    computed, of_all = (sum(of) for of in zip(*(found.computed for found in footprints), strict=True))
    plan = Plan(
        image_shape=program.captured.image_shape,  # type: ignore[arg-type]
        tile_size=planner.tile,
        steps=sum(len(_in_order(found)) for found in footprints),
        predicted_bytes=MappingProxyType(sizes),
        predicted_overhead=1 + again / max(1.0, once * passes),
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
    for stage, grid, found in zip(program.stages, planner.grids, footprints, strict=True):
        if found.need is None:
            continue
        for v in stage.outputs:
            height, width = grid.extent(v)
            *_, rows, cols = found.need.part(v)
            saved_bytes = int(stage.values[v].bytes * (1 - rows * cols / (height * width)))
            kind = "maps" if v in stage.stored else "outputs"
            if kind == "outputs" and planner.request.written is not None:
                continue
            sizes[kind] = max(0, sizes[kind] - saved_bytes)
    return sizes


def _places(request: PlanRequest) -> Iterator[tuple[Place, Place]]:
    """Yield where maps and carries could live, the fastest first."""
    usable = [place for place in PLACES if not (place == "host" and request.device.type == "cpu")]
    for place in usable:
        yield request.maps or place, place if request.training else "device"


def _scaled(tile: tuple[int, int], stage: Stage, image: tuple[int, int]) -> tuple[int, int]:
    """A tile of the image, in positions of a stage's largest input."""
    rows, cols = (max(1, -(-t * n // whole)) for t, n, whole in zip(tile, stage.extent, image, strict=True))
    return rows, cols


def _tiles(stage: Stage, image: tuple[int, int], request: PlanRequest) -> list[tuple[int, int]]:
    """Tiles to choose from, those with about as much work as is preferred first, the wider before the taller.

    Where a part of the image is wanted, those nearest to squares come before others.
    """
    height, width = stage.extent
    pixels = PREFERRED_PIXELS.get(request.device.type, 1 << 20)
    pixels = min(pixels, max(pixels // 2, image[0] * image[1] // _SOME_STEPS))
    share = height * width / (image[0] * image[1])
    pixels = int(pixels * (share if request.divided else sqrt(share)))  # deeper maps are smaller, their weights larger
    preferred = max(32, pixels // width // 32 * 32)
    heights = sorted(
        {min(h, height) for h in (preferred, 32, 64, 128, 256, 512, 1024, 2048, 4096) if height / h < 2000}
    )
    if request.ranks > 1:  # bands of rows, for each process several
        heights = [h for h in heights if h <= max(heights[0], height // (4 * request.ranks))]
    widths = sorted({min(w, width) for w in (256, 512, 1024, 2048, 4096, width)})
    if (strides := _strides_of_windows(stage)) is not None:  # whole windows a step: nothing of them is carried
        heights, widths = (
            sorted({min(size, max(1, round(n / stride)) * stride) for n in of})
            for of, size, stride in zip((heights, widths), stage.extent, strides, strict=True)
        )
    tiles = [(h, w) for h in heights for w in widths]
    return sorted(
        tiles,
        key=lambda t: (abs(log2(t[0] * t[1] / pixels)) // 1, abs(log2(t[0] / t[1])) if request.partial else -t[1]),
    )


def _strides_of_windows(stage: Stage) -> tuple[int, int] | None:
    """Return the distances of the windows of the last `Local` in positions of a stage's largest input; None if there is none."""
    found, strides = None, list[tuple[int, int]]()
    for value in stage.values:
        before = [
            (strides[s][0] * read.rows.stride, strides[s][1] * read.cols.stride)
            for s, read in zip(value.sources, value.placed.reads if value.placed else (), strict=True)
        ]
        strides.append(max(before, default=(1, 1)))
        if value.placed is not None and value.placed.forward_bytes:
            found = strides[-1]
    return found


def usable_memory(device: torch.device) -> int:
    """Return the bytes that a scan without a budget may use."""
    return int(SHARE_OF_FREE_MEMORY * free_memory(device) / _processes(device))


def _processes(device: torch.device) -> int:
    """Return the number of processes of a distributed run that share the memory of this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if device.type == "cpu" else 1
