"""Random changes that torchvision does not have as recipes of image classification want them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from widefield.errors import WrongArgumentError
from widefield.registry import TRANSFORMS, Range
from widefield.streaming import LazyImage

_CHANNELS = 3


@TRANSFORMS.register_module()
class TimmRandAugment:
    """RandAugment as timm has it: its changes become stronger with the magnitude, which is drawn anew for each of them.

    Cubuk et al., 2019, https://arxiv.org/abs/1909.13719; the recipe of timm is `rand-m9-n2-mstd0.5-inc1`.

    Args:
        magnitude: From 0 to 10.
        magnitude_std: Standard deviation of the magnitude.
        num_ops: Changes that are drawn for an image; each is made with probability 1/2.
        fill: Red, green and blue of pixels that come from outside of the image.
        interpolation: How pixels are computed where an image is rotated, sheared or moved.
    """

    def __init__(
        self,
        magnitude: Annotated[float, Range(0, 10)] = 9,
        magnitude_std: Annotated[float, Range(0)] = 0.5,
        num_ops: Annotated[int, Range(1)] = 2,
        fill: Sequence[int] = (128, 128, 128),
        interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic",
    ) -> None:
        resample = Image.Resampling[interpolation.upper()]
        hparams = {"img_mean": tuple(fill), "interpolation": resample}
        self._augment = rand_augment_transform(f"rand-n{num_ops}-mstd{magnitude_std}-inc1", hparams)
        for op in self._augment.ops:
            op.magnitude = magnitude  # the text takes whole numbers alone

    def __call__(self, image: Tensor | LazyImage) -> Tensor:
        """Return the image, uint8 (3, H, W), changed."""
        if not isinstance(image, Tensor):
            image = torch.as_tensor(image.read(0, 0, *image.shape[-2:]))
        if image.dtype != torch.uint8 or image.shape[-3] != _CHANNELS:
            raise WrongArgumentError(
                f"TimmRandAugment takes images of 3 channels of 8 bits, got {image.shape[-3]} of {image.dtype}; "
                "write {type: RGB} before it"
            )
        changed: Tensor = functional.pil_to_tensor(self._augment(functional.to_pil_image(image)))
        return changed


@TRANSFORMS.register_module()
class RandomNoiseErasing(v2.RandomErasing):
    """Replaces a random box of an image, before it is normalised, by normally distributed noise.

    Zhong et al., 2017, https://arxiv.org/abs/1708.04896.

    Args:
        p: Probability of it.
        scale: Least and greatest share of the image's area that the box has.
        ratio: Least and greatest ratio of its height and width.
        mean, std: Of the noise, for each channel, in the units of the pixels.
    """

    def __init__(
        self,
        p: Annotated[float, Range(0, 1)] = 0.25,
        scale: Sequence[float] = (0.02, 1 / 3),
        ratio: Sequence[float] = (0.3, 10 / 3),
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(p, scale, ratio)
        self.mean, self.std = list(mean), list(std)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the box and the noise in it; torchvision draws the box."""
        params: dict[str, Any] = super().make_params(flat_inputs)
        if params["v"] is not None:
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            noise: Tensor = torch.randn(len(self.mean), params["h"], params["w"]) * std + mean
            dtype = flat_inputs[0].dtype
            params["v"] = noise if dtype.is_floating_point else noise.round().clamp(0, torch.iinfo(dtype).max)
        return params
