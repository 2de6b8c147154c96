"""Focal loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.losses.labels import label_scores
from widefield.components.losses.reduction import Reduction, check_reduction, weight_reduce_loss
from widefield.registry import MODELS


@MODELS.register_module()
class FocalLoss(nn.Module):
    """Binary cross-entropy of each class, in which what is right already counts little.

    -a (1 - p)^gamma log p, with p the probability of the true answer, and a = alpha where the label is positive and 1 - alpha where
    it is not (Lin et al., 2017, https://arxiv.org/abs/1708.02002).

    Args:
        gamma: How little.
        alpha: The weight of positive labels.
        reduction: How the losses of the labels become one.
        loss_weight: Multiplied with the result.
    """

    component_kind = "loss"

    def __init__(
        self, gamma: float = 2.0, alpha: float = 0.25, reduction: Reduction = "mean", loss_weight: float = 1.0
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.gamma = gamma
        self.alpha = alpha
        self.reduction = reduction
        self.loss_weight = loss_weight

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """The loss of logits (N, C).

        Args:
            pred: Logits.
            target: Class indices (N,) or (N, 1), or scores (N, C).
            weight: A factor per image (N,), or per label (N, C).
            avg_factor: What the mean divides by instead of the number of labels.
            reduction_override: Instead of the loss's own reduction.
        """
        target = label_scores(target, pred.shape[1]).to(torch.promote_types(pred.dtype, torch.float32))
        pred = pred.to(target)
        p = pred.sigmoid()
        wrong = (1 - p) * target + p * (1 - target)
        wrong = wrong.clamp(min=torch.finfo(wrong.dtype).tiny)  # at 0 the slope of a root would be infinite
        alpha = self.alpha * target + (1 - self.alpha) * (1 - target)
        cross_entropy = functional.binary_cross_entropy_with_logits(pred, target, reduction="none")
        loss = alpha * wrong**self.gamma * cross_entropy
        return self.loss_weight * weight_reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)
