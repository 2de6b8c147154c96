"""Small pictures of whole images, and where these hold data."""

from typing import Any

import numpy as np

from widefield.errors import WrongArgumentError
from widefield.images.formats import STRIP_BYTES, Size, has_data, strips, whole_number
from widefield.images.image import ImageFile


def thumbnail(image: ImageFile, size: int) -> np.ndarray:
    """The entire image as an RGB picture whose long side is at most `size` pixels; never enlarged.

    Each pixel is the mean of the pixels that it covers, taken from the smallest level that has enough of them and read
    strip by strip. 8-bit images keep their values; others are stretched from their least to their greatest. Where there are no data
    (NaN, the file's value for missing data) it is black. The first three channels are shown, or the first one as grey where there
    are fewer.

    Returns:
        uint8 array (height, width, 3).

    Raises:
        ValueError: `size` is below 1.
        ImageReadError: As in `ImageFile.read`.

    Examples:
        >>> thumbnail(wf.open_image("slides/tumor_001.tif"), 64).shape
        (64, 64, 3)
    """
    return overview(image, size)[0]


def overview(image: ImageFile, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A `thumbnail`, and where it has data: boolean array (height, width)."""
    means = coarse_means(image, size)
    return as_rgb(means, image.dtype), np.isfinite(means).any(0)


def coarse_means(image: ImageFile, size: int) -> np.ndarray:
    """The pixels of a `thumbnail` as means of what the file stores: float64 (channels, height, width), NaN without data."""
    if not isinstance(image, ImageFile):
        raise WrongArgumentError(f"image={image!r}; expected an image that open_image returned")
    size = whole_number("size", size, f"a thumbnail of {image.path}", 1)
    _, height, width = image.shape
    scale = min(1.0, size / max(height, width))
    target = max(1, round(height * scale)), max(1, round(width * scale))
    return _box_mean(_as_stored(image, target), target)


def data_at(image: ImageFile, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return where an image holds data in a channel, at the crossings of rows and columns.

    It is read strip by strip, at its smallest level with four pixels for each of `rows` and `columns`, if it has a smaller one than
    `image`; not at all, if its type and its header tell that no pixel is without data.

    Args:
        image: An opened image.
        rows, columns: Positions in pixels of the largest level, from its corner. Beyond the image the nearest pixel counts.

    Returns:
        Boolean array (len(rows), len(columns)).

    Raises:
        ImageReadError: As in `ImageFile.read`.
    """
    found = np.ones((len(rows), len(columns)), bool)
    if image.dtype.kind != "f" and image.nodata is None:
        return found
    image = _as_stored(image, (4 * len(rows), 4 * len(columns)))
    _, height, width = image.shape
    y, x = (
        np.clip(np.floor(places * n / full).astype(int), 0, n - 1)
        for places, n, full in zip((rows, columns), (height, width), image.levels[0], strict=True)
    )
    for top, count in strips(image):
        inside = (y >= top) & (y < top + count)
        if inside.any():
            strip = image.read(top, 0, count, width)
            found[inside] = has_data(strip[:, y[inside] - top][..., x], image.nodata).any(0)
    return found


def _as_stored(image: ImageFile, target: Size) -> ImageFile:
    """The image without `fill`, at its smallest level of at least `target` (height, width) pixels, never a larger one than now."""
    enough = [index for index, level in enumerate(image.levels) if level[0] >= target[0] and level[1] >= target[1]]
    smallest = max([image.level, *enough])
    if smallest == image.level and image.fill is None:
        return image
    return image.reopened(fill=None, **({} if smallest == image.level else {"level": smallest, "spacing": None}))


def _box_mean(image: ImageFile, target: tuple[int, int]) -> np.ndarray:
    """Means over the boxes that a grid of `target` (height, width) cuts the image into; float64 (channels, *target).

    Pixels without data do not count; a box of nothing else is NaN.
    """
    channels, height, width = image.shape
    rows, columns = (np.arange(n + 1) * full // n for n, full in zip(target, (height, width), strict=True))
    group = max(1, STRIP_BYTES // (channels * width * image.dtype.itemsize * -(-height // target[0])))
    means = np.empty((channels, *target))
    for first in range(0, target[0], group):
        edges = rows[first : first + group + 1]
        strip = image.read(int(edges[0]), 0, int(edges[-1] - edges[0]), width)
        boxes = columns[:-1], edges[:-1] - edges[0]
        counts: Any = np.diff(edges)[:, None] * np.diff(columns)
        found = has_data(strip, image.nodata)
        if not found.all():
            strip, counts = np.where(found, strip, 0), _box_sum(found, *boxes)
        with np.errstate(divide="ignore", invalid="ignore"):
            means[:, first : first + group] = _box_sum(strip, *boxes) / counts
    return means


def _box_sum(pixels: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.add.reduceat(np.add.reduceat(pixels, columns, axis=2, dtype=np.float64), rows, axis=1)


def as_rgb(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return `coarse_means` of an image of `dtype` as an RGB picture, uint8 (height, width, 3)."""
    colours = pixels[:3] if len(pixels) >= 3 else np.repeat(pixels[:1], 3, axis=0)
    known = colours[np.isfinite(colours)]
    if dtype != np.uint8 and known.size:
        low, high = known.min(), known.max()
        colours = (colours - low) * (255 / (high - low) if high > low else 0)
    return np.rint(np.nan_to_num(colours, nan=0)).astype(np.uint8).transpose(1, 2, 0)
