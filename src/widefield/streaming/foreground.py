"""The foreground of an image, and of each of its maps: where reductions look, and what has to be computed."""

import zlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from widefield.streaming.extents import Positions

Flags = npt.NDArray[np.bool_]
Ranges = tuple[Positions, Positions]  # of positions along an axis: where each begins, and one past its end


class Foreground:
    """A mask over a whole image, of any coarser size.

    The foreground of a map, the image included, is `adaptive_max_pool2d(mask, (height, width))` of it: a position belongs to it if
    the cell of the image that it stands for touches the mask.

    Args:
        mask: (N, rows, columns) of bool, N being 1 for the same mask for all images of a batch.
    """

    def __init__(self, mask: Tensor) -> None:
        counts = mask.cpu().cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
        self.batch, self.size = mask.shape[0], (mask.shape[1], mask.shape[2])
        self.counts = torch.nn.functional.pad(counts, (1, 0, 1, 0))  # [n, r, c]: foreground cells above r and left of c

    @property
    def checksum(self) -> int:
        """A number by which masks that differ are told apart (CRC-32)."""
        return zlib.crc32(self.counts.numpy().data, self.counts.shape[2])

    def touched(self, extent: Sequence[int], rows: Ranges, cols: Ranges) -> Flags:
        """Return which blocks of a map of `extent` hold foreground of any image: (row ranges, column ranges)."""
        return self._any(extent, rows, cols).any(0).numpy()  # type: ignore[no-any-return]

    def tile(
        self,
        extent: Sequence[int],
        y: int,
        x: int,
        height: int,
        width: int,
        device: torch.device,
        begin: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Return the foreground in a tile of a map of `extent`: (N or 1, height, width).

        `begin`: the row and column of the map from which on (y, x) counts, if it is rolled.
        """
        rows = (np.arange(y, y + height) + begin[0]) % extent[0]
        cols = (np.arange(x, x + width) + begin[1]) % extent[1]
        return self._any(extent, (rows, rows + 1), (cols, cols + 1)).to(device)

    def _any(self, extent: Sequence[int], rows: Ranges, cols: Ranges) -> Tensor:
        (top, bottom), (left, right) = (
            (torch.from_numpy(low * cells // n), torch.from_numpy(-(-high * cells // n)))
            for n, cells, (low, high) in zip(extent, self.size, (rows, cols), strict=True)
        )
        top, bottom = top[:, None], bottom[:, None]
        below, above = (self.counts[:, row, right] - self.counts[:, row, left] for row in (bottom, top))
        return below - above > 0


def parse_mask(mask: Any, image: Any, shape: Sequence[int]) -> Foreground | None:
    """Check a mask that a user gave for `image`, whose shape is (N, C, H, W). Raises ValueError."""
    if mask is None:
        return None
    if callable(mask):
        if image is None:
            raise ValueError(
                "there is no image to make a mask of: give the mask itself, not the function that makes it"
            )
        mask = mask(image)
    if isinstance(mask, (list, tuple)):
        cells = [np.asarray(getattr(one, "cells", one)) for one in mask]
        if len({one.shape for one in cells}) > 1:
            raise ValueError(
                f"the masks of a batch must have one size: got {', '.join(str(one.shape) for one in cells)}"
            )
        mask = np.stack(cells) if cells else mask
    mask = getattr(mask, "cells", mask)
    found = mask if isinstance(mask, Tensor) else np.array(mask)
    found = found[None] if found.ndim == 2 else found
    is_bool = found.dtype in (torch.bool, np.bool_)
    if not is_bool or found.ndim != 3 or found.shape[0] not in (1, shape[0]) or 0 in found.shape:
        raise ValueError(
            f"mask is {found.dtype} of shape {tuple(found.shape)}, and must be a boolean array (rows, columns), or "
            f"({shape[0]}, rows, columns) for this batch, True in the foreground; a Mask; or a function that makes one of the image"
        )
    if found.shape[1] > shape[2] or found.shape[2] > shape[3]:
        raise ValueError(f"mask has {tuple(found.shape[1:])} cells, more than the image has pixels, {tuple(shape[2:])}")
    found = torch.as_tensor(found)
    if not found.flatten(1).any(1).all():
        raise ValueError(
            "mask holds no foreground (nothing is True): leave this image out, or look at how the mask was made"
        )
    return Foreground(found)


def parse_fill(fill: Any, channels: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Check the values that stand in the background: one, or one per channel, in the image's own dtype. Raises ValueError."""
    values = tuple(fill) if isinstance(fill, (list, tuple)) else (fill,)
    if len(values) not in (1, channels) or not all(isinstance(value, Real) for value in values):
        raise ValueError(f"fill={fill!r} must be a number, or one for each of the {channels} channels")
    if not dtype.is_floating_point and any(
        float(torch.tensor(value, dtype=torch.float64).to(dtype)) != value for value in map(float, values)
    ):
        raise ValueError(f"fill={fill!r} must be values of a pixel as it is stored, and {dtype} does not have them")
    return tuple(map(float, values))


def broadcast_mask(mask: Tensor, ndim: int, axes: tuple[int, int]) -> Tensor:
    """Return a mask (N or 1, height, width) as it broadcasts to a map whose height and width stand in `axes`, N in dimension 0."""
    rows, cols = axes
    if cols < rows:
        mask = mask.transpose(1, 2)
    shape = [1] * ndim
    if mask.shape[0] > 1:
        shape[0] = mask.shape[0]
    shape[min(axes)], shape[max(axes)] = mask.shape[1], mask.shape[2]
    return mask.reshape(shape)
