"""A small picture of a large image, for overlays and reports."""

import numpy as np

from widefield.images.image import ImageFile, open_image

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
