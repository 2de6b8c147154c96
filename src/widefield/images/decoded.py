"""Pixels that can only be decoded from top to bottom: decoded once, kept in memory or in a temporary file."""

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

from widefield.images.errors import cannot_read
from widefield.images.numpy_map import MappedPixels
from widefield.images.vips import OpenPlanes, fetch

MEMORY_BYTES = 64 * 2**20
"""An image that decodes to more than this many bytes goes to a temporary file."""

STRIP_BYTES = 256 * 2**10
"""Bytes that are decoded at a time."""


@dataclass(frozen=True)
class DecodedPixels:
    """Pixels decoded at the first read. A file that fails to decode fails again at every read."""

    path: Path
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype[Any]
    open_planes: OpenPlanes
    """Opens the images for sequential access."""
    _lock: Any = field(default_factory=Lock, repr=False)
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
