"""Tile mismatch: by how much a model's map, put together from tiles, differs from its map of the whole image."""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from widefield.errors import WrongArgumentError
from widefield.pretraining.wrapping import evaluating
from widefield.streaming import LazyImage, StreamingCNN, stream
from widefield.streaming.call import device_and_dtype
from widefield.streaming.map_writing import ArrayTarget, MapSink, WrittenMap
from widefield.streaming.tiles import TileReader


class AtDistance(NamedTuple):
    """Differences of positions at a distance of `start` up to, not including, `stop` pixels from the border of their tile."""

    start: int
    stop: int
    mean_difference: float
    max_difference: float


@dataclass(frozen=True)
class TileMismatch:
    """The map of a model from tiles, compared with its map of the whole image. Differences are absolute, over all channels.

    Attributes:
        shape: Of the map of the whole image, (N, C, height, width).
        tile_size: (height, width) of the tiles in pixels of the image.
        overlap: Pixels that neighbouring tiles share; each is cropped by half of them at a side where another tile goes on.
        tiles: Number of tiles.
        max_difference: The largest difference of the joined map.
        mean_difference: The mean difference of the joined map.
        seam_step: Mean over the positions beside seams of how much more the joined map changes from one tile to the next than the
            whole map does there: what is seen as a seam. 0 for a single tile.
        value_range: Smallest and largest value of the whole map.
        std: Standard deviation of the values of the whole map.
        changed: Share of positions where another channel is the largest; None for a map of one channel.
        by_distance: Differences by the distance to the border of the tile (where the image goes on), before tiles are cropped. With
            an overlap of `2 * start` no position nearer than `start` is used.
    """

    shape: tuple[int, ...]
    tile_size: tuple[int, int]
    overlap: int
    tiles: int
    max_difference: float
    mean_difference: float
    seam_step: float
    value_range: tuple[float, float]
    std: float
    changed: float | None
    by_distance: tuple[AtDistance, ...]

    @property
    def relative_max(self) -> float:
        """The largest difference as a share of the range of the whole map."""
        return _ratio(self.max_difference, self.value_range[1] - self.value_range[0])

    @property
    def relative_mean(self) -> float:
        """The mean difference in standard deviations of the whole map."""
        return _ratio(self.mean_difference, self.std)

    @property
    def relative_seam_step(self) -> float:
        """The step at seams in standard deviations of the whole map."""
        return _ratio(self.seam_step, self.std)

    def __str__(self) -> str:
        height, width = self.tile_size
        lines = [
            f"{self.tiles} tiles of {height} x {width} pixels that overlap by {self.overlap}, against the whole image:",
            f"  largest difference  {self.max_difference:.3g} ({self.relative_max:.2%} of the range)",
            f"  mean difference     {self.mean_difference:.3g} ({self.relative_mean:.2%} of the standard deviation)",
            f"  step at seams       {self.seam_step:.3g} ({self.relative_seam_step:.2%} of the standard deviation)",
        ]
        if self.changed is not None:
            lines.append(f"  another class at    {self.changed:.3%} of the positions")
        if self.by_distance:
            lines.append("  distance to the border of a tile, in pixels: mean and largest difference")
        lines += [
            f"    {f'{one.start} to {one.stop - 1}':<15} {one.mean_difference:.3g}, {one.max_difference:.3g}"
            for one in self.by_distance
        ]
        return "\n".join(lines)


@torch.no_grad()
def tile_mismatch(
    model: nn.Module, image: Tensor | LazyImage, *, tile_size: int | tuple[int, int] = 512, overlap: int = 0
) -> TileMismatch:
    """Measure how much the map that `model` gives on tiles, cropped and joined, differs from its map of the whole image.

    The map of the whole image is streamed into a temporary file, and the plain module runs on one tile after the other, so that
    an image of any size fits; differences are taken in float64. The model is in evaluation mode meanwhile. The last tile along an
    axis ends with the image and overlaps more than the others. The name is from Buglakova et al., 2025
    (https://arxiv.org/abs/2503.19545), who compare neighbouring tiles at their common border.

    Args:
        model: A module that gives one map (N, C, h, w), which may be an entry of a dictionary; h and w are those of the image, a
            whole multiple of them, or a whole fraction. It is streamed by `stream`. A `StreamingCNN` is used with its own
            settings (normalisation, memory budget, folder for temporary files).
        image: (N, C, H, W), or read lazily.
        tile_size: Height and width of the tiles in pixels; no more than those of the image is used.
        overlap: Pixels that neighbouring tiles share, of which each is cropped by half.

    Raises:
        UnsupportedOpError: The model cannot be streamed.
        ValueError: The result is not one map of such a size, or tile size and overlap do not fit each other or the map's stride.
        OSError: The folder for temporary files has no room for the map.

    Examples:
        >>> network = torch.nn.Conv2d(3, 2, 3, padding=1)
        >>> found = widefield.tile_mismatch(network, torch.rand(1, 3, 64, 64), tile_size=32)
        >>> found.by_distance[1].max_difference < 1e-6  # one pixel from the border of a tile, a 3 x 3 kernel sees all it needs
        True
    """
    streamed = model if isinstance(model, StreamingCNN) else stream(model)
    size = _checked_tile(tile_size, overlap)
    with evaluating(streamed):
        target = _Scratch(streamed.scratch_dir, size, overlap)
        streamed.write(image, target)
        reader = TileReader(image, *device_and_dtype(streamed.module, image), streamed.normalisation)
        return _compare(streamed.module, reader, target)


_FAR = 1 << 40
"""Pixels to the border of a tile that is that of the image."""


def _ratio(value: float, scale: float) -> float:
    return value / scale if scale else math.inf if value else 0.0


class _Span(NamedTuple):
    """A tile along one axis: pixels that it reads, positions of the map that it gives, and those of its own that are kept."""

    start: int
    stop: int
    out: slice
    kept: slice
    distance: Tensor
    """Pixels from each position to the nearer border of the tile beyond which the image goes on."""


def _checked_tile(tile_size: int | tuple[int, int], overlap: int) -> tuple[int, int]:
    given: Sequence[Any] = tile_size if isinstance(tile_size, (tuple, list)) else (tile_size, tile_size)
    whole = len(given) == 2 and all(type(n) is int and n > 0 for n in given)
    if not whole or type(overlap) is not int or not 0 <= overlap < min(given):
        raise WrongArgumentError(
            f"tile_size={tile_size!r} must be a number of pixels or (height, width), and overlap={overlap!r} a number of pixels "
            "from 0 to less than that"
        )
    return given[0], given[1]


def _tiles(length: int, positions: int, stride: float, tile: int, overlap: int) -> list[_Span]:
    """The tiles along an axis of `length` pixels, of which the map has `positions` in a distance of `stride`. Raises ValueError."""
    cell, grow = max(round(stride), 1), max(round(1 / stride), 1)
    if positions not in (length * grow // cell, -(-length * grow // cell)):
        raise WrongArgumentError(
            f"the map has {positions} positions along an axis of {length} pixels: tiles are joined if the map has the size of the "
            "image, a whole multiple or a whole fraction of it; pad or crop inside of the model"
        )
    if tile < length and (tile % cell or overlap % (2 * cell)):
        raise WrongArgumentError(
            f"a position of the map stands for {cell} pixels: tile_size must be a multiple of {cell} and overlap one of "
            f"{2 * cell}, got {tile} and {overlap}"
        )
    last = max(length - tile, 0) // cell * cell
    starts = [*range(0, last, tile - overlap), last]
    stops = [start + tile for start in starts[:-1]] + [length]
    cuts = [0, *((before + after) // 2 // cell * grow for before, after in zip(stops, starts[1:])), positions]
    spans = []
    for number, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        first, end = start // cell * grow, positions if stop == length else stop // cell * grow
        pixels = torch.arange(end - first) * cell // grow
        before = pixels if start else torch.full_like(pixels, _FAR)
        after = stop - start - cell - pixels if stop < length else torch.full_like(pixels, _FAR)
        kept = slice(cuts[number] - first, cuts[number + 1] - first)
        spans.append(_Span(start, stop, slice(first, end), kept, torch.minimum(before, after)))
    return spans


class _Scratch:
    """A target of `StreamingCNN.write`: a temporary file without a name, as `array`, and the tiles along its `axes`."""

    def __init__(self, folder: str | None, tile_size: tuple[int, int], overlap: int) -> None:
        self.folder, self.tile_size, self.overlap = folder, tile_size, overlap
        self.array: np.ndarray = np.empty(0)
        self.axes: list[list[_Span]] = []

    def buffer_rows(self, written: WrittenMap) -> int:
        return 0

    @contextmanager
    def begin(self, image: Any, maps: Sequence[WrittenMap]) -> Iterator[MapSink]:
        if len(maps) != 1 or len(maps[0].shape) != 4:
            shapes = ", ".join(f"{one.name or 'the result'} {one.shape}" for one in maps)
            raise WrongArgumentError(
                f"tiles are compared for models that give one map (N, C, h, w), and this one gives: {shapes}; wrap it in a module "
                "that returns the one you mean"
            )
        along = zip(image.shape[-2:], maps[0].shape[2:], maps[0].stride, self.tile_size, strict=True)
        self.axes = [_tiles(*axis, self.overlap) for axis in along]
        size = maps[0].shape[2] * maps[0].row_bytes
        folder = self.folder or tempfile.gettempdir()
        try:
            with tempfile.TemporaryFile(prefix="widefield-", dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a bus error later
                    os.posix_fallocate(file.fileno(), 0, size)
                self.array = np.memmap(file, maps[0].dtype, "w+", shape=maps[0].shape)
        except OSError as error:
            needed = f"the map of the whole image needs {size} bytes in the folder {folder}: {error.strerror}. Give another one:"
            raise OSError(error.errno, f"{needed} stream(model, scratch_dir=...)") from error
        with ArrayTarget([self.array]).begin(image, maps) as sink:
            yield sink


class _Summary:
    """Count, mean, variance and extremes of values that come tensor by tensor (Chan et al., 1979). NaN stays NaN."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.low, self.high = torch.full((2,), math.inf, dtype=torch.float64) * torch.tensor([1.0, -1.0])

    def add(self, values: Tensor) -> None:
        if not (new := values.numel()):
            return
        mean = float(values.mean())
        shift, count = mean - self.mean, self.count + new
        self.squares += float((values - mean).square().sum()) + shift * shift * self.count * new / count
        self.mean, self.count = self.mean + shift * new / count, count
        self.low, self.high = torch.minimum(self.low, values.min()), torch.maximum(self.high, values.max())


def _compare(module: nn.Module, reader: TileReader, target: _Scratch) -> TileMismatch:
    """Run `module` on each tile, and compare with what was written to `target`."""
    values, joined, seams, distances, changed = _Summary(), _Summary(), _Summary(), dict[int, _Summary](), 0
    whole, (rows, cols) = target.array, target.axes
    above = torch.zeros((*whole.shape[:2], whole.shape[3]), dtype=torch.float64)  # errors of the last row before a seam
    for number, row in enumerate(rows):
        below, left = torch.empty_like(above), None
        for col in cols:
            exact = torch.from_numpy(np.array(whole[:, :, row.out, col.out])).double()
            raw = reader.read(row.start, col.start, row.stop - row.start, col.stop - col.start)
            tile = _map_of(module(reader.normalised(raw, row.start, col.start)), exact.shape)
            error = tile - exact
            distance = torch.minimum(row.distance[:, None], col.distance[None])
            if len(rows) * len(cols) > 1:
                for power in range(int(distance.min()).bit_length(), int(distance.max()).bit_length() + 1):
                    ring = (distance >= 1 << power >> 1) & (distance < 1 << power)
                    distances.setdefault(power, _Summary()).add(error[:, :, ring].abs())
            exact, tile, error = (each[:, :, row.kept, col.kept] for each in (exact, tile, error))
            values.add(exact)
            joined.add(error.abs())
            changed += int((tile.argmax(1) != exact.argmax(1)).sum())
            if left is not None:
                seams.add((error[..., 0] - left).abs())
            place = slice(col.out.start + col.kept.start, col.out.start + col.kept.stop)
            if number:
                seams.add((error[:, :, 0] - above[..., place]).abs())
            below[..., place], left = error[:, :, -1], error[..., -1]
        above = below
    return TileMismatch(
        shape=whole.shape,
        tile_size=target.tile_size,
        overlap=target.overlap,
        tiles=len(rows) * len(cols),
        max_difference=float(joined.high),
        mean_difference=joined.mean,
        seam_step=seams.mean,
        value_range=(float(values.low), float(values.high)),
        std=math.sqrt(values.squares / values.count),
        changed=None if whole.shape[1] == 1 else changed * whole.shape[1] / whole.size,
        by_distance=tuple(
            AtDistance(1 << power >> 1, 1 << power, found.mean, float(found.high))
            for power, found in sorted(distances.items())
        ),
    )


def _map_of(result: Any, shape: Sequence[int]) -> Tensor:
    """The one map in the result of a tile. Raises ValueError if it is not of `shape`."""
    maps = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.ndim == 4]
    if [tuple(one.shape) for one in maps] != [tuple(shape)]:
        raise WrongArgumentError(
            f"of a tile the model gives maps of {[tuple(one.shape) for one in maps]}, where the whole image has {tuple(shape)}: "
            "choose a tile_size that the model keeps, such as a multiple of its stride"
        )
    return maps[0].cpu().double()
