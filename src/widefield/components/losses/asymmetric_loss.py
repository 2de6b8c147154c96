"""Asymmetric loss."""

import torch
from torch import Tensor, nn

from widefield.components.losses.labels import label_scores
from widefield.components.losses.reduction import Reduction, check_reduction, weight_reduce_loss
from widefield.registry import MODELS


@MODELS.register_module()
class AsymmetricLoss(nn.Module):
    """Focal loss with one exponent for positive labels and another for negative ones.

    -(1 - p)^gamma_pos log p for positive labels, and for negative ones -q^gamma_neg log(1 - q) with q = max(p - clip, 0),
    so that easy ones do not count at all (Ridnik et al., 2020, https://arxiv.org/abs/2009.14119).

    Args:
        gamma_pos: Exponent of positive labels.
        gamma_neg: Exponent of negative labels.
        clip: The probability below which a negative label does not count; None or 0 for no such bound.
        reduction: How the losses of the labels become one.
        loss_weight: Multiplied with the result.
        use_sigmoid: Each class is a question of its own; otherwise the probabilities are those of a softmax.
        eps: Probabilities are at least that inside of the logarithm.
    """

    component_kind = "loss"

    def __init__(
        self,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        clip: float | None = 0.05,
        reduction: Reduction = "mean",
        loss_weight: float = 1.0,
        use_sigmoid: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.clip = clip or 0.0
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.use_sigmoid = use_sigmoid
        self.eps = eps

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
        p = pred.sigmoid() if self.use_sigmoid else pred.softmax(dim=-1)
        right = p * target + (1 - p + self.clip).clamp(max=1) * (1 - target)
        gamma = self.gamma_pos * target + self.gamma_neg * (1 - target)
        # Where `right` is 1, the slope of a root would be infinite, and its product with the slope of the clamp no number.
        loss = -right.clamp(min=self.eps).log() * (1 - right).clamp(min=self.eps) ** gamma
        return self.loss_weight * weight_reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)
