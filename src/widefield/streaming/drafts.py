"""Tiles for each stage, places for maps and carries, and what they need in memory: drafts of a plan that fit a limit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import log2, prod, sqrt
from typing import NamedTuple

import torch

from widefield.streaming.grid import GATE
from widefield.streaming.memory import Axis, Cost, Footprint, estimates
from widefield.streaming.memory_model import MemoryModel, bytes_of_kernels
from widefield.streaming.program import Program, Stage
from widefield.streaming.schedule import schedules
from widefield.streaming.store import PLACES, Place

# A step of a pass with gradients should have about this many pixels of the image: enough to pay for reading the weights, few enough
# for the cache. Of a small image half as many, so that there are some steps, of which some are recorded. Without gradients a pass
# keeps little, and operations are shorter: twice as many.
PREFERRED_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 23}
_SOME_STEPS = 8
_NEAR = 8  # tiles whose exact size is looked at, for the smallest budget that works
_STEPS_OF_ESTIMATE = 128  # along an axis: enough for the deepest layers to have begun
# What the C library's heap holds beyond what is in use, relative to the largest step (of a network of one stage, of several),
# and to what is recorded; measured, see docs/benchmarks.md. On CUDA, PyTorch's own allocator reuses blocks.
_HEAP_EXCESS = (0.4, 0.6, 0.1)


class WrittenBytes(NamedTuple):
    """Bytes that written maps need more than whole ones (less: negative), in all and for each row of the image in a row of tiles.

    `replaced` are the names of those that are kept nowhere else.
    """

    fixed: int
    per_row: float
    replaced: frozenset[str]


@dataclass(frozen=True)
class PlanRequest:
    """All that a plan has to heed.

    `tile`: (height, None) is a strip of the whole width. `budget` in bytes. `training`: gradients are wanted. `maps`: where maps
    between stages must live. `copied_weights`: bytes of those that are copied into another memory format. `stages`: how many the
    program has. `partial`: a part of the image is wanted, so that tiles are as high as wide. `limit`: bytes to
    be used where there is no budget; None: a share of what is free. `ranks`: so many processes share the image. `written`: maps are
    written to a sink. `divided`: the stages are parts of one, with its kind of steps, which they take for their parts of the image.
    """

    tile: tuple[int, int | None] | None
    budget: int | None
    device: torch.device
    maps: Place | None
    training: bool
    copied_weights: int
    stages: int
    partial: bool = False
    limit: int | None = None
    ranks: int = 1
    written: WrittenBytes | None = None
    divided: bool = False

    @property
    def heap_excess(self) -> tuple[float, float]:
        """Relative to the largest step, and to what is recorded."""
        if self.device.type != "cpu":
            return 0.0, 0.0
        one, several, recorded = _HEAP_EXCESS
        return one if self.stages == 1 else several, recorded


class TileOptions:
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
class Draft:
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
    program: Program,
    request: PlanRequest,
    options: Sequence[TileOptions],
    places: tuple[Place, Place],
    limit: int | None,
) -> Draft:
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


def fitting(
    program: Program,
    request: PlanRequest,
    options: Sequence[TileOptions],
    places: tuple[Place, Place],
    limit: int | None,
) -> Draft | None:
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


def smallest(program: Program, request: PlanRequest, options: Sequence[TileOptions]) -> Draft:
    """The tiles that need least, found among those that seem to, wherever maps and carries may live."""
    drafts = []
    for maps, carries in places_of(request):
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
    options: Sequence[TileOptions],
    choice: Sequence[int],
    costs: Sequence[Cost],
    maps: Place,
    carries: Place,
) -> Draft:
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
    repeated = program.repeated_weight_bytes  # each stage has a copy, and gradients that wait to be added
    copies = 1 + request.training * sum(repeated) / max(1, program.weight_bytes)
    sizes = {
        "weights": program.combined_bytes
        + program.cast_bytes * (1 + request.training)  # of the forward pass, and of the backward pass
        + (program.weight_bytes + max(repeated, default=0)) * request.training
        + int(request.copied_weights * copies)
        + program.plain_weight_bytes * request.training,  # whose gradients wait for those of the stages
        "carries": int(saved + alive),
        "step": int(step),
        "recorded": 0,
        "outputs": _output_bytes(program, request, options, choice) + program.read_output_bytes * request.training,
        "maps": kept if maps == "device" else pages,
        "plain": program.plain_bytes,
        "kernels": bytes_of_kernels(program.stages, [prod(of) for of in parts], request.training),
        "allocator": int(step * request.heap_excess[0]),
    }
    return Draft(tuple(choice), maps, carries, sizes, kept)


def _output_bytes(program: Program, request: PlanRequest, options: Sequence[TileOptions], choice: Sequence[int]) -> int:
    """Return the bytes of maps that leave the program; of those that are written, what waits to be."""
    if request.written is None:
        return program.output_bytes
    fixed, per_row, _ = request.written
    height = program.captured.image_shape[2]
    zipped = zip(options, choice, program.stages, strict=True)
    tallest = max(option.tiles[k][0] * height / stage.extent[0] for option, k, stage in zipped)
    return program.output_bytes + fixed + int(per_row * tallest)


def places_of(request: PlanRequest) -> Iterator[tuple[Place, Place]]:
    """Yield where maps and carries could live, the fastest first."""
    usable = [place for place in PLACES if not (place == "host" and request.device.type == "cpu")]
    for place in usable:
        yield request.maps or place, place if request.training else "device"


def scaled(tile: tuple[int, int], stage: Stage, image: tuple[int, int]) -> tuple[int, int]:
    """A tile of the image, in positions of a stage's largest input."""
    rows, cols = (max(1, -(-t * n // whole)) for t, n, whole in zip(tile, stage.extent, image, strict=True))
    return rows, cols


def tiles_of(stage: Stage, image: tuple[int, int], request: PlanRequest) -> list[tuple[int, int]]:
    """Tiles to choose from, those with about as much work as is preferred first, the wider before the taller.

    Where a part of the image is wanted, those nearest to squares come before others.
    """
    height, width = stage.extent
    pixels = PREFERRED_PIXELS.get(request.device.type, 1 << 20)
    times = 1 if request.training else 2
    pixels = min(times * pixels, max(pixels // 2, times * image[0] * image[1] // _SOME_STEPS))
    share = height * width / (image[0] * image[1])
    share = share if request.divided else sqrt(share)  # deeper maps are smaller, their weights larger
    pixels = max(1, int(pixels * share))
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
