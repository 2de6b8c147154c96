"""Range, mean and standard deviation of the pixels of training images, from crops of the foreground."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from widefield.images import ImageFile, foreground
from widefield.images.formats import has_data

CROP, CROPS = 256, 64
"""Side and number of the crops that are read."""

PERCENTILES = (0.1, 99.9)


@dataclass(frozen=True)
class PixelStatistics:
    """Statistics of pixels, as they are stored.

    Attributes:
        dtype: Type of the pixels.
        low, high: The percentiles 0.1 and 99.9 over all channels.
        mean, std: Of each channel.
        missing: True if some pixels may hold no data: floats, or images that name a value for missing data.
        masks: The foreground of each image.
    """

    dtype: np.dtype
    low: float
    high: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    missing: bool
    masks: tuple[np.ndarray, ...]

    def fills_its_type(self) -> bool:
        """True if the pixels fill a quarter of the range that stands for 0 to 1: of their integer type, or 0 to 1 of floats."""
        if self.dtype.itemsize == 1:
            return True
        if self.dtype.kind == "f":
            return self.low >= 0 and 0.25 <= self.high <= 1
        return self.high >= np.iinfo(self.dtype).max / 4


def pixel_statistics(images: Sequence[ImageFile], seed: int) -> PixelStatistics:
    """Measure the pixels of images on at most 64 crops of 256 pixels, whose middles are drawn in the foreground.

    That is the image's own where it has a background, else that by Otsu's threshold.

    Pixels without data (NaN, infinite, the file's value for missing data) do not count.

    Args:
        images: At least one, all with the same number of channels.
        seed: Of the crops.

    Raises:
        ImageReadError: An image cannot be read.
        ValueError: There are no data in any crop.
    """
    chosen = images[:CROPS]
    masks = tuple((image.background.mask if image.background else foreground(image)).cells for image in chosen)
    pixels = np.concatenate([crop.reshape(len(crop), -1) for crop in _crops(chosen, masks, seed)], axis=1)
    if not np.isfinite(pixels).any(1).all():
        raise ValueError(f"the images hold no data in a channel: none of {CROPS} crops has a finite pixel there")
    low, high = np.nanpercentile(pixels, PERCENTILES)
    mean, std = np.nanmean(pixels, axis=1), np.nanstd(pixels, axis=1)
    return PixelStatistics(
        dtype=images[0].dtype,
        low=float(low),
        high=float(high),
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        missing=images[0].dtype.kind == "f" or any(image.nodata is not None for image in images),
        masks=masks,
    )


def _crops(images: Sequence[ImageFile], masks: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Yield float64 crops (C, h, w), NaN where there are no data."""
    random = np.random.default_rng(seed)
    for number in range(CROPS):
        image, mask = images[number % len(images)], masks[number % len(images)]
        cells = np.argwhere(mask if mask.any() else np.ones_like(mask))
        size = image.shape[1:]
        middle = (cells[random.integers(len(cells))] + random.random(2)) * size / mask.shape
        height, width = (min(CROP, extent) for extent in size)
        y, x = (
            int(np.clip(m - n / 2, 0, extent - n)) for m, n, extent in zip(middle, (height, width), size, strict=True)
        )
        crop = image.read(y, x, height, width)
        yield np.where(has_data(crop, image.nodata), crop.astype(np.float64), np.nan)
