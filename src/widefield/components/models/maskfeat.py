"""MaskFeat."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from widefield.components.data_sample import DataSample
from widefield.components.models.base_self_supervisor import BaseSelfSupervisor, batch_mask
from widefield.components.transforms.masks import MASK_GENERATORS, MaskGeneratorConfig
from widefield.registry import MODELS


@MODELS.register_module()
class MaskFeat(BaseSelfSupervisor):
    """MaskFeat: features of masked patches, such as histograms of oriented gradients, are predicted.

    Wei et al., 2021, https://arxiv.org/abs/2112.09133. The parts are MaskFeatViT, LinearNeck without norm, MIMHead and
    HOGGenerator. Targets are those of the normalised image.

    Args:
        mask_generator: Draws the masks of samples that bring none, such as `{type: RandomMaskGenerator, input_size: 14}`.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    def __init__(self, mask_generator: MaskGeneratorConfig = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_generator = None if mask_generator is None else MASK_GENERATORS.build(mask_generator)

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """The loss.

        Args:
            inputs: Images (N, C, H, W).
            data_samples: With a `mask` (rows, columns), 1 for masked patches, or without one.
        """
        self._require("neck", "head", "target_generator")
        mask = batch_mask(data_samples, self.mask_generator, inputs)
        tokens = self.backbone(inputs, mask)
        predicted = self.neck((tokens,))[0][:, 1:]  # without the class token
        return {"loss": self.head.loss(predicted, self.target_generator(inputs), mask.flatten(1))}
