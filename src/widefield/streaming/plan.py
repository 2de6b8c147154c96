"""How a network will be streamed over an image of a given size: tile, steps and memory, known before any pixel is computed."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log2, sqrt
from types import MappingProxyType
from typing import Any

import torch

from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.graph import Program, Stage
from widefield.streaming.grid import GATE, Grid, make_grid
from widefield.streaming.schedule import Schedule, schedule
from widefield.streaming.store import PLACES, Place

# A step should have about this many pixels of the image: enough to pay for reading the weights, few enough for the cache.
PREFERRED_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 23}
SHARE_OF_FREE_MEMORY = 0.5
_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


@dataclass(frozen=True)
class Plan:
    """A streamed pass over an image of `image_shape` (N, C, H, W).

    `tile_size` is (height, width) in pixels, `steps` the number of tiles scanned (those that drain the network included).
    `predicted_bytes` of a training step, above the weights, their gradients and the image: `carries` saved between tiles,
    `step` for the activations of one tile, `outputs` for the maps that leave the streamed part, `maps` for those between stages,
    `plain` for what operations outside of the scans make.
    `streamed_fraction` is the share of the plain model's activation bytes that is streamed; the rest is computed whole, because
    of the operations `refused`. `stages` is the number of scans; `map_bytes` is what the maps between them need, gradients
    included, and `map_place` where they live: only on the device do they count as memory.
    """

    image_shape: tuple[int, int, int, int]
    tile_size: tuple[int, int]
    steps: int
    predicted_bytes: MappingProxyType[str, int]
    streamed_fraction: float
    stages: int = 1
    map_bytes: int = 0
    map_place: Place = "device"
    refused: tuple[UnsupportedOpError, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Sum of `predicted_bytes`."""
        return sum(self.predicted_bytes.values())

    def __str__(self) -> str:
        rows = [
            ("image", " x ".join(map(str, self.image_shape))),
            ("tile", f"{self.tile_size[0]} x {self.tile_size[1]}"),
            ("steps", str(self.steps)),
            *((f"memory: {kind}", format_bytes(size)) for kind, size in self.predicted_bytes.items()),
            ("memory: total", format_bytes(self.total_bytes)),
            ("stages", str(self.stages)),
            *([("maps", f"{format_bytes(self.map_bytes)} between stages: {self.map_place}")] if self.map_bytes else []),
            ("streamed", f"{self.streamed_fraction:.1%} of the activation bytes"),
        ]
        return "\n".join(f"{name:<18}{text}" for name, text in rows)

    def __reduce__(self) -> Any:
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return _restore, tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in fields)


def _restore(*fields: Any) -> Plan:
    values: list[Any] = [MappingProxyType(value) if isinstance(value, dict) else value for value in fields]
    return Plan(*values)


def make_plan(
    program: Program, tile: tuple[int, int | None] | None, budget: int | None, device: torch.device, maps: Place | None
) -> tuple[Plan, tuple[Grid, ...]]:
    """Plan with the given `tile` (None as its width: the whole width), or derive one from `budget` bytes or the free memory.

    Raises ValueError when the budget is too small for any tile, naming the smallest that would do.
    """
    height, width = program.captured.image_shape[2:]
    if tile is not None:
        wish = (min(tile[0], height), min(tile[1] or width, width))
        choice = [_cost(stage, [_scaled(wish, stage, (height, width))])[0] for stage in program.stages]
        return _plan(program, wish, choice, maps or "device"), _grids(program, choice)
    limit = budget if budget is not None else int(SHARE_OF_FREE_MEMORY * free_memory(device))
    costs = [
        _candidates(stage, (height, width), PREFERRED_PIXELS.get(device.type, 1 << 20)) for stage in program.stages
    ]
    smallest: Plan | None = None
    for place in PLACES if maps is None else (maps,):
        if place == "host" and device.type == "cpu":
            continue
        choice, plan = _within(program, costs, place, limit)
        if plan.total_bytes <= limit:
            break
        if smallest is None or plan.total_bytes < smallest.total_bytes:
            smallest = plan
    else:
        assert smallest is not None
        if budget is not None:
            raise ValueError(
                f"memory_budget of {format_bytes(budget)} is too small for an image of shape {program.captured.image_shape}: "
                f"the smallest that works is about {format_bytes(smallest.total_bytes)} (with tile_size={smallest.tile_size})"
            )
        # Nothing fits the share of the free memory: try with what needs least.
    return plan, _grids(program, choice)


@dataclass(frozen=True)
class _Cost:
    """A tile of a stage and what it costs: bytes of all carries, and of one step."""

    tile: tuple[int, int]
    carries: int
    step: int
    steps: int


def _within(program: Program, costs: Sequence[Sequence[_Cost]], place: Place, limit: int) -> tuple[list[_Cost], Plan]:
    """The first candidates of all stages; while they exceed `limit`, the largest one gives way to a smaller one."""
    at = [0] * len(costs)
    while True:
        choice = [candidates[k] for candidates, k in zip(costs, at, strict=True)]
        plan = _plan(program, choice[0].tile, choice, place)
        if plan.total_bytes <= limit:
            return choice, plan
        for s in sorted(range(len(costs)), key=lambda s: -(choice[s].carries + choice[s].step)):
            size = choice[s].carries + choice[s].step
            smaller = (k for k in range(at[s] + 1, len(costs[s])) if costs[s][k].carries + costs[s][k].step < size)
            if (k := next(smaller, None)) is not None:
                at[s] = k
                break
        else:
            return choice, plan


def _scaled(tile: tuple[int, int], stage: Stage, image: tuple[int, int]) -> tuple[int, int]:
    """A tile of the image, in positions of a stage's largest input."""
    rows, cols = (max(1, -(-t * n // whole)) for t, n, whole in zip(tile, stage.extent, image, strict=True))
    return rows, cols


def _grids(program: Program, choice: Sequence[_Cost]) -> tuple[Grid, ...]:
    return tuple(make_grid(stage, cost.tile) for stage, cost in zip(program.stages, choice, strict=True))


def _candidates(stage: Stage, image: tuple[int, int], pixels: int) -> list[_Cost]:
    """Tiles to choose from, those with about as much work as `pixels` of the image first, the wider before the taller."""
    height, width = stage.extent
    pixels = int(pixels * sqrt(height * width / (image[0] * image[1])))  # deeper maps are smaller, their weights larger
    preferred = max(32, pixels // width // 32 * 32)
    heights = sorted(
        {min(h, height) for h in (preferred, 32, 64, 128, 256, 512, 1024, 2048, 4096) if height / h < 2000}
    )
    widths = sorted({min(w, width) for w in (256, 512, 1024, 2048, 4096, width)})
    tiles = ((h, w) for h in heights for w in widths)
    return _cost(stage, sorted(tiles, key=lambda t: (abs(log2(t[0] * t[1] / pixels)) // 1, -t[1])))


def _cost(stage: Stage, tiles: Sequence[tuple[int, int]]) -> list[_Cost]:
    flows = [[value.flow(axis) for value in stage.values] for axis in (0, 1)]
    rows = {h: schedule(flows[0], h, GATE) for h in {h for h, _ in tiles}}
    cols = {w: schedule(flows[1], w, GATE) for w in {w for _, w in tiles}}
    return [_Cost((h, w), *_bytes_of(stage, rows[h], cols[w]), rows[h].steps * cols[w].steps) for h, w in tiles]


def _bytes_of(stage: Stage, rows: Schedule, cols: Schedule) -> tuple[int, int]:
    """Bytes of all carries of a pass, and of the activations of its largest step."""
    i, j = _largest(stage, rows), _largest(stage, cols)
    carries = step = 0
    for v, value in enumerate(stage.values):
        carries += value.pixel_bytes * _carried(rows, cols, v)
        new = _new(rows, v, i) * _new(cols, v, j)
        held = (rows.ready[v][i] - rows.kept[v][i - 1]) * (cols.ready[v][j] - cols.kept[v][j - 1])
        step += value.pixel_bytes * ((0 if value.view else new) + (held if held > new else 0))
    return carries, step


def _plan(program: Program, tile: tuple[int, int], choice: Sequence[_Cost], place: Place) -> Plan:
    kept = [sum(stage.values[v].bytes for v in stage.stored) for stage in program.stages]
    given = {program.captured.image, *program.spread}  # the image and weights: they and their gradients do not count
    read = [
        sum(stage.values[v].bytes for v in stage.inputs if stage.values[v].name not in given)
        for stage in program.stages
    ]
    outputs = [sum(stage.values[v].bytes for v in stage.outputs if v not in stage.stored) for stage in program.stages]
    gradients = max(kept[k] + read[k] for k in range(len(kept))) if len(kept) > 1 else 0
    map_bytes = sum(kept) + gradients
    sizes = {
        "carries": sum(cost.carries for cost in choice),
        "step": max(cost.step for cost in choice),
        "outputs": sum(outputs),
        "maps": map_bytes if place == "device" else 0,
        "plain": program.plain_bytes,
    }
    return Plan(
        program.captured.image_shape,  # type: ignore[arg-type]
        tile,
        sum(cost.steps for cost in choice),
        MappingProxyType(sizes),
        program.streamed_fraction,
        len(program.stages),
        map_bytes,
        place,
        program.refused,
    )


def _carried(rows: Schedule, cols: Schedule, v: int) -> int:
    """Positions of map v in all carries of a pass: pieces above cover the width, pieces to the left the rows held."""
    above = sum(r - k for r, k in zip(rows.ready[v], rows.kept[v], strict=True)) * cols.ready[v][-1]
    held = sum(r - k for r, k in zip(rows.ready[v][1:], rows.kept[v], strict=False))
    beside = sum(r - k for r, k in zip(cols.ready[v], cols.kept[v], strict=True))
    return above + held * beside


def _new(plan: Schedule, v: int, t: int) -> int:
    """Positions of map v that step t computes."""
    return plan.ready[v][t] - plan.ready[v][t - 1]


def _largest(stage: Stage, plan: Schedule) -> int:
    """The step along an axis that computes most."""
    return max(
        range(1, plan.steps + 1),
        key=lambda t: sum(value.pixel_bytes * _new(plan, v, t) for v, value in enumerate(stage.values)),
    )


def parse_bytes(value: Any) -> int | None:
    """`memory_budget` as a number of bytes: None, an int, or text such as "6GiB", "500 MB". Raises ValueError."""
    if value is None:
        return None
    number, unit = value, ""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", value.lower())
        if not match:
            raise ValueError(f"memory_budget={value!r} is not a size: give bytes, or text such as '6GiB' or '500MB'")
        number, unit = float(match[1]), match[2]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not isfinite(number) or number <= 0:
        raise ValueError(f"memory_budget={value!r} must be a positive number of bytes, or text such as '6GiB'")
    return int(number * _UNITS[unit])


def parse_tile_size(value: Any) -> tuple[int, int | None] | None:
    """`tile_size` as (height, width): from None, an int, a pair, or (height, None) for full-width strips. Raises ValueError."""
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        height, width = pair
        if _positive(height) and (width is None or _positive(width)):
            return int(height), None if width is None else int(width)
    raise ValueError(
        f"tile_size={value!r} must be a positive int, (height, width), or (height, None) for strips over the whole width, in pixels"
    )


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def format_bytes(size: int) -> str:
    """`size` in the binary unit that fits: "1.5 GiB"."""
    number = float(size)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; 4 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30
