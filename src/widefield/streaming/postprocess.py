"""Steps between a tile of a result and the file: functions of single positions, and the type that is stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHANNELS = -3


def _argmax(tile: Tensor) -> Tensor:
    return tile.argmax(_CHANNELS).to(torch.uint8 if tile.shape[_CHANNELS] <= 256 else torch.int32)


def _softmax(tile: Tensor) -> Tensor:
    return tile.softmax(_CHANNELS)


def _uint8(tile: Tensor) -> Tensor:
    return (tile.float().nan_to_num(nan=0.0) * 255).round().clamp(0, 255).to(torch.uint8)


_NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": _argmax,
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "uint8": _uint8,
}


@dataclass(frozen=True)
class Postprocess:
    """The `steps` that a tile (..., height, width) goes through, and what comes out.

    Attributes:
        steps: Functions of tiles, one after the other.
        leading: The shape of a map that was processed, but for its height and width.
        dtype: The type in which it is stored.
        labels: True if it holds whole numbers which name something.
    """

    steps: tuple[Callable[[Tensor], Tensor], ...]
    leading: tuple[int, ...]
    dtype: np.dtype
    labels: bool

    @staticmethod
    def of(asked: Any, dtype: Any, shape: Sequence[int], made: torch.dtype, device: torch.device) -> "Postprocess":
        """Check what a user asked for, on random tiles of a map of `shape` (..., height, width) and dtype `made`.

        Raises:
            ValueError: a step is none, changes height and width, or is no function of single positions; there is no such dtype.
        """
        listed = asked if isinstance(asked, (list, tuple)) else [] if asked is None else [asked]
        steps = tuple(map(_step, listed))
        if len(shape) < 3 and {"argmax", "softmax"} & {one for one in listed if isinstance(one, str)}:
            raise ValueError(f"postprocess={asked!r} is over channels, which a map of shape {tuple(shape)} has not")
        generator = torch.Generator("cpu").manual_seed(0)
        random = torch.rand((*shape[:-2], 4, 6), generator=generator, device="cpu") * 4 - 2
        tile = random.to(device, made) if made.is_floating_point else random.abs().to(device, made)
        found = Postprocess(steps, (), np.dtype(np.float32), False)(tile)
        if not isinstance(found, Tensor) or tuple(found.shape[-2:]) != (4, 6):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"postprocess must give a tensor (..., height, width) for one: of a tile {tuple(tile.shape)} it made {got}"
            )
        process = Postprocess(steps, tuple(found.shape[:-2]), np.dtype(np.float32), False)
        parts = torch.cat([torch.cat([process(x) for x in row.split(2, -1)], -1) for row in tile.split(2, -2)], -2)
        near = 64 * max(torch.finfo(x).eps if x.is_floating_point else 0.0 for x in (made, found.dtype))
        if parts.shape != found.shape or not torch.allclose(parts.double(), found.double(), near, near, equal_nan=True):
            raise ValueError(
                "postprocess must be a function of each position alone, and its results on parts of a tile are not the parts of "
                "its result: leave out what looks at neighbours, or at the whole (a mean, a maximum over height and width)"
            )
        labels = not found.is_floating_point() and not (listed and listed[-1] == "uint8")
        if dtype is None and listed and listed[-1] == "argmax" and found.dtype == torch.int32:
            classes = Postprocess(steps[:-1], (), np.dtype(np.float32), False)(tile).shape[_CHANNELS]
            dtype = np.uint16 if classes <= 2**16 else None  # which PyTorch stores, but hardly computes with
        return Postprocess(steps, process.leading, _stored(dtype, found.dtype), labels)

    def __call__(self, tile: Tensor) -> Tensor:
        for step in self.steps:
            tile = step(tile)
        return tile

    def cast(self, tile: Tensor) -> Tensor:
        """Return a tile in the type that is stored. To whole numbers, others are rounded, and cut to the range of the type."""
        target = _torch_dtype(self.dtype)
        if tile.dtype == target:
            return tile
        if not target.is_floating_point and target != torch.bool:
            limits = np.iinfo(self.dtype)
            # Types that hold the limits: older versions of PyTorch clamp to none that the tile's own type cannot hold.
            tile = tile.double().nan_to_num(nan=0.0).round() if tile.is_floating_point() else tile.to(torch.int64)
            tile = tile.clamp(max(limits.min, -(2**63)), min(limits.max, 2**63 - 1024))
        return tile.to(target)


def _step(asked: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(asked, str) and asked in _NAMED:
        return _NAMED[asked]
    if isinstance(asked, Real) and not isinstance(asked, bool):
        return lambda tile: (tile > float(asked)).to(torch.uint8)
    if not isinstance(asked, str) and callable(asked):
        return asked  # type: ignore[no-any-return]
    raise ValueError(
        f"postprocess={asked!r} must be one of {', '.join(map(repr, _NAMED))}; a number, above which values become 1 and others 0; "
        "a function of a tile (..., height, width); or a list of these"
    )


def _stored(asked: Any, made: torch.dtype) -> np.dtype:
    """The type in which a map is stored: what the user `asked` for, or as it was `made`, if NumPy and image files have it."""
    if asked is None:
        replaced = {torch.bfloat16: torch.float32, torch.bool: torch.uint8}
        return _numpy_dtype(replaced.get(made, made))
    try:
        dtype = _numpy_dtype(asked) if isinstance(asked, torch.dtype) else np.dtype(asked)
        known = _torch_dtype(dtype)
    except TypeError as error:
        raise ValueError(f"dtype={asked!r} must be a type of real or whole numbers, as 'uint8' or 'float32'") from error
    if known.is_complex:
        raise ValueError(f"dtype={asked!r} must be a type of real or whole numbers, as 'uint8' or 'float32'")
    return dtype


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
