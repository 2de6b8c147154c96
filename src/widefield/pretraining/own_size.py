"""Embeddings of images at their own size, one after the other: whole slides too, which are read tile by tile if streamed."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from widefield.images import ImageReadError
from widefield.pretraining.checkpoint import Checkpoint
from widefield.pretraining.dataset import normalized
from widefield.pretraining.pixels import open_lazily, read_pixels, with_channels
from widefield.pretraining.source import Files, ImageSource, reading
from widefield.pretraining.transform_args import Normalize
from widefield.pretraining.views import to_unit

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """The pixels that a model takes."""

    num_channels: int
    value_range: tuple[float, float] | None
    normalize: Normalize
    dtype: torch.dtype

    @classmethod
    def of(cls, found: Checkpoint, dtype: torch.dtype) -> "Look":
        """As in the training."""
        args = found.views(1).args
        return cls(args.num_channels, args.value_range, found.normalize, dtype)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (C, height, width), normalised."""
        unit = to_unit(pixels, self.value_range)
        return normalized([unit], self.normalize, unit.device)[0].to(self.dtype)


class LazyPixels:
    """An image file as a model sees it, of which only the regions that are asked for are read.

    No dataclass: Lightning takes those apart.
    """

    def __init__(self, image: Any, look: Look, name: str) -> None:
        self._image, self._look, self._name = image, look, name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) as the model sees them."""
        return self._look.num_channels, *self._image.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """That of the model."""
        return self._look.dtype

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        """A region (channels, height, width), normalised.

        Raises:
            ImageReadError: It cannot be read, or has channels that the model does not take.
        """
        pixels = torch.from_numpy(self._image.read(y, x, height, width))
        return self._look(with_channels(pixels, self._look.num_channels, self._name))


def embed_at_own_size(
    model: Callable[[Any], Tensor], source: ImageSource, look: Look, level: int, streams: bool, device: torch.device
) -> tuple[list[int], Tensor]:
    """Numbers of the images that can be read, and their embeddings, float32 (N, D).

    Args:
        model: Gives the embedding (1, D) of an image (1, C, height, width), and where it streams of a `LazyPixels`.
        source: The images.
        look: How the model sees them.
        level: Of a pyramid.
        streams: Whether the model takes files that are read lazily.
        device: Where images go that are read whole.

    Raises:
        ValueError: No image can be used.
    """
    indices, embeddings, reason = [], [], ""
    for index in range(len(source)):
        try:
            image = _open(source, index, look, level)
            whole = isinstance(image, Tensor) or not streams
            pixels = image if isinstance(image, Tensor) else image.read(0, 0, *image.shape[1:]) if whole else image
            embeddings.append(model(pixels[None].to(device) if isinstance(pixels, Tensor) else pixels).float().cpu())
            indices.append(index)
        except (OSError, ValueError, RuntimeError) as error:  # an image may be too small for the model, or too large
            reason = str(error) if isinstance(error, OSError) else f"{source.name(index)}: {error}"
            _log.warning("skipped an image: %s", reason)
    if not embeddings:
        raise ValueError(f"data: none of the images can be used; the last: {reason}")
    return indices, torch.cat(embeddings)


def _open(source: ImageSource, index: int, look: Look, level: int) -> LazyPixels | Tensor:
    """An image of a file, read lazily if its format allows it, else as a tensor (C, height, width)."""
    if not isinstance(source, Files):
        return look(source.read(index, Random(index)))
    path = source.paths[index]
    with reading(path):
        try:
            image = open_lazily(path, look.num_channels)
        except ImageReadError:
            return look(read_pixels(path, look.num_channels))
        if level >= len(image.levels):
            raise ImageReadError(f"cannot use {path}: it has {len(image.levels)} levels and level={level}")
        return LazyPixels(open_lazily(path, look.num_channels, level) if level else image, look, str(path))
