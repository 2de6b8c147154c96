"""Pixels that libvips decodes tile by tile, in any order."""

from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyvips

from widefield.images.errors import ImageReadError
from widefield.images.vips import OpenPlanes, fetch

PIECE_ROWS = 256
PIECE_BYTES = 256 * 2**10
"""libvips is asked for pieces of at most so many rows and bytes. The heap of the C library keeps the larger buffers
that come and go with whole strips: 0.2 GB for strips of 12 MB, and slower."""


@dataclass(frozen=True)
class TiledPixels:
    """Pixels of a tiled file.

    libvips keeps about three rows of the file's tiles decoded, so that strips lower than a tile do not decode it again.
    That cache also keeps a tile that failed, as black, and hands it out without an error the next time. So one thread
    reads at a time, and after a failure the cache is dropped before another one may look.
    """

    path: Path
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype[Any]
    open_planes: OpenPlanes
    """Opens the images for random access."""
    _lock: Any = field(default_factory=Lock, repr=False)
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
