"""From the loss of every element to one number."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from widefield.components.errors import WrongArgumentError

Reduction = Literal["none", "mean", "sum"]


def weight_reduce_loss(
    loss: Tensor, weight: Tensor | None = None, reduction: str = "mean", avg_factor: float | None = None
) -> Tensor:
    """Weight and reduce the losses of elements.

    Args:
        loss: One per element, of any shape.
        weight: Multiplied with them. A mean still divides by the number of elements, not by the sum of weights.
        reduction: "none", "mean" or "sum".
        avg_factor: What a mean divides the sum by instead.

    Raises:
        ValueError: An `avg_factor` for a sum, or an unknown reduction.
    """
    check_reduction(reduction)
    if weight is not None:
        loss = loss * weight
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


def check_reduction(reduction: str) -> None:
    """Refuse an unknown reduction."""
    if reduction not in ("none", "mean", "sum"):
        raise WrongArgumentError(f"reduction={reduction!r} is not one of 'none', 'mean', 'sum'")
