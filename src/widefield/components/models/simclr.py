"""SimCLR."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from widefield.components.data_sample import DataSample
from widefield.components.models.base_self_supervisor import BaseSelfSupervisor, two_views
from widefield.components.models.gather import gather_with_gradients
from widefield.registry import MODELS


@MODELS.register_module()
class SimCLR(BaseSelfSupervisor):
    """SimCLR: two views of an image are nearer to each other than to those of all other images in the batch.

    Chen et al., 2020, https://arxiv.org/abs/2002.05709, equation 1. The parts are any backbone, NonLinearNeck and ContrastiveHead,
    which has the temperature. The batch is that of all processes.
    """

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """The loss of two views, in a list, each (N, C, H, W)."""
        self._require("neck", "head")
        first, second = two_views(inputs)
        projected = functional.normalize(self.neck(self.backbone(torch.cat([first, second])))[0], dim=1)
        z = torch.cat([gather_with_gradients(view) for view in projected.chunk(2)])
        similarity = z @ z.T
        count = len(z)
        itself = torch.eye(count, dtype=torch.bool, device=z.device)
        pair = itself.roll(count // 2, dims=1)
        positive = similarity[pair][:, None]
        negative = similarity[~(itself | pair)].view(count, count - 2)
        return {"loss": self.head.loss(positive, negative)}
