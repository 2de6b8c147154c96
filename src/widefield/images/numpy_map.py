"""Arrays that lie uncompressed in a file, read through a memory map: `.npy`, and what has been decoded to a file."""

from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Literal

import numpy as np

from widefield.images.pixel_source import OpenedLevel, cannot_read, check_level

MAX_CHANNELS = 32
"""An axis longer than this is not taken for the channels unless the caller says so."""


@dataclass(frozen=True)
class MappedPixels:
    """An array in a file, its axes in the order (height, width, channels) or (channels, height, width).

    The map is made for each read and dropped after it: the pages of a lasting one would count as resident memory, so
    that a pass over the image would seem (to a container's limit, too) to hold all of it.
    """

    file: Path | BufferedRandom
    offset: int
    """Bytes before the first pixel."""
    stored_shape: tuple[int, ...]
    """Shape in the file: two axes (height, width), or three."""
    stored_dtype: np.dtype
    channels_last: bool
    """True if a third axis is the last one; not used for two."""
    fortran_order: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        if len(self.stored_shape) == 2:
            return (1, *self.stored_shape)  # type: ignore[return-value]
        a, b, c = self.stored_shape
        return (c, a, b) if self.channels_last else (a, b, c)

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order."""
        return self.stored_dtype.newbyteorder("=")

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Array (channels, height, width), a copy."""
        order: Literal["C", "F"] = "F" if self.fortran_order else "C"
        pixels: np.ndarray = np.memmap(self.file, self.stored_dtype, "r", self.offset, self.stored_shape, order)
        if len(self.stored_shape) == 2:
            pixels = pixels[None]
        elif self.channels_last:
            pixels = pixels.transpose(2, 0, 1)
        return np.array(pixels[:, y : y + height, x : x + width], self.dtype, subok=False)


def open_npy(path: Path, level: int, channels: str | None) -> OpenedLevel:
    """Open a `.npy` file of shape (H, W), (H, W, C) or (C, H, W); see `open_image` for the rest."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise cannot_read(path, f"the .npy file is truncated or damaged ({error})") from error
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise cannot_read(path, f"an array of shape {array.shape} is no image; expected (H, W), (H, W, C) or (C, H, W)")
    if array.dtype.kind not in "uif":
        raise cannot_read(path, f"its type is {array.dtype}; expected integers or floats, so convert it with astype")
    source = MappedPixels(
        file=path,
        offset=array.offset,
        stored_shape=array.shape,
        stored_dtype=array.dtype,
        channels_last=array.ndim == 3 and _channels_last(path, array.shape, channels),
        fortran_order=array.flags.f_contiguous and not array.flags.c_contiguous,
    )
    levels = (source.shape[1:],)
    check_level(level, levels, path)
    return OpenedLevel(levels, None, source)


def _channels_last(path: Path, shape: tuple[int, ...], channels: str | None) -> bool:
    if channels is not None:
        if channels not in ("first", "last"):
            raise ValueError(f'channels={channels!r} for {path}; expected "first", "last" or None')
        return channels == "last"
    if shape[0] == shape[2] or min(shape[0], shape[2]) > MAX_CHANNELS:
        raise ValueError(
            f"the shape {shape} of {path} does not tell which axis the channels are; "
            'pass channels="first" for (C, H, W) or channels="last" for (H, W, C)'
        )
    return shape[2] < shape[0]
