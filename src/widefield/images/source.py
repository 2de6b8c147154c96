"""What a format's reader hands to `open_image`: where the pixels of the chosen level come from."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

Spacing = tuple[float, float]
"""Micrometres per pixel, (y, x)."""


class PixelSource(Protocol):
    """The pixels of one level of one file."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order."""

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Writable array (channels, height, width) of a region that lies inside the image (not checked here)."""


@dataclass(frozen=True)
class OpenedLevel:
    """One level of a file, opened, and what the file says of its levels."""

    levels: tuple[tuple[int, int], ...]
    """(height, width) of every level, largest first."""
    spacing: Spacing | None
    """Spacing of the opened level; None if the file doesn't say."""
    source: PixelSource


def check_level(level: int, levels: tuple[tuple[int, int], ...], what: object) -> None:
    """Raise a ValueError that names the levels there are, unless `level` is one of them."""
    if not 0 <= level < len(levels):
        sizes = ", ".join(f"{index}: {height}x{width}" for index, (height, width) in enumerate(levels))
        raise ValueError(f"level {level} of {what} does not exist; its levels (height x width) are {sizes}")
