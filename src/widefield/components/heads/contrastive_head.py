"""Contrastive learning."""

import torch
from torch import Tensor

from widefield.components.annotations import InitConfig, LossConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module()
class ContrastiveHead(BaseModule):
    """Classification of the positive pair among the negative ones, InfoNCE.

    van den Oord et al., 2018, https://arxiv.org/abs/1807.03748, equation 4; with a temperature as in SimCLR.

    Args:
        loss: Called with scores (N, 1 + K) and the class 0 for each.
        temperature: Similarities are divided by it.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"

    def __init__(
        self,
        loss: LossConfig = {"type": "CrossEntropyLoss"},  # noqa: B006  # read, never written
        temperature: float = 0.1,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        if temperature <= 0:
            raise WrongArgumentError(f"temperature={temperature} must be positive")
        self.loss_module = MODELS.build(loss)
        self.temperature = temperature

    def loss(self, pos: Tensor, neg: Tensor) -> Tensor:
        """The loss of similarities.

        Args:
            pos: Of the positive pairs, (N, 1).
            neg: Of the negative pairs, (N, K).
        """
        score = torch.cat([pos, neg], dim=1) / self.temperature
        label = torch.zeros(len(score), dtype=torch.long, device=score.device)
        loss: Tensor = self.loss_module(score, label)
        return loss
