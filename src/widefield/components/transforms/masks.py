"""Masks of patches and crops of images for masked image modelling, for data sets and models alike."""

import math
from collections.abc import Sequence
from random import Random
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from widefield.errors import WrongArgumentError
from widefield.registry import TRANSFORMS, ComponentOf, Registry
from widefield.streaming import LazyImage

MASK_GENERATORS = Registry("mask generator")
Interpolation = Literal["bilinear", "bicubic"]
MaskGeneratorConfig = Annotated[dict[str, Any] | None, ComponentOf(MASK_GENERATORS)]
_TRIES = 10
_FAILURES = 100
"""Blocks in a row that do not fit, after which single patches are masked: a large least block may never fit."""


@MASK_GENERATORS.register_module()
class RandomMaskGenerator:
    """Masks a share of the patches, each of them with the same probability.

    Args:
        input_size: Rows and columns of patches, or one number for both.
        mask_ratio: The share, above 0 and below 1.
    """

    def __init__(self, input_size: int | Sequence[int], mask_ratio: float = 0.4) -> None:
        self.rows, self.columns = _grid(input_size)
        self.num_masking_patches = round(self.rows * self.columns * mask_ratio)
        if not 0 < self.num_masking_patches < self.rows * self.columns:
            raise WrongArgumentError(
                f"mask_ratio={mask_ratio} masks {self.num_masking_patches} of {self.rows} x {self.columns} patches; "
                "it must mask some and leave some"
            )

    def __call__(self) -> Tensor:
        """A new mask: int64 (rows, columns), 1 where a patch is masked."""
        order = torch.randperm(self.rows * self.columns)
        return (order < self.num_masking_patches).long().view(self.rows, self.columns)


@MASK_GENERATORS.register_module()
class BEiTMaskGenerator:
    """Masks exactly so many patches, in blocks.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254, algorithm 1.

    Args:
        input_size: Rows and columns of patches, or one number for both.
        num_masking_patches: Patches that are masked.
        min_num_patches: Least area of a block, in patches.
        max_num_patches: Greatest area of a block; None is what remains to be masked.
        min_aspect: Least ratio of a block's height and width.
        max_aspect: Greatest ratio; None is 1 / min_aspect.
    """

    def __init__(
        self,
        input_size: int | Sequence[int],
        num_masking_patches: int,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        self.rows, self.columns = _grid(input_size)
        if not 0 < num_masking_patches <= self.rows * self.columns:
            raise WrongArgumentError(
                f"num_masking_patches={num_masking_patches} must be from 1 to {self.rows * self.columns}, the number of patches"
            )
        max_aspect = 1 / min_aspect if max_aspect is None and min_aspect > 0 else max_aspect
        if max_aspect is None or not 0 < min_aspect <= max_aspect:
            raise WrongArgumentError(f"min_aspect={min_aspect} must be positive and at most max_aspect={max_aspect}")
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        self.log_aspects = (math.log(min_aspect), math.log(max_aspect))

    def __call__(self) -> Tensor:
        """A new mask: int64 (rows, columns), 1 where a patch is masked; seeded from torch's default generator."""
        random = Random(int(torch.randint(2**62, (), device="cpu")))
        mask = torch.zeros(self.rows, self.columns, dtype=torch.long)
        remaining, failures = self.num_masking_patches, 0
        while remaining and failures < _FAILURES:
            masked = self._add_block(mask, remaining, random)
            remaining -= masked
            failures = 0 if masked else failures + 1
        left = (mask.view(-1) == 0).nonzero()[:, 0].tolist()
        mask.view(-1)[random.sample(left, remaining)] = 1
        return mask

    def _add_block(self, mask: Tensor, remaining: int, random: Random) -> int:
        """Mask one block more; how many patches of it were not masked before, 0 where none was found that fits."""
        for _ in range(_TRIES):
            area = random.uniform(self.min_num_patches, min(remaining, self.max_num_patches))
            aspect = math.exp(random.uniform(*self.log_aspects))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < self.rows and 0 < width < self.columns):
                continue
            top, left = random.randint(0, self.rows - height), random.randint(0, self.columns - width)
            block = mask[top : top + height, left : left + width]
            new = block.numel() - int(block.sum())
            if 0 < new <= remaining:
                block.fill_(1)
                return new
        return 0


def _grid(input_size: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
    if min(rows, columns) < 1:
        raise WrongArgumentError(f"input_size={input_size} must be rows and columns of patches, both positive")
    return rows, columns


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
