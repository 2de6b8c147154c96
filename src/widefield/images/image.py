"""`open_image` and the image it returns, and a small picture of it."""

import operator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyvips

from widefield.images.decoded import DecodedPixels
from widefield.images.numpy_map import open_npy
from widefield.images.pixel_source import (
    Alpha,
    OpenedLevel,
    PixelSource,
    Spacing,
    cannot_read,
    check_level,
    warn_of_dropped_alpha,
)
from widefield.images.tiff import open_tiff
from widefield.images.vips import dtype_of, kept_out_of_cache, load

ChannelAxis = Literal["first", "last"]

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PHOTO_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_NPY_MAGIC = b"\x93NUMPY"


class ImageFile:
    """One level of an image file; only the regions that are asked for are read. Made by `open_image`.

    It pickles as its path and level (a worker process opens the file anew), survives a fork, and any number of threads
    may read at the same time. No dataclass: Lightning takes those apart when it converts a batch.

    Attributes:
        path: The file.
        level: Level of the pyramid, 0 the largest.
        levels: (height, width) of every level, the largest first.
        spacing: Micrometres per pixel of this level, (y, x); None if the file doesn't say.
        channels: The axis of the channels that `open_image` was told; None if it decided.
        alpha: "drop" or "keep", what `open_image` was told.
    """

    def __init__(
        self,
        path: Path,
        level: int,
        levels: tuple[tuple[int, int], ...],
        spacing: Spacing | None,
        channels: ChannelAxis | None,
        alpha: Alpha,
        source: PixelSource,
    ) -> None:
        self.path, self.level, self.levels = path, level, levels
        self.spacing, self.channels, self.alpha, self._source = spacing, channels, alpha, source

    def __repr__(self) -> str:
        return f"ImageFile(path={str(self.path)!r}, level={self.level}, shape={self.shape}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of this level."""
        return self._source.shape

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order."""
        return self._source.dtype

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Read a region, given in pixels of this level.

        Returns:
            A writable array of shape (channels, height, width) and of type `dtype`, contiguous or not, that shares no
            memory with the file.

        Raises:
            ValueError: The region is empty or not wholly inside the image.
            ImageReadError: The file is truncated or corrupt where the region lies.
        """
        y, x, height, width = (operator.index(number) for number in (y, x, height, width))
        _, full_height, full_width = self.shape
        if height < 1 or width < 1 or y < 0 or x < 0 or y + height > full_height or x + width > full_width:
            raise ValueError(
                f"region (y={y}, x={x}, height={height}, width={width}) is empty or reaches outside of level "
                f"{self.level} of {self.path}, which has height {full_height} and width {full_width}; "
                "clip the region to the image"
            )
        return self._source.read(y, x, height, width)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_image, (self.path, self.level, self.channels, self.alpha)


def open_image(
    path: str | Path, level: int = 0, channels: ChannelAxis | None = None, alpha: Alpha = "drop"
) -> ImageFile:
    """Open a PNG, JPEG, TIFF, BigTIFF or `.npy` file for reading region by region; no pixels are read yet.

    The format is told by the file's content, not by its name. Pixels keep the type they are stored in (8 or 16 bits,
    float, ...) and are not rotated by EXIF orientation. A palette becomes RGB; CMYK becomes sRGB; grey of 1, 2 or 4 bits
    becomes 8 bits from 0 to 255; where white is zero, unsigned grey is inverted. A last channel that is marked as alpha is
    dropped, with a warning in the log: by PNG, or by TIFF as the only extra sample. GDAL and rasterio mark the fourth
    channel of 8 bits so, whatever it holds. Every other number of channels stays.

    Of the images in a TIFF file the first is read, of a Leica SCN file the scanned region. Where another one is as large as
    the first, or several regions were scanned, the file is refused; pictures named label, macro or thumbnail do not count.

    Tiled TIFF files, uncompressed ones and `.npy` are read in place. What can only be decoded from top to bottom (PNG,
    JPEG, compressed TIFF in strips) is decoded once, at the first read, to memory or above 64 MiB to a temporary file.

    Args:
        path: The file.
        level: Level of a pyramid, 0 the largest; levels may be stored as pages or as SubIFDs.
        channels: For `.npy` of three axes, which axis the channels are: "first" (C, H, W) or "last" (H, W, C). Needed
            only where the shape leaves it open: by default it is the smaller of the first and the last axis, if that
            has at most 32 entries.
        alpha: "keep" gives a last channel that is marked as alpha like every other.

    Raises:
        FileNotFoundError: There is no such file.
        ImageReadError: The file is of an unsupported format, truncated or corrupt.
        ValueError: The level does not exist, `alpha` is something else, or the axis of the channels is ambiguous or given
            for another format.
    """
    if alpha not in ("drop", "keep"):
        raise ValueError(f'alpha={alpha!r} for {path}; expected "drop" or "keep"')
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"cannot read {path}: there is no such file")
    if path.is_dir():
        raise cannot_read(path, "it is a folder; give the path of an image file")
    opened = _open(path, level, channels, alpha)
    return ImageFile(path, level, opened.levels, opened.spacing, channels, alpha, opened.source)


def _open(path: Path, level: int, channels: ChannelAxis | None, alpha: Alpha) -> OpenedLevel:
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(_NPY_MAGIC):
        return open_npy(path, level, channels)
    if channels is not None:
        raise ValueError(f"channels={channels!r} was given for {path}, but only .npy files leave it open; omit it")
    if start.startswith(_TIFF_MAGIC):
        return open_tiff(path, level, alpha)
    if start.startswith(_PHOTO_MAGIC):
        return open_photo(path, level, alpha)
    if not start:
        raise cannot_read(path, "the file is empty")
    raise cannot_read(path, "its content is none of PNG, JPEG, TIFF, BigTIFF and .npy; convert it to one of these")


def open_photo(path: Path, level: int, alpha: Alpha) -> OpenedLevel:
    """Open a PNG or JPEG file; see `open_image` for the errors."""
    (image,) = _open_planes(path, "keep")
    levels = ((image.height, image.width),)
    check_level(level, levels, path)
    if image.hasalpha() and alpha == "drop":
        warn_of_dropped_alpha(path, image.bands)
        image = _without_alpha(image)
    shape = (image.bands, image.height, image.width)
    return OpenedLevel(levels, None, DecodedPixels(path, shape, dtype_of(image), partial(_open_planes, path, alpha)))


def _open_planes(path: Path, alpha: Alpha) -> tuple[pyvips.Image]:
    # not at warnings: libpng and libjpeg warn of harmless colour profiles and stray bytes, which cameras do write
    with kept_out_of_cache():
        image = load(path, "sequential", fail_on="error")
        return (_without_alpha(image) if image.hasalpha() and alpha == "drop" else image,)


def _without_alpha(image: pyvips.Image) -> pyvips.Image:
    return image.extract_band(0, n=image.bands - 1)


STRIP_BYTES = 16 * 2**20
"""Bytes of the image that are read at a time."""


def thumbnail(image: ImageFile, size: int) -> np.ndarray:
    """The entire image as an RGB picture whose long side is at most `size` pixels; never enlarged.

    Each pixel is the mean of the pixels that it covers, taken from the smallest level that has enough of them and read
    strip by strip. 8-bit images keep their values; others are stretched from their least to their greatest, NaN is
    black. The first three channels are shown, or the first one as grey where there are fewer.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        ValueError: `size` is below 1.
        ImageReadError: As in `ImageFile.read`.
    """
    if size < 1:
        raise ValueError(f"size={size} of a thumbnail; expected at least 1 pixel")
    _, height, width = image.shape
    scale = min(1.0, size / max(height, width))
    target = max(1, round(height * scale)), max(1, round(width * scale))
    enough = [index for index, level in enumerate(image.levels) if level[0] >= target[0] and level[1] >= target[1]]
    smallest = max([image.level, *enough])
    if smallest != image.level:
        image = open_image(image.path, smallest, image.channels, image.alpha)
    return _as_rgb(_box_mean(image, target), image.dtype)


def _box_mean(image: ImageFile, target: tuple[int, int]) -> np.ndarray:
    """Means over the boxes that a grid of `target` (height, width) cuts the image into; float64 (channels, *target)."""
    channels, height, width = image.shape
    rows, columns = (np.arange(n + 1) * full // n for n, full in zip(target, (height, width), strict=True))
    group = max(1, STRIP_BYTES // (channels * width * image.dtype.itemsize * -(-height // target[0])))
    means = np.empty((channels, *target))
    for first in range(0, target[0], group):
        edges = rows[first : first + group + 1]
        strip = image.read(int(edges[0]), 0, int(edges[-1] - edges[0]), width)
        sums = np.add.reduceat(strip, columns[:-1], axis=2, dtype=np.float64)
        sums = np.add.reduceat(sums, edges[:-1] - edges[0], axis=1)
        means[:, first : first + group] = sums / np.diff(edges)[:, None] / np.diff(columns)
    return means


def _as_rgb(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    colours = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if dtype != np.uint8:
        known = colours[np.isfinite(colours)]
        low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
        stretched = (colours - low) * (255 / (high - low) if high > low else 0)
        colours = np.nan_to_num(stretched, nan=0, posinf=255, neginf=0)
    return np.rint(colours).astype(np.uint8).transpose(1, 2, 0)
