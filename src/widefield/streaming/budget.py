"""Tile sizes and memory as users write them, as numbers."""

import os
import re
from math import isfinite
from numbers import Integral
from typing import Any

import torch

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
    """`tile_size` as (height, width): from None, an int, a pair, (height, None) for full-width strips, or the shape of a tile
    (1, channels, height, width). Raises ValueError.
    """
    if value is None:
        return None
    pair = (value, value) if isinstance(value, Integral) and not isinstance(value, bool) else value
    if isinstance(pair, (tuple, list)) and len(pair) == 4 and pair[0] == 1:
        pair = pair[2:]
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        height, width = pair
        if _positive(height) and (width is None or _positive(width)):
            return int(height), None if width is None else int(width)
    raise ValueError(
        f"tile_size={value!r} must be a positive int, (height, width), or (height, None) for strips over the whole width, in pixels"
    )


def _positive(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


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
