"""Patches of slides: large images of which only regions are read, drawn at random where there is tissue."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from widefield.images import ImageFile, ImageReadError, foreground, open_image
from widefield.pretraining.pixels import open_lazily, with_channels
from widefield.pretraining.settings import Count


@dataclass(frozen=True)
class SlideArgs:
    """Settings of drawing patches from slides.

    Attributes:
        patch_size: Side of a patch in pixels of the level, or at the spacing; views are cropped from it.
        patches_per_slide: Patches of each slide in an epoch.
        level: Level of the pyramid that is read, 0 the largest.
        spacing: Micrometres per pixel of the patches instead of a level, see `open_image`.
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
    """A square of a slide, in pixels of the level or spacing that is read."""

    y: int
    x: int
    height: int
    width: int


def draw_region(image: ImageFile, args: SlideArgs, random: Random) -> Region:
    """A region around a place of the foreground, drawn uniformly; moved inside where it would reach over the border."""
    _, height, width = image.shape
    rows, columns, cells = foreground_cells(image.path) if args.foreground else (1, 1, ((0, 0),))
    row, column = cells[random.randrange(len(cells))]
    y = (row + random.random()) * height / rows - args.patch_size / 2
    x = (column + random.random()) * width / columns - args.patch_size / 2
    size = min(args.patch_size, height), min(args.patch_size, width)
    return Region(_inside(y, height - size[0]), _inside(x, width - size[1]), *size)


def read_patch(path: Path, args: SlideArgs, num_channels: int, random: Random) -> Tensor:
    """A patch (C, H, W), of side `args.patch_size` but for slides that are smaller.

    Raises:
        ImageReadError: The slide cannot be read there, lacks the level or the spacing, or has other channels.
    """
    try:
        image = open_lazily(path, num_channels, args.level, args.spacing)
    except ValueError as error:
        raise ImageReadError(f"cannot use {path}: {error}") from error
    region = draw_region(image, args, random)
    pixels = image.read(region.y, region.x, region.height, region.width)
    return with_channels(torch.from_numpy(np.ascontiguousarray(pixels)), num_channels, str(path))


@lru_cache(maxsize=1024)
def foreground_cells(path: Path) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Rows and columns of a mask of the slide, and which of its cells (row, column) are foreground; all if none seems to be."""
    cells = foreground(open_image(path, alpha="keep")).cells
    if not cells.any():
        cells = np.ones_like(cells)
    return (*cells.shape, tuple((int(row), int(column)) for row, column in np.argwhere(cells)))  # type: ignore[return-value]


def _inside(start: float, last: int) -> int:
    return min(max(0, round(start)), last)
