"""Prediction of one view's features from those of another."""

from torch import Tensor

from widefield.components.annotations import InitConfig, LossConfig, NeckConfig
from widefield.components.base_module import BaseModule
from widefield.registry import MODELS


@MODELS.register_module()
class LatentPredictHead(BaseModule):
    """Compares what a predictor makes of one view with the other view, which gets no gradient.

    Grill et al., 2020 (BYOL), https://arxiv.org/abs/2006.07733; Chen and He, 2020 (SimSiam), https://arxiv.org/abs/2011.10566.

    Args:
        loss: Called with predictions and targets.
        predictor: A neck.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"

    def __init__(self, loss: LossConfig, predictor: NeckConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss)
        self.predictor = MODELS.build(predictor)

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of features (N, C) of one view against those of the other."""
        predicted = self.predictor((input,))[0]
        loss: Tensor = self.loss_module(predicted, target.detach())
        return loss
