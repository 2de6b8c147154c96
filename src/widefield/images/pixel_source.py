"""The result of a format's reader for `open_image`, the source of the pixels of the chosen level, and the error of a reader."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from widefield.errors import WidefieldError

_log = logging.getLogger(__name__)

Alpha = Literal["drop", "keep"]
"""Treatment of a last channel that the file marks as alpha."""

Spacing = tuple[float, float]
"""Micrometres per pixel, (y, x)."""


class ImageReadError(WidefieldError, OSError):
    """A file cannot be read as an image: unsupported, truncated or corrupt.

    The message names the file and the reason. It is raised when the file is opened, or when the damaged part is read.
    """


def cannot_read(path: Path, reason: str) -> ImageReadError:
    """The error for the file at `path`; `reason` says what is wrong and, where something helps, what to do."""
    return ImageReadError(f"cannot read {path}: {reason}")


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


_WARNED: set[str] = set()
"""Endings of file names that `warn_of_dropped_alpha` has been called for."""


def warn_of_dropped_alpha(path: object, channels: int) -> None:
    """Log that the last channel of a file is dropped, and how to keep it: once for each ending of file names."""
    ending = Path(str(path)).suffix.lower()
    if ending in _WARNED:
        return
    _WARNED.add(ending)
    _log.warning(
        "channel %d of %s is marked as alpha and dropped. If it holds data (near infrared is often marked so), keep it: "
        'open_image(..., alpha="keep"), data.alpha=keep in `fit`, transform_args.num_channels=%d in `pretrain`. '
        "Further %s files are not named",
        channels, path, channels, ending or "such",
    )  # fmt: skip
