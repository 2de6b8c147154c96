"""Patches of slides: large images of which only regions are read, drawn at random where there is tissue."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from widefield.images import ImageFile, ImageReadError, open_image, thumbnail
from widefield.pretraining.pixels import open_lazily, with_channels
from widefield.pretraining.settings import Count

THUMBNAIL = 512
"""Long side of the picture in which tissue is looked for, in pixels."""


@dataclass(frozen=True)
class SlideArgs:
    """Settings of drawing patches from slides.

    Attributes:
        patch_size: Side of a patch in pixels of the level, or at the spacing; views are cropped from it.
        patches_per_slide: Patches of each slide in an epoch.
        level: Level of the pyramid that is read, 0 the largest.
        spacing: Micrometres per pixel of the patches instead of a level; the next finer level is read and scaled.
        foreground: Only where there is tissue.
    """

    patch_size: Count = 512
    patches_per_slide: Count = 64
    level: int | None = None
    spacing: float | None = None
    foreground: bool = True

    def __post_init__(self) -> None:
        if self.level is not None and self.spacing is not None:
            raise ValueError(f"level={self.level} and spacing={self.spacing:g} were both given; give one of them")
        if self.spacing is not None and not self.spacing > 0:
            raise ValueError(f"spacing={self.spacing:g} must be above 0")


@dataclass(frozen=True)
class Region:
    """A square of a slide, in pixels of `level`."""

    level: int
    y: int
    x: int
    height: int
    width: int


def draw_region(path: Path, args: SlideArgs, random: Random) -> Region:
    """A region around a place of the foreground, drawn uniformly; moved inside where it would reach over the border."""
    image = open_image(path, alpha="keep")  # only its levels count here
    level, side = _level_and_side(image, args)
    height, width = image.levels[level]
    rows, columns, cells = foreground(path) if args.foreground else (1, 1, ((0, 0),))
    row, column = cells[random.randrange(len(cells))]
    y = (row + random.random()) * height / rows - side / 2
    x = (column + random.random()) * width / columns - side / 2
    size = min(side, height), min(side, width)
    return Region(level, _inside(y, height - size[0]), _inside(x, width - size[1]), *size)


def read_patch(path: Path, args: SlideArgs, num_channels: int, random: Random) -> Tensor:
    """A patch (C, H, W), of side `args.patch_size` but for slides that are smaller.

    Raises:
        ImageReadError: The slide cannot be read there, lacks the level or says no spacing, or has other channels.
    """
    region = draw_region(path, args, random)
    pixels = open_lazily(path, num_channels, region.level).read(region.y, region.x, region.height, region.width)
    patch = with_channels(torch.from_numpy(np.ascontiguousarray(pixels)), num_channels, str(path))
    scale = 1.0 if args.spacing is None else args.patch_size / _level_and_side(open_image(path, alpha="keep"), args)[1]
    if scale == 1.0:
        return patch
    size = [max(1, round(n * scale)) for n in patch.shape[1:]]
    if patch.dtype == torch.uint8:
        return F.resize(patch, size, antialias=True)
    return F.resize(patch.to(torch.float32), size, antialias=True).round().to(patch.dtype)


@lru_cache(maxsize=1024)
def foreground(path: Path) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Rows and columns of a grid over the slide, and which of its cells (row, column) hold tissue; all if none seems to."""
    picture = thumbnail(open_image(path, alpha="keep"), THUMBNAIL)
    mask = tissue(picture)
    if not mask.any():
        mask[:] = True
    cells = tuple((int(row), int(column)) for row, column in np.argwhere(mask))
    return (*mask.shape, cells)  # type: ignore[return-value]


def tissue(picture: np.ndarray) -> np.ndarray:
    """Return a mask (H, W), True where an RGB picture (H, W, 3) of uint8 shows tissue.

    Stained tissue is colourful on a background that is not: Otsu's threshold of max - min over the channels. In a picture
    without colours it is what differs from the most frequent grey.
    """
    values = picture.astype(np.int16)
    score = values.max(2) - values.min(2)
    if score.max() < 16:
        grey = values.mean(2).round().astype(np.int16)
        score = abs(grey - np.bincount(grey.ravel(), minlength=256).argmax())
    return score > otsu(score)


def otsu(values: np.ndarray) -> int:
    """The threshold t of integers from 0 to 255 that maximises the variance between `values <= t` and the others.

    N. Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    counts = np.bincount(values.ravel().astype(np.int64), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nan_to_num(between).argmax())


def _level_and_side(image: ImageFile, args: SlideArgs) -> tuple[int, int]:
    """The level to read, and the side of a patch in its pixels."""
    if args.spacing is None:
        level = args.level or 0
        if level >= len(image.levels):
            raise ImageReadError(f"cannot use {image.path}: it has {len(image.levels)} levels and slides.level={level}")
        return level, args.patch_size
    if image.spacing is None:
        raise ImageReadError(
            f"cannot use {image.path}: it doesn't say its spacing, which slides.spacing={args.spacing:g} needs; give a level"
        )
    spacings = [image.spacing[0] * image.levels[0][0] / height for height, _ in image.levels]
    fine = [level for level, spacing in enumerate(spacings) if spacing <= args.spacing * 1.01]
    level = max(fine, default=0)
    return level, max(1, round(args.patch_size * args.spacing / spacings[level]))


def _inside(start: float, last: int) -> int:
    return min(max(0, round(start)), last)
