"""Test-time augmentation: an image as it is, flipped and in part, whose scores are averaged."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.components.models.features import background_of
from widefield.data.pipeline import Picture
from widefield.images import Background, Mask

Region = tuple[int, int, int, int]
"""(y, x, height, width) in pixels."""


@dataclass(frozen=True)
class AveragedViews:
    """Views of an image: all combinations of the flips, of the whole image or of five crops. Nothing is read to make them.

    Attributes:
        hflip: Also as in a mirror.
        vflip: Also upside down.
        crop: Side of square crops, in pixels, in the four corners and the middle; None takes the whole image.
    """

    hflip: bool = False
    vflip: bool = False
    crop: int | None = None

    @classmethod
    def parse(cls, text: str) -> "AveragedViews":
        """From a text such as `hflip,vflip,crop=224`.

        Raises:
            ValueError: Something else is in it.
        """
        options: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name in ("hflip", "vflip") and not value:
                options[name] = True
            elif name == "crop" and value.isdecimal() and int(value) > 0:
                options[name] = int(value)
            else:
                raise ValueError(f"got {part.strip()!r}; give hflip, vflip and crop=SIDE, separated by commas")
        return cls(**options)

    def of(self, picture: Picture) -> list[Picture]:
        """The views of a picture: a tensor (C, H, W) or a lazily read image. They share its memory, or read from it.

        Raises:
            ValueError: It is smaller than the crop.
        """
        flips = itertools.product((False, True)[: 1 + self.vflip], (False, True)[: 1 + self.hflip])
        parts = [picture] if self.crop is None else [_part(picture, *region) for region in self._regions(picture)]
        return [_flipped(part, *flip) for flip in flips for part in parts]

    def _regions(self, picture: Picture) -> list[Region]:
        side, (height, width) = self.crop, picture.shape[-2:]
        assert side is not None
        if side > min(height, width):
            raise ValueError(f"crop={side} is larger than an image of {height} x {width} pixels")
        bottom, right = height - side, width - side
        corners = [(y, x) for y in (0, bottom) for x in (0, right)]
        return [(y, x, side, side) for y, x in (*corners, (bottom // 2, right // 2))]


@dataclass(frozen=True)
class LazyView:
    """A region of a lazily read image, as it is or flipped, that is itself read lazily."""

    image: Any
    region: Region
    upside_down: bool = False
    mirrored: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.image.shape[0], *self.region[2:])

    @property
    def dtype(self) -> Any:
        """That of the image."""
        return self.image.dtype

    @property
    def background(self) -> Background | None:
        """That of the whole image, turned as the view is. A part of it has none: cells of the mask may lie across its border.

        Raises:
            ValueError: A part of an image whose mask was asked for by name.
        """
        found = background_of(self.image)
        if found is None:
            return None
        if self.region != (0, 0, *self.image.shape[1:]):
            if found.required:
                raise ValueError("crops of an image take no mask; average without crop=SIDE, or take foreground none")
            return None
        turned = found.mask.cells[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]
        return replace(found, mask=Mask(np.ascontiguousarray(turned)))

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """A region of the view."""
        top, left, full_height, full_width = self.region
        if self.upside_down:
            y = full_height - y - height
        if self.mirrored:
            x = full_width - x - width
        pixels = np.asarray(self.image.read(top + y, left + x, height, width))
        rows, columns = (slice(None, None, -1 if flip else None) for flip in (self.upside_down, self.mirrored))
        return np.ascontiguousarray(pixels[:, rows, columns])


def averaged(
    predict: Callable[[list[Picture]], list[Tensor]], pictures: Sequence[Picture], views: AveragedViews
) -> list[Tensor]:
    """The mean over the views of each picture of what `predict` gives for one of them."""
    means = []
    for picture in pictures:
        scores = [predict([view])[0] for view in views.of(picture)]
        means.append(torch.stack(scores).mean(0))
    return means


def _part(picture: Picture, y: int, x: int, height: int, width: int) -> Picture:
    if isinstance(picture, Tensor):
        return picture[..., y : y + height, x : x + width]
    return LazyView(picture, (y, x, height, width))  # type: ignore[return-value]


def _flipped(picture: Picture, upside_down: bool, mirrored: bool) -> Picture:
    if not upside_down and not mirrored:
        return picture
    if isinstance(picture, Tensor):
        return picture.flip([axis for axis, flip in ((-2, upside_down), (-1, mirrored)) if flip])
    if isinstance(picture, LazyView):
        return LazyView(picture.image, picture.region, upside_down, mirrored)  # type: ignore[return-value]
    return LazyView(picture, (0, 0, *picture.shape[1:]), upside_down, mirrored)  # type: ignore[return-value]
