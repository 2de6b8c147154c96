"""Masked autoencoders."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from widefield.components.data_sample import DataSample
from widefield.components.models.base_self_supervisor import BaseSelfSupervisor
from widefield.registry import MODELS


@MODELS.register_module()
class MAE(BaseSelfSupervisor):
    """Masked autoencoder: the pixels of patches that the backbone did not see are predicted from those that it saw.

    He et al., 2021, https://arxiv.org/abs/2111.06377. The parts are MAEViT, MAEPretrainDecoder and MAEPretrainHead.
    """

    def extract_feat(self, inputs: Tensor) -> Any:
        """The features of images (N, C, H, W) of which nothing is left out."""
        return self.backbone(inputs, mask=None)

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        self._require("neck", "head")
        latent, mask, ids_restore = self.backbone(inputs)
        return {"loss": self.head.loss(self.neck(latent, ids_restore), inputs, mask)}
