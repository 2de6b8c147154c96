"""Pixels that libvips decodes: tile by tile in any order, or from top to bottom once, kept in memory or in a temporary file."""

import math
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyvips

from widefield.images.numpy_map import MappedPixels
from widefield.images.pixel_source import ImageReadError, cannot_read
from widefield.images.vips import OpenPlanes, fetch

MEMORY_BYTES = 64 * 2**20
"""An image that decodes to more than this many bytes goes to a temporary file."""

STRIP_BYTES = 256 * 2**10
"""Bytes that are decoded at a time."""


PIECE_ROWS = 256
PIECE_BYTES = 256 * 2**10
"""libvips is asked for pieces of at most so many rows and bytes. The heap of the C library keeps the larger buffers
that come and go with whole strips: 0.2 GB for strips of 12 MB, and slower."""


@dataclass(frozen=True)
class _OpenedPixels:
    """Pixels of a file that libvips opens at the first read."""

    path: Path
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype[Any]
    open_planes: OpenPlanes
    _lock: Any = field(default_factory=Lock, repr=False)


@dataclass(frozen=True)
class DecodedPixels(_OpenedPixels):
    """Pixels decoded at the first read, of images for sequential access. A file that fails to decode fails again at every read."""

    _decoded: list[Any] = field(default_factory=list, repr=False)
    """Empty until the first read, then the one array (H, W, C) or `MappedPixels`."""

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Array (channels, height, width), a copy."""
        with self._lock:
            if not self._decoded:
                self._decoded.append(self._decode())
        decoded = self._decoded[0]
        if isinstance(decoded, MappedPixels):
            return decoded.read(y, x, height, width)
        return np.array(decoded[y : y + height, x : x + width]).transpose(2, 0, 1)

    def _decode(self) -> np.ndarray | MappedPixels:
        channels, height, width = self.shape
        if math.prod(self.shape) * self.dtype.itemsize > MEMORY_BYTES:
            file = self._decode_to_file()
            return MappedPixels(file, 0, (height, width, channels), self.dtype, channels_last=True)
        pixels = np.empty((height, width, channels), self.dtype)
        for y, strip in self._strips():
            pixels[y : y + len(strip)] = strip
        return pixels

    def _decode_to_file(self) -> BufferedRandom:
        file = tempfile.TemporaryFile(prefix="widefield-")  # noqa: SIM115 - lives as long as self
        weakref.finalize(self, file.close)
        for _, strip in self._strips():
            try:
                file.write(strip.data)
                file.flush()
            except OSError as error:
                size = math.prod(self.shape) * self.dtype.itemsize / 2**20
                folder = tempfile.gettempdir()
                reason = f"decoding it takes {size:.0f} MiB in {folder}, which failed ({error}); point TMPDIR elsewhere"
                raise cannot_read(self.path, reason) from error
        return file

    def _strips(self) -> Iterator[tuple[int, np.ndarray]]:
        """All rows from top to bottom, as (y of the first row, array (rows, width, channels))."""
        channels, height, width = self.shape
        planes = self.open_planes()
        regions = [pyvips.Region.new(plane) for plane in planes]
        rows = max(1, STRIP_BYTES // (channels * width * self.dtype.itemsize))
        for y in range(0, height, rows):
            size = min(rows, height - y), width
            parts = [fetch(self.path, region, self.dtype, y, 0, *size) for region in regions]
            yield y, np.concatenate(parts, axis=2)


@dataclass(frozen=True)
class TiledPixels(_OpenedPixels):
    """Pixels of a tiled file, of images for random access.

    libvips keeps about three rows of the file's tiles decoded, so that strips lower than a tile do not decode it again.
    That cache also keeps a tile that failed, as black, and hands it out without an error the next time. So one thread
    reads at a time, and after a failure the cache is dropped before another one may look.
    """

    _planes: list[pyvips.Image] = field(default_factory=list, repr=False)
    """Results of `open_planes`; empty before the first read and after a failure."""

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Array (channels, height, width)."""
        with self._lock:
            if not self._planes:
                self._planes.extend(self.open_planes())
            try:
                return self._assemble(y, x, height, width)
            except ImageReadError:
                self._planes.clear()
                raise

    def _assemble(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        pixels = np.empty((height, width, self.shape[0]), self.dtype)
        rows = min(PIECE_ROWS, height)
        first_band = 0
        for plane in self._planes:
            region = pyvips.Region.new(plane)
            bands = pixels[..., first_band : first_band + plane.bands]
            first_band += plane.bands
            columns = max(1, PIECE_BYTES // (rows * plane.bands * self.dtype.itemsize))
            for top in range(0, height, rows):
                for left in range(0, width, columns):
                    size = min(rows, height - top), min(columns, width - left)
                    piece = fetch(self.path, region, self.dtype, y + top, x + left, *size)
                    bands[top : top + rows, left : left + columns] = piece
        return pixels.transpose(2, 0, 1)
