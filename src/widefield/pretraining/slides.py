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
class PatchArgs:
    """The patches of slides that are read.

    Attributes:
        patch_size: Side of a patch in pixels of the level, or at the spacing.
        level: Level of the pyramid that is read, 0 the largest.
        spacing: Micrometres per pixel of the patches instead of a level, see `open_image`.
        foreground: Only where there is tissue.
    """

    patch_size: Count = 512
    level: int | None = None
    spacing: float | None = None
    foreground: bool = True

    def __post_init__(self) -> None:
        if self.level is not None and self.spacing is not None:
            raise ValueError(f"level={self.level} and spacing={self.spacing:g} were both given; give one of them")
        if self.spacing is not None and not self.spacing > 0:
            raise ValueError(f"spacing={self.spacing:g} must be above 0")


@dataclass(frozen=True)
class SlideArgs(PatchArgs):
    """Settings of drawing patches from slides at random; views are cropped from them.

    Attributes:
        patches_per_slide: Patches of each slide in an epoch.
    """

    patches_per_slide: Count = 64


@dataclass(frozen=True)
class Region:
    """A square of a slide, in pixels of the level or spacing that is read."""

    y: int
    x: int
    height: int
    width: int


def draw_region(image: ImageFile, args: PatchArgs, random: Random) -> Region:
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
    image = _open(path, args, num_channels)
    return read_region(image, draw_region(image, args, random), num_channels)


def read_region(image: ImageFile, region: Region, num_channels: int) -> Tensor:
    """The pixels (C, H, W) of a region."""
    pixels = image.read(region.y, region.x, region.height, region.width)
    return with_channels(torch.from_numpy(np.ascontiguousarray(pixels)), num_channels, str(image.path))


def grid(path: Path, args: PatchArgs, num_channels: int) -> list[Region]:
    """Regions that tile the slide in rows, those with foreground; the last of a row or column are moved inside.

    Raises:
        ImageReadError: The slide cannot be read, or lacks the level or the spacing.
    """
    _, height, width = _open(path, args, num_channels).shape
    size = args.patch_size
    rows, columns, cells = foreground_cells(path) if args.foreground else (1, 1, ((0, 0),))
    mask = np.zeros((rows, columns), bool)
    mask[tuple(np.array(cells).T)] = True
    regions = (
        Region(_inside(y, height - size), _inside(x, width - size), min(size, height), min(size, width))
        for y in range(0, height, size)
        for x in range(0, width, size)
    )
    return [r for r in regions if mask[_cells(r.y, size, height, rows), _cells(r.x, size, width, columns)].any()]


def _cells(start: int, size: int, length: int, cells: int) -> slice:
    """Return those of so many `cells` of a side of `length` pixels touch `size` pixels from `start` on, as a slice."""
    return slice(start * cells // length, -(-(start + size) * cells // length))


def _open(path: Path, args: PatchArgs, num_channels: int) -> ImageFile:
    try:
        return open_lazily(path, num_channels, args.level, args.spacing)
    except ValueError as error:
        raise ImageReadError(f"cannot use {path}: {error}") from error


@lru_cache(maxsize=1024)
def foreground_cells(path: Path) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """Rows and columns of a mask of the slide, and which of its cells (row, column) are foreground; all if none seems to be."""
    cells = foreground(open_image(path, alpha="keep")).cells
    if not cells.any():
        cells = np.ones_like(cells)
    return (*cells.shape, tuple((int(row), int(column)) for row, column in np.argwhere(cells)))  # type: ignore[return-value]


def _inside(start: float, last: int) -> int:
    return min(max(0, round(start)), last)
