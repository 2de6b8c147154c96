"""Arrays as images: in memory, in `.npy` and PNM files, or anywhere uncompressed in a file, read through a memory map."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedRandom
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from widefield.errors import WrongArgumentError
from widefield.images.formats import (
    ChannelAxis,
    Choice,
    Contents,
    PerProcess,
    Pixels,
    cannot_read,
    check_reaches,
    image_format,
    one_image,
)

MAX_CHANNELS = 32
"""An axis longer than this is not taken for the channels unless the caller says so."""


@dataclass(frozen=True)
class ArrayPixels:
    """An array of any axes, in memory (or a view of one in a file, if it is a `MappedArray`).

    Examples:
        >>> ArrayPixels(np.zeros((5, 100, 80, 3)), "ZYXC", at=(2,)).shape
        (3, 100, 80)
    """

    array: Any
    """A NumPy array, or what has `shape`, `dtype` and is indexed like one."""
    axes: str
    """A letter an axis: C, Y and X in any order, C may lack; others are held at one position."""
    at: tuple[int, ...] = ()
    """Position on each axis that is none of C, Y and X, in their order."""

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        size = dict(zip(self.axes, self.array.shape, strict=True))
        return size.get("C", 1), size["Y"], size["X"]

    @cached_property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order; uint8 of truth values."""
        dtype = np.dtype(self.array.dtype)
        return np.dtype("u1") if dtype.kind == "b" else dtype.newbyteorder("=")

    @cached_property
    def _layout(self) -> tuple[list[Any], list[int | None], list[int]]:
        """The index of a plane, the places in it of C, Y and X, and their order in what it gives."""
        rest = iter(self.at)
        index = [slice(None) if axis in "CYX" else next(rest) for axis in self.axes]
        kept = [axis for axis in self.axes if axis in "CYX"]
        places = [self.axes.index(axis) if axis in kept else None for axis in "CYX"]
        return index, places, [kept.index(axis) for axis in "CYX" if axis in kept]

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width), a copy."""
        plane, (channel, row, column), order = self._layout
        index, first, last = plane.copy(), min(channels), max(channels)
        if channel is not None:
            index[channel] = slice(first, last + 1)
        index[row], index[column] = slice(y, y + height), slice(x, x + width)  # type: ignore[index]
        pixels = np.asarray(self.array[tuple(index)]).transpose(order)
        if channel is None:
            pixels = pixels[None]
        if len(channels) != last + 1 - first or list(channels) != list(range(first, last + 1)):
            pixels = pixels[[channel - first for channel in channels]]
        return np.array(pixels, self.dtype)


@dataclass(frozen=True)
class MappedArray:
    """An array in a file; what is taken of it is a view of the file.

    The map of a large file is made anew when the reads through it have touched more than `TOUCHED_BYTES`: the pages of a lasting
    one count as resident memory, so that a pass over the image would seem (to a container's limit, too) to hold all of it. It is
    made anew, too, when the file was written in the meantime: a process that reads a map beyond the end of its file is ended.
    """

    file: Path | BufferedRandom
    offset: int
    """Bytes before the first element."""
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None
    """Bytes from one element to the next on each axis; None if they lie one behind the other, the last axis fastest."""
    _mapped: list[Any] = field(default_factory=list, repr=False, compare=False)
    """The array over the map, the state of the file when it was made, and the bytes that were touched; empty at first."""

    def __getitem__(self, index: Any) -> np.ndarray:
        now = os.stat(self.file) if isinstance(self.file, Path) else os.fstat(self.file.fileno())  # noqa: PTH116 - faster
        state = now.st_ino, now.st_size, now.st_mtime_ns
        array, known, touched = self._mapped or (None, None, 0)
        if array is None or known != state or touched > TOUCHED_BYTES:
            array, touched = self._map(), 0
        view: np.ndarray = array[index]
        if now.st_size > KEPT_BYTES:
            touched += _touched_bytes(view)
        self._mapped[:] = [array, state, touched]
        return view

    def _map(self) -> np.ndarray:
        if isinstance(self.file, Path):
            with self.file.open("rb", buffering=0) as file:
                mapped = mmap(file.fileno(), 0, access=ACCESS_READ)
        else:
            mapped = mmap(self.file.fileno(), 0, access=ACCESS_READ)
        # faster than np.memmap by half for a small region
        return np.ndarray(self.shape, self.dtype, mapped, self.offset, self.strides)


KEPT_BYTES = 64 * 2**20
"""The map of a file that is no larger is kept."""

TOUCHED_BYTES = 16 * 2**20
"""Bytes of a larger file that a map of it may hold in memory."""

_FAULT_BYTES = 2**16
"""Bytes that Linux maps around a page that is touched."""


def _touched_bytes(view: np.ndarray) -> int:
    """At most so many bytes become resident when `view` is read."""
    size = view.itemsize
    for stride, count in sorted(zip(map(abs, view.strides), view.shape)):
        size = size + stride * (count - 1) if stride - size <= _FAULT_BYTES else count * (size + _FAULT_BYTES)
    return size


@dataclass(frozen=True)
class _StackedPixels:
    """Channels that lie one behind the other in several parts of the same size."""

    parts: tuple[Pixels, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order."""
        return self.parts[0].dtype

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width); parts without one of the channels are not read."""
        pixels, first = np.empty((len(channels), height, width), self.dtype), 0
        for part in self.parts:
            wanted = [(i, c - first) for i, c in enumerate(channels) if first <= c < first + part.shape[0]]
            if wanted:
                targets, sources = zip(*wanted, strict=True)
                pixels[list(targets)] = part.read(y, x, height, width, sources)
            first += part.shape[0]
        return pixels


def stacked(parts: Sequence[Pixels]) -> Pixels:
    """Return the pixels of several parts of one size as the channels of an image."""
    return parts[0] if len(parts) == 1 else _StackedPixels(tuple(parts))


@dataclass(frozen=True)
class DeferredArray:
    """An array that each process opens, or decodes, when it is first indexed."""

    opened: PerProcess
    """Gives something that is indexed like an array."""
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.opened.get()[index])


@image_format(
    "npy", endings=(".npy",), recognises=lambda path, start: start.startswith(b"\x93NUMPY"), takes_channel_axis=True
)
def open_npy(path: Path, choice: Choice) -> Contents:
    """Open a `.npy` file of shape (H, W), (H, W, C) or (C, H, W)."""
    array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    return of_array(path, MappedArray(path, array.offset, array.shape, array.dtype, array.strides), choice)


def of_array(what: object, array: Any, choice: Choice) -> Contents:
    """The image in an array of shape (H, W), (H, W, C) or (C, H, W), which `what` names in messages."""
    pixels = ArrayPixels(array, check_array(what, array.shape, array.dtype, choice.channel_axis))
    return one_image(what, choice, pixels)


_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM = re.compile(rb"P(?:([14])%b(\d+)%b(\d+)|([2356])%b(\d+)%b(\d+)%b(\d+))\s" % ((_GAP,) * 5))
"""The header of a PNM file: its kind, width and height, and but for bits the greatest value."""


@image_format(
    "PNM",
    endings=(".pbm", ".pgm", ".ppm", ".pnm"),
    recognises=lambda path, start: bool(re.match(rb"P[1-6][\s#]", start)),
)
def open_pnm(path: Path, choice: Choice) -> Contents:
    """Open a PBM, PGM or PPM file. Values are as stored; bits are 0 for black and 1 for white."""
    with path.open("rb") as file:
        header = _PNM.match(file.read(2**16))
    if header is None:
        raise cannot_read(path, "its PNM header is damaged")
    kind, width, height, greatest = (int(part) for part in (*(part for part in header.groups() if part), b"1")[:4])
    if not 0 < greatest < 65536 or not width or not height:
        raise cannot_read(path, f"it has {width}x{height} pixels of values up to {greatest}; expected 1 to 65535")
    shape = (height, width, 3 if kind in (3, 6) else 1)
    dtype = np.dtype("u1" if greatest < 256 else ">u2")
    array: Any
    if kind in (5, 6):
        array = MappedArray(path, header.end(), shape, dtype)
        check_reaches(path, path.stat().st_size, header.end() + math.prod(shape) * dtype.itemsize)
    else:
        array = _few_pixels(path, path.read_bytes()[header.end() :], kind, shape).astype(dtype)
    return one_image(path, choice, ArrayPixels(array, "YXC"))


def _few_pixels(path: Path, data: bytes, kind: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Pixels that are written as text, or as packed bits."""
    height, width, _ = shape
    if kind == 4:
        rows = np.frombuffer(data, np.uint8, height * -(-width // 8)).reshape(height, -1)
        return 1 - np.unpackbits(rows, axis=1, count=width)[..., None]
    text = re.sub(rb"#[^\r\n]*", b"", data)
    values = np.array(re.findall(rb"[01]", text) if kind == 1 else text.split(), dtype=np.int64)[: math.prod(shape)]
    return (1 - values if kind == 1 else values).reshape(shape)


def check_array(what: object, shape: tuple[int, ...], dtype: np.dtype, channel_axis: ChannelAxis | None) -> str:
    """The axes of an image in an array, "YX", "YXC" or "CYX".

    Raises:
        ImageReadError: It is no image.
        ValueError: Either axis could be that of the channels, and `channel_axis` does not say which.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        raise cannot_read(
            what, f"an array of shape {tuple(shape)} is no image; expected (H, W), (H, W, C) or (C, H, W)"
        )
    if dtype.kind not in "uifb":
        raise cannot_read(what, f"its type is {dtype}; expected integers or floats, so convert it with astype")
    if len(shape) == 2:
        return "YX"
    if channel_axis is not None:
        return "YXC" if channel_axis == "last" else "CYX"
    if shape[0] == shape[2] or min(shape[0], shape[2]) > MAX_CHANNELS:
        raise WrongArgumentError(
            f"the shape {tuple(shape)} of {what} does not tell which axis the channels are; "
            'pass channel_axis="first" for (C, H, W) or channel_axis="last" for (H, W, C)'
        )
    return "YXC" if shape[2] < shape[0] else "CYX"
