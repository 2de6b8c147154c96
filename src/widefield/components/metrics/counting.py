"""Metrics that count."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from widefield.components.errors import WrongArgumentError


class CountingMetric(Metric):
    """A metric that is computed from sums of counts, whose shape is known with the first batch.

    The sum is the one element of a list, for torchmetrics has to know the shape of every other state beforehand. Processes
    concatenate their lists.
    """

    full_state_update = False
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", default=[], dist_reduce_fx="cat")

    def _add(self, counts: Tensor) -> None:
        """Add the counts of a batch."""
        self.counts = [torch.cat([*self.counts, counts[None]]).sum(0, keepdim=True)]

    def _total(self) -> Tensor:
        """The counts of all batches and processes."""
        total: Tensor = dim_zero_cat(self.counts).sum(0)
        return total


def count_classes(label: Tensor, num_classes: int) -> Tensor:
    """How often each class is among `label` (N,), int64 of shape (num_classes,)."""
    return torch.bincount(label, minlength=num_classes)


def predicted_classes(preds: Tensor, target: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    """Predicted classes (N,), their scores (N,) and the number of classes, of scores (N, C) or of class indices (N,).

    The score of a class index is infinite: no threshold discards it.

    Raises:
        WrongArgumentError: Shapes do not fit, the number of classes is unknown, or there are labels beyond it.
    """
    check_predictions(preds, target)
    if preds.ndim == 2:
        score, label = preds.max(dim=1)
        num_classes = preds.shape[1] if num_classes is None else num_classes
    elif num_classes is None:
        raise WrongArgumentError("the number of classes cannot be told from class indices; give num_classes")
    else:
        score, label = torch.full_like(preds, torch.inf, dtype=torch.get_default_dtype()), preds
    labels = torch.cat([label, target])
    if ((labels < 0) | (labels >= num_classes)).any():
        raise WrongArgumentError(
            f"labels are from {labels.min()} to {labels.max()}, and there are {num_classes} classes, from 0"
        )
    return label, score, num_classes


def check_predictions(preds: Tensor, target: Tensor) -> None:
    """Refuse what is neither scores (N, C) nor class indices (N,), and targets that are not (N,)."""
    is_known = preds.ndim == 2 or (preds.ndim == 1 and not preds.is_floating_point())
    if not is_known or target.shape != preds.shape[:1]:
        raise WrongArgumentError(
            f"predictions of type {preds.dtype} have the shape {tuple(preds.shape)}, and targets {tuple(target.shape)}; "
            f"give scores (N, C) or class indices (N,), and targets (N,)"
        )
