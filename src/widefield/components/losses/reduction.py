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
        weight: Multiplied with them: a factor per element, or per index along the first axes, such as (N,) for losses (N, C). A
            mean still divides by the number of elements, not by the sum of weights.
        reduction: "none", "mean" or "sum".
        avg_factor: What a mean divides the sum by instead.

    Raises:
        ValueError: An `avg_factor` for a sum, an unknown reduction, or weights that fit neither the elements nor the first axes.
    """
    check_reduction(reduction)
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


def _along_first_axes(weight: Tensor, loss: Tensor) -> Tensor:
    """`weight` with axes of length 1 at its end where it has fewer than `loss`.

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


def check_reduction(reduction: str) -> None:
    """Refuse an unknown reduction."""
    if reduction not in ("none", "mean", "sum"):
        raise WrongArgumentError(f"reduction={reduction!r} is not one of 'none', 'mean', 'sum'")
