"""Precision, recall and F1 from counts."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from widefield.components.errors import WrongArgumentError

Average = Literal["macro", "micro"] | None
ITEMS = ("precision", "recall", "f1-score", "support")


def check_items(items: Sequence[str], average: str | None) -> None:
    """Refuse unknown values and averages."""
    wrong = [item for item in items if item not in ITEMS]
    if wrong or isinstance(items, str):
        raise WrongArgumentError(f"items={items!r} must be a list of {', '.join(map(repr, ITEMS))}")
    if average not in ("macro", "micro", None):
        raise WrongArgumentError(f"average={average!r} is not one of 'macro', 'micro', None")


def precision_recall(counts: Tensor, items: Sequence[str], average: str | None) -> dict[str, Tensor]:
    """Values in percent, and the support as a number of labels, by name; names end in how they are averaged, if not macro.

    precision = right / predicted, recall = right / true, F1 = 2 precision recall / (precision + recall), and 0 where there is
    nothing to divide by.

    Args:
        counts: How often each class was predicted rightly, was predicted, and was true: (3, C).
        items: Which values.
        average: The mean over classes ("macro"), of all labels together ("micro"), or None for a value per class, (C,).
    """
    right, predicted, true = counts.sum(1) if average == "micro" else counts
    precision = 100 * right / predicted.clamp(min=1)
    recall = 100 * right / true.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(precision.dtype).eps)
    values = dict(zip(ITEMS, (precision, recall, f1, true), strict=True))
    if average == "macro":
        values = {name: value.sum() if name == "support" else value.mean() for name, value in values.items()}
    suffix = {"macro": "", "micro": "_micro", None: "_classwise"}[average]
    return {f"{item}{suffix}": values[item] for item in items}
