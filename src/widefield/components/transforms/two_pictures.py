"""One crop of an image in two sizes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from widefield.registry import TRANSFORMS
from widefield.streaming import LazyImage

Interpolation = Literal["bilinear", "bicubic"]


@TRANSFORMS.register_module()
class RandomResizedCropAndInterpolationWithTwoPic:
    """A random crop, as that of Inception, resized twice: for the model and for the target generator.

    Of a lazily read image just the crop is read. Bao et al., 2021, https://arxiv.org/abs/2106.08254, section 2.5.

    Args:
        size: Side, or height and width, of the first picture in pixels.
        second_size: That of the second; None is `size`.
        scale: Least and greatest share of the image's area that the crop has.
        ratio: Least and greatest ratio of its width and height.
        interpolation: How the first picture is resized.
        second_interpolation: How the second is.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        second_size: int | Sequence[int] | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bicubic",
        second_interpolation: Interpolation = "bicubic",
    ) -> None:
        self.size = _height_and_width(size)
        self.second_size = self.size if second_size is None else _height_and_width(second_size)
        self.interpolation = interpolation
        self.second_interpolation = second_interpolation
        self.scale = list(scale)
        self.ratio = list(ratio)

    def __call__(self, image: Tensor | LazyImage) -> tuple[Tensor, Tensor]:
        """The two pictures (C, height, width), of the type of the image (C, H, W)."""
        whole = torch.empty(1, *image.shape[-2:], device="meta")
        top, left, height, width = RandomResizedCrop.get_params(whole, self.scale, self.ratio)
        if isinstance(image, Tensor):
            crop = image[..., top : top + height, left : left + width]
        else:
            crop = torch.as_tensor(image.read(top, left, height, width))
        first = transforms.resize(crop, self.size, InterpolationMode(self.interpolation), antialias=True)
        second = transforms.resize(crop, self.second_size, InterpolationMode(self.second_interpolation), antialias=True)
        return first, second


def _height_and_width(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
