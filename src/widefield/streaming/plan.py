"""How a network will be streamed over an image of a given size: tile, steps and memory, known before any pixel is computed."""

import dataclasses
import os
import re
from dataclasses import dataclass
from math import isfinite, log2
from types import MappingProxyType
from typing import Any

import torch

from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.graph import Program, Stage
from widefield.streaming.grid import GATE, Grid, make_grid
from widefield.streaming.schedule import Schedule, schedule

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
    `step` for the activations of one tile, `outputs` for the maps that leave the streamed part. `streamed_fraction` is the
    share of the plain model's activation bytes that is streamed; the rest is computed whole, because of the operations `refused`.
    `stages` is the number of scans.
    """

    image_shape: tuple[int, int, int, int]
    tile_size: tuple[int, int]
    steps: int
    predicted_bytes: MappingProxyType[str, int]
    streamed_fraction: float
    stages: int = 1
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
            ("streamed", f"{self.streamed_fraction:.1%} of the activation bytes"),
        ]
        return "\n".join(f"{name:<18}{text}" for name, text in rows)

    def __reduce__(self) -> Any:
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return _restore, tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in fields)


def _restore(*fields: Any) -> Plan:
    return Plan(*[MappingProxyType(value) if isinstance(value, dict) else value for value in fields])


def make_plan(
    program: Program, tile: tuple[int, int | None] | None, budget: int | None, device: torch.device
) -> tuple[Plan, Grid]:
    """Plan with the given `tile` (None as its width: the whole width), or derive one from `budget` bytes or the free memory.

    Raises ValueError when the budget is too small for any tile, naming the smallest that would do.
    """
    height, width = program.captured.image_shape[2:]
    if tile is not None:
        grid = make_grid(program.stage, (min(tile[0], height), min(tile[1] or width, width)))
        return _plan(program, grid.row_schedule, grid.col_schedule, grid.tile), grid
    limit = budget if budget is not None else int(SHARE_OF_FREE_MEMORY * free_memory(device))
    plans = _candidates(program, PREFERRED_PIXELS.get(device.type, 1 << 20))
    fitting = [plan for plan in plans if plan.total_bytes <= limit]
    smallest = min(plans, key=lambda plan: plan.total_bytes)
    if not fitting and budget is not None:
        raise ValueError(
            f"memory_budget of {format_bytes(budget)} is too small for an image of shape {program.captured.image_shape}: "
            f"the smallest that works is about {format_bytes(smallest.total_bytes)} (with tile_size={smallest.tile_size})"
        )
    plan = fitting[0] if fitting else smallest  # nothing fits the share of the free memory: try with what needs least
    return plan, make_grid(program.stage, plan.tile_size)


def _candidates(program: Program, pixels: int) -> list[Plan]:
    """Plans to choose from, those with about `pixels` a tile first, the wider before the taller."""
    height, width = program.captured.image_shape[2:]
    preferred = max(32, pixels // width // 32 * 32)
    heights = sorted(
        {min(h, height) for h in (preferred, 32, 64, 128, 256, 512, 1024, 2048, 4096) if height / h < 2000}
    )
    widths = sorted({min(w, width) for w in (256, 512, 1024, 2048, 4096, width)})
    flows = [[value.flow(axis) for value in program.stage.values] for axis in (0, 1)]
    rows = {h: schedule(flows[0], h, GATE) for h in heights}
    cols = {w: schedule(flows[1], w, GATE) for w in widths}
    tiles = sorted(
        ((h, w) for h in heights for w in widths), key=lambda t: (abs(log2(t[0] * t[1] / pixels)) // 1, -t[1])
    )
    return [_plan(program, rows[h], cols[w], (h, w)) for h, w in tiles]


def _plan(program: Program, rows: Schedule, cols: Schedule, tile: tuple[int, int]) -> Plan:
    stage = program.stage
    i, j = _largest(stage, rows), _largest(stage, cols)
    carries = step = outputs = 0
    for v, value in enumerate(stage.values):
        carries += value.pixel_bytes * _carried(rows, cols, v)
        new = _new(rows, v, i) * _new(cols, v, j)
        held = (rows.ready[v][i] - rows.kept[v][i - 1]) * (cols.ready[v][j] - cols.kept[v][j - 1])
        step += value.pixel_bytes * ((0 if value.view else new) + (held if held > new else 0))
        outputs += value.pixel_bytes * rows.ready[v][-1] * cols.ready[v][-1] if v in stage.outputs else 0
    sizes = MappingProxyType({"carries": carries, "step": step, "outputs": outputs})
    shape = program.captured.image_shape
    return Plan(shape, tile, rows.steps * cols.steps, sizes, program.streamed_fraction, 1, program.refused)  # type: ignore[arg-type]


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
