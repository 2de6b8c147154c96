"""Masked image modelling."""

from torch import Tensor

from widefield.components.annotations import InitConfig, LossConfig
from widefield.components.base_module import BaseModule
from widefield.registry import MODELS


@MODELS.register_module()
class MIMHead(BaseModule):
    """Compares predictions with targets under a mask.

    Args:
        loss: Called with predictions, targets and mask.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"

    def __init__(self, loss: LossConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss)

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss; predictions, targets and mask are what the loss takes."""
        loss: Tensor = self.loss_module(pred, target, mask)
        return loss
