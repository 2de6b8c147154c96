"""Absolute difference."""

from torch import Tensor, nn

from widefield.components.errors import WrongArgumentError
from widefield.components.losses.labels import label_scores
from widefield.components.losses.reduction import Reduction, check_reduction, weighted_loss
from widefield.registry import MODELS


@weighted_loss
def l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """The absolute difference of every element."""
    if pred.shape != target.shape or not target.numel():
        raise WrongArgumentError(
            f"predictions of shape {tuple(pred.shape)} are compared with targets of shape {tuple(target.shape)}; "
            f"give targets of the same shape, of one element at least"
        )
    return (pred - target).abs()


@MODELS.register_module(replaceable=True)
class L1Loss(nn.Module):
    """Absolute difference of predictions and targets.

    Without `avg_factor` the mean is that of all elements. With the number of images as `avg_factor`, as heads of classification
    give it, the loss is the mean over images of the L1 distance, summed over classes.

    Args:
        reduction: How the losses of the elements become one.
        loss_weight: Multiplied with the result.
    """

    component_kind = "loss"

    def __init__(self, reduction: Reduction = "mean", loss_weight: float = 1.0) -> None:
        super().__init__()
        check_reduction(reduction)
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
        """The loss of predictions of any shape.

        Args:
            pred: Predictions.
            target: Of the same shape; or, for predictions (N, C), class indices (N,), which are compared as one-hot scores.
            weight: A factor per element, or per index along the first axes, such as (B, L) for (B, L, C).
            avg_factor: What the mean divides by instead of the number of elements.
            reduction_override: Instead of the loss's own reduction.
        """
        if pred.ndim == 2 and target.shape != pred.shape:
            target = label_scores(target, pred.shape[1])
        reduction = reduction_override or self.reduction
        return self.loss_weight * l1_loss(pred, target, weight, reduction=reduction, avg_factor=avg_factor)
