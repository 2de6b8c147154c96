"""BEiT."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.models.base_self_supervisor import BaseSelfSupervisor, batch_mask
from widefield.components.transforms.masks import MASK_GENERATORS, MaskGeneratorConfig
from widefield.registry import MODELS


@MODELS.register_module()
class BEiT(BaseSelfSupervisor):
    """BEiT, v1 and v2: visual tokens of masked patches are predicted.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254; Peng et al., 2022, https://arxiv.org/abs/2208.06366. The backbone is
    BEiTPretrainViT. v1 has DALLEEncoder and BEiTV1Head; v2 has VQKD, BEiTV2Neck and BEiTV2Head, and the backbone returns an early
    and its last layer. The data preprocessor is TwoNormDataPreprocessor, for the target generator has a normalisation of its own.

    Args:
        mask_generator: Draws the masks of samples that bring none, such as `{type: BEiTMaskGenerator, input_size: 14,
            num_masking_patches: 75, min_num_patches: 16}`.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    def __init__(self, mask_generator: MaskGeneratorConfig = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_generator = None if mask_generator is None else MASK_GENERATORS.build(mask_generator)

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """The loss of v1 as `loss`, those of v2 as `loss_1` (final features) and `loss_2` (those from the class token).

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
        mask = batch_mask(data_samples, self.mask_generator, inputs[0])
        features = self.backbone(inputs[0], mask)
        target = self.target_generator(inputs[1])
        if not self.with_neck:
            return {"loss": self.head.loss(features[-1], target, mask)}
        final, aggregated = self.neck(features, rel_pos_bias=self.backbone.shared_rel_pos_bias)
        losses = self.head.loss(final, aggregated, target, mask)
        return {"loss_1": losses[0], "loss_2": losses[1]}
