"""Masked image modelling: MAE, BEiT and MaskFeat."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widefield.components.data_sample import DataSample
from widefield.components.models.base_model import BaseSelfSupervisor
from widefield.components.transforms.masks import MASK_GENERATORS, MaskGeneratorConfig
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module()
class MAE(BaseSelfSupervisor):
    """Masked autoencoder: the pixels of patches that the backbone did not see are predicted from those that it saw.

    He et al., 2021, https://arxiv.org/abs/2111.06377. The parts are MAEViT, MAEPretrainDecoder and MAEPretrainHead.
    """

    def extract_feat(self, inputs: Tensor) -> Any:
        """Return the features of images (N, C, H, W) of which nothing is left out."""
        return self.backbone(inputs, mask=None)

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        self._require("neck", "head")
        latent, mask, ids_restore = self.backbone(inputs)
        return {"loss": self.head.loss(self.neck(latent, ids_restore), inputs, mask)}


class DrawsMasks(BaseSelfSupervisor):
    """A model of images whose patches are masked as their samples say.

    Args:
        mask_generator: Draws the masks of samples that bring none, such as `{type: RandomMaskGenerator, input_size: 14}` or
            `{type: BEiTMaskGenerator, input_size: 14, num_masking_patches: 75, min_num_patches: 16}`.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    def __init__(self, mask_generator: MaskGeneratorConfig = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_generator = None if mask_generator is None else MASK_GENERATORS.build(mask_generator)

    def _masks(self, data_samples: Sequence[DataSample], images: Tensor) -> Tensor:
        """Return the masks of the samples as a bool tensor (N, rows, columns); those of samples without are drawn.

        Args:
            data_samples: One for each image, with a `mask` or without; none at all count as without.
            images: Of the samples; the result is on their device.

        Raises:
            WrongArgumentError: There is neither a mask nor a generator.
        """
        samples = data_samples or [DataSample() for _ in images]
        draw: Any = self.mask_generator
        if draw is None and not all("mask" in sample for sample in samples):
            raise WrongArgumentError(
                "samples have no mask; give the model a mask_generator such as {type: BEiTMaskGenerator, input_size: 14, "
                "num_masking_patches: 75}, or set the masks in the data set with DataSample.set_mask"
            )
        masks = [sample.mask if "mask" in sample else draw() for sample in samples]
        return torch.stack([mask.bool() for mask in masks]).to(images.device)


@MODELS.register_module()
class BEiT(DrawsMasks):
    """BEiT, v1 and v2: visual tokens of masked patches are predicted.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254; Peng et al., 2022, https://arxiv.org/abs/2208.06366. The backbone is
    BEiTPretrainViT. v1 has DALLEEncoder and BEiTV1Head; v2 has VQKD, BEiTV2Neck and BEiTV2Head, and the backbone returns an early
    and its last layer. The data preprocessor is TwoNormDataPreprocessor, for the target generator has a normalisation of its own.
    """

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of v1 as `loss`, those of v2 as `loss_1` (final features) and `loss_2` (those from the class token).

        Args:
            inputs: The images twice, each (N, C, H, W): for the backbone and for the target generator.
            data_samples: With a `mask` (rows, columns), 1 for masked patches, or without one.
        """
        self._require("head", "target_generator")
        if isinstance(inputs, Tensor) or len(inputs) != 2:
            raise WrongArgumentError(
                "BEiT takes images in two normalisations, [for the backbone, for the target generator]; use "
                "data_preprocessor={type: TwoNormDataPreprocessor, ...}"
            )
        mask = self._masks(data_samples, inputs[0])
        features = self.backbone(inputs[0], mask)
        target = self.target_generator(inputs[1])
        if not self.with_neck:
            return {"loss": self.head.loss(features[-1], target, mask)}
        final, aggregated = self.neck(features, rel_pos_bias=self.backbone.shared_rel_pos_bias)
        losses = self.head.loss(final, aggregated, target, mask)
        return {"loss_1": losses[0], "loss_2": losses[1]}


@MODELS.register_module()
class MaskFeat(DrawsMasks):
    """MaskFeat: features of masked patches, such as histograms of oriented gradients, are predicted.

    Wei et al., 2021, https://arxiv.org/abs/2112.09133. The parts are MaskFeatViT, LinearNeck without norm, MIMHead and
    HOGGenerator. Targets are those of the normalised image.
    """

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss.

        Args:
            inputs: Images (N, C, H, W).
            data_samples: With a `mask` (rows, columns), 1 for masked patches, or without one.
        """
        self._require("neck", "head", "target_generator")
        mask = self._masks(data_samples, inputs)
        tokens = self.backbone(inputs, mask)
        predicted = self.neck((tokens,))[0][:, 1:]  # without the class token
        return {"loss": self.head.loss(predicted, self.target_generator(inputs), mask.flatten(1))}
