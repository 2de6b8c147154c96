"""From a file to a tensor of pixels."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from widefield.images import ImageFile, ImageReadError, open_image, warn_of_dropped_alpha

_BY_PILLOW = re.compile(rb"\x89PNG\r\n\x1a\n.{16}[^\x10]|\xff\xd8\xff|RIFF....WEBP|P[1-6]\s|BM|GIF8", re.DOTALL)
"""First bytes of pictures that Pillow decodes faster: not PNG of 16 bits, which it cuts to 8."""

Reduction = Callable[[int, int], float]
"""A function of height and width: how many times smaller an image may be decoded."""


def read_pixels(path: Path, num_channels: int, reduction: Reduction | None = None) -> Tensor:
    """The whole image (C, H, W) in the type it is stored in; the file's content tells the format.

    Photos and drawings of 8 bits go through Pillow, which is faster for small pictures, all else through `open_image`.

    Args:
        path: The file.
        num_channels: Channels that it is to have.
        reduction: A JPEG is decoded at a half, a quarter or an eighth of its size where this allows it, in a fraction of the time;
            of a pyramid the smallest level that it allows is read.

    Raises:
        ImageReadError: It is no image, truncated or corrupt, or its channels cannot become `num_channels`.
        OSError: It cannot be read at all.
    """
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(32)
    if _BY_PILLOW.match(start) and path.suffix.lower() != ".mrxs":  # a slide that begins with its thumbnail
        with path.open("rb") as file:
            return with_channels(_by_pillow(path, file, num_channels, reduction), num_channels, str(path), alpha=True)
    try:
        image = open_lazily(path, num_channels)
        if reduction is not None:
            image = open_lazily(path, num_channels, _level(image.levels, reduction))
    except ValueError as error:  # an array that may be (C, H, W) or (H, W, C)
        raise ImageReadError(str(error)) from error
    return with_channels(torch.from_numpy(image.read(0, 0, *image.shape[1:])), num_channels, str(path))


def open_lazily(path: Path, num_channels: int, level: int | None = None, spacing: float | None = None) -> ImageFile:
    """Open a file as `open_image` does; a channel that is marked as alpha is kept where it is one of `num_channels`."""
    image = open_image(path, level, spacing=spacing, alpha="keep")
    return image if image.shape[0] == num_channels else open_image(path, level, spacing=spacing)


def _level(levels: Sequence[tuple[int, int]], reduction: Reduction) -> int:
    """The last level that is not smaller than `reduction` allows."""
    (height, width), factor = levels[0], reduction(*levels[0])
    return max(k for k, (h, w) in enumerate(levels) if h * factor >= height and w * factor >= width)


def _by_pillow(path: Path, file: BinaryIO, num_channels: int, reduction: Reduction | None) -> Tensor:
    try:
        with Image.open(file) as opened:
            if reduction is not None and opened.format == "JPEG":
                factor = reduction(opened.height, opened.width)
                opened.draft(None, (math.ceil(opened.width / factor), math.ceil(opened.height / factor)))
            image: Image.Image = opened
            if image.mode in ("P", "PA", "YCbCr", "HSV", "LAB") or (image.mode == "CMYK" and num_channels == 3):
                image = image.convert("RGB")
            elif image.mode == "1":
                image = image.convert("L")
            pixels = as_tensor(image)
            # Pillow has 16 bits of a PGM in an integer of 32
            return pixels.to(torch.uint16) if opened.format == "PPM" and image.mode == "I" else pixels
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "the file is empty" if not path.stat().st_size else str(error).partition("\n")[0]
        raise ImageReadError(f"cannot read {path}: {reason}") from error


def as_tensor(image: Any) -> Tensor:
    """A tensor (C, H, W) of a tensor (C, H, W) or (H, W), of an array (H, W, C) or (H, W), or of a Pillow image.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(image, Image.Image):
        image = np.array(image)
    if isinstance(image, np.ndarray):
        image = image if image.ndim == 2 else image.transpose(2, 0, 1)
        image = torch.from_numpy(np.require(image, requirements="W"))
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor) else ""
        raise TypeError(
            f"an image must be a tensor (C, H, W), an array (H, W, C) or a Pillow image: got {type(image).__name__}{shape}"
        )
    if image.dtype == torch.bool:
        image = image.to(torch.uint8) * 255
    return image if image.ndim == 3 else image[None]


def with_channels(image: Tensor, num_channels: int, name: str, alpha: bool = False) -> Tensor:
    """`image` (C, H, W) with `num_channels`: grey is repeated to 3, and with `alpha` a channel behind grey or colours dropped.

    Raises:
        ImageReadError: It has another number of channels.
    """
    channels = image.shape[0]
    if channels == num_channels:
        return image
    if alpha and channels in (2, 4):
        warn_of_dropped_alpha(name, channels)
        image = image[:-1]
    if len(image) == num_channels:
        return image
    if len(image) == 1 and num_channels == 3:
        return image.expand(3, -1, -1)
    raise ImageReadError(
        f"cannot use {name}: it has {channels} channels and {num_channels} are expected; "
        f'say transform_args={{"num_channels": {channels}}} if all images are so'
    )
