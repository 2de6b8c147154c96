"""From the loss of every element to one number."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.errors import WrongArgumentError

Reduction = Literal["none", "mean", "sum"]


def weight_reduce_loss(
    loss: Tensor, weight: Tensor | None = None, reduction: str = "mean", avg_factor: float | None = None
) -> Tensor:
    """Weight and reduce the losses of elements.

    Args:
        loss: One per element, of any shape.
        weight: Multiplied with them: a factor per element, or per index along the first axes, such as (N,) for losses (N, C). A
            mean still divides by the number of elements, not by the sum of weights.
        reduction: "none", "mean" or "sum".
        avg_factor: What a mean divides the sum by instead.

    Raises:
        ValueError: An `avg_factor` for a sum, an unknown reduction, or weights that fit neither the elements nor the first axes.
    """
    _check_reduction(reduction)
    if weight is not None:
        loss = loss * _along_first_axes(weight, loss)
    if reduction == "none":
        return loss
    if reduction == "sum":
        if avg_factor is not None:
            raise ValueError('avg_factor can not be used with reduction="sum"')
        return loss.sum()
    return loss.mean() if avg_factor is None else loss.sum() / avg_factor


def weighted_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate `loss(pred, target, **options)`, which gives the loss of every element.

    It becomes `loss(pred, target, weight=None, reduction="mean", avg_factor=None, **options)`; see `weight_reduce_loss`.
    """

    @functools.wraps(loss)
    def weighted(
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: str = "mean",
        avg_factor: float | None = None,
        **options: Any,
    ) -> Tensor:
        return weight_reduce_loss(loss(pred, target, **options), weight, reduction, avg_factor)

    return weighted


class WeightedLoss(nn.Module):
    """A loss that is weighted and reduced; a subclass writes `elements`.

    Args:
        reduction: How the losses of the elements become one.
        loss_weight: Multiplied with the result.
    """

    component_kind = "loss"

    def __init__(self, reduction: Reduction = "mean", loss_weight: float = 1.0) -> None:
        super().__init__()
        _check_reduction(reduction)
        self.reduction = reduction
        self.loss_weight = loss_weight

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every element, as the subclass documents."""
        raise NotImplementedError

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            pred: Predictions, as `elements` takes them.
            target: What they are compared with.
            weight: A factor per element, or per index along the first axes, such as (N,) for losses (N, C).
            avg_factor: What the mean divides by instead of the number of elements.
            reduction_override: Instead of the loss's own reduction.
        """
        loss = self.elements(pred, target)
        return self.loss_weight * weight_reduce_loss(loss, weight, reduction_override or self.reduction, avg_factor)


def masked_mean(loss: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sum of the losses under `mask`, divided by the sum of `mask`; 0 where it selects nothing.

    Computed in 32 bits at least, for sums of many patches leave the range of 16.

    Args:
        loss: One per element.
        mask: 1 (or True) where a loss counts and 0 elsewhere, of a shape that broadcasts to that of the losses; None is their mean.
    """
    if mask is None:
        return loss.mean()
    mask = mask.to(torch.promote_types(loss.dtype, torch.float32))
    return (loss * mask).sum() / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)


def _along_first_axes(weight: Tensor, loss: Tensor) -> Tensor:
    """Return `weight` with axes of length 1 at its end where it has fewer than `loss`.

    Broadcasting alone would take (N,) for weights of the last axis, and nobody would notice where it has the length N too.
    """
    if weight.ndim == loss.ndim:
        return weight
    if weight.shape != loss.shape[: weight.ndim]:
        raise WrongArgumentError(
            f"weights have the shape {tuple(weight.shape)}, and the losses {tuple(loss.shape)}; "
            f"give one for each loss, or for each index of the first axes"
        )
    return weight.reshape(*weight.shape, *[1] * (loss.ndim - weight.ndim))


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise WrongArgumentError(f"reduction={reduction!r} is not one of 'none', 'mean', 'sum'")
