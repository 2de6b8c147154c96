"""What data preprocessors share."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.errors import WrongArgumentError
from widefield.registry import MODELS, ComponentOf
from widefield.streaming.image import Normalisation

_log = logging.getLogger(__name__)
_SCALED = 2.0
"""Means of images from 0 to 1 are smaller, of those from 0 to 255 larger."""
PreprocessorConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "preprocessor", typed=False)]


class BaseDataPreprocessor(nn.Module):
    """Normalises images, and makes one tensor of those of a batch.

    Called with `{inputs: ..., data_samples: ...}` and whether the model trains; it returns such a dictionary. A subclass writes
    `forward`.

    Attributes:
        normalisation: What is done to pixels; a streamed backbone does it tile by tile.

    Args:
        mean, std: Per channel, in units of the pixels: from 0 to 255 for 8 bits. Without them integers are divided by the
            largest value of their type.
        pad_size_divisor: Images are padded at the bottom and on the right to multiples of it.
        pad_value: What they are padded with, after normalising.
        to_rgb: Accepted and without effect: images are read as RGB, so there is no BGR to be turned around. A `mean` and `std` in
            the order of BGR are to be written in that of RGB.
    """

    component_kind = "preprocessor"

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        pad_size_divisor: int = 1,
        pad_value: float = 0,
        to_rgb: bool = False,
    ) -> None:
        super().__init__()
        if pad_size_divisor < 1:
            raise WrongArgumentError(f"pad_size_divisor={pad_size_divisor} must be positive; 1 pads nothing")
        self.normalisation = pixel_normalisation(mean, std)
        self._saw_floats = False
        self.pad_size_divisor = pad_size_divisor
        self.pad_value = pad_value

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it."""
        raise NotImplementedError

    def batch(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Images (N, C, H, W), or a list of (C, h, w), normalised and padded to one size, as a tensor (N, C, H, W)."""
        self._warn_of_scaled(images)
        if isinstance(images, Tensor):
            return self._pad(normalised(images, self.normalisation), images.shape[-2:])
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        return torch.stack([self._pad(normalised(image, self.normalisation), (height, width)) for image in images])

    def _warn_of_scaled(self, images: Tensor | Sequence[Tensor]) -> None:
        """Once, of floats from 0 to 1 beside a `mean` for 8 bits: everything would come out nearly the same."""
        if self._saw_floats or self.normalisation.mean is None or not len(images) or not images[0].is_floating_point():
            return
        self._saw_floats = True  # later batches are not looked at: on a GPU that would wait for it
        if max(self.normalisation.mean) > _SCALED and float(images[0].max()) <= 1:
            _log.warning(
                "images are floats up to 1, and mean=%s is in units of 8 bits; divide mean and std by 255, or give 8 bits",
                list(self.normalisation.mean),
            )

    def _pad(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """`image`, padded to `size` and to a multiple of the divisor."""
        if image.ndim < 3:
            return image
        below, right = (
            -(-n // self.pad_size_divisor) * self.pad_size_divisor - own
            for n, own in zip(size, image.shape[-2:], strict=True)
        )
        return functional.pad(image, (0, right, 0, below), value=self.pad_value) if below or right else image


def pixel_normalisation(mean: Sequence[float] | float | None, std: Sequence[float] | float | None) -> Normalisation:
    """(x - mean) / std of pixels as they are stored; without both, integers divided by the largest value of their type."""
    try:
        return Normalisation.parse(mean, std, None if mean is None else (0.0, 1.0))
    except ValueError as error:
        raise WrongArgumentError(str(error)) from error


def normalised(image: Tensor, normalisation: Normalisation) -> Tensor:
    """`image` (..., C, H, W) normalised; integers become torch's default floating-point type, floats keep theirs."""
    if normalisation.mean is not None:
        _check_channels(image.shape[-3], normalisation.mean)
    if image.is_floating_point():
        return normalisation.apply(image, image.dtype)
    default = torch.get_default_dtype()  # with 16 bits a mean of 123.675 would be another one
    return normalisation.apply(image, torch.promote_types(default, torch.float32)).to(default)


def _check_channels(channels: int, mean: Sequence[float]) -> None:
    if len(mean) not in (1, channels):
        raise WrongArgumentError(
            f"mean and std have {len(mean)} values, the image has {channels} channels; give one per channel, or "
            "images of as many, as {type: RGB} under transforms makes them"
        )
