"""Precision, recall and F1 of images that belong to several classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from widefield.components.errors import WrongArgumentError
from widefield.components.metrics import METRICS
from widefield.components.metrics.counting import CountingMetric
from widefield.components.metrics.precision_recall import Average, check_items, precision_recall

_DEFAULT_THRESHOLD = 0.5


@METRICS.register_module()
class MultiLabelMetric(CountingMetric):
    """Precision, recall and F1 in percent, and support, of several classes per image: `multi-label/precision` etc.

    Args:
        thr: Classes of at least this score are predicted; by default 0.5 if there is no `topk`. With another, names end in
            `_thr-0.30`.
        topk: So many classes of highest score are predicted, where there is no `thr`. Names end in `_top2`.
        items: Which of "precision", "recall", "f1-score" and "support".
        average: The mean over classes ("macro"), of all labels together ("micro"), or None for a value per class. Names end in
            `_micro` and `_classwise`.
    """

    higher_is_better = True

    def __init__(
        self,
        thr: float | None = None,
        topk: int | None = None,
        items: Sequence[str] = ("precision", "recall", "f1-score"),
        average: Average = "macro",
    ) -> None:
        super().__init__()
        check_items(items, average)
        if topk is not None and topk < 1:
            raise WrongArgumentError(f"topk={topk} must be positive")
        self.thr = _DEFAULT_THRESHOLD if thr is None and topk is None else thr
        self.topk = topk
        self.items = tuple(items)
        self.average = average

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C).
            target: 1 or True for classes to which an image belongs, (N, C).
        """
        if preds.ndim != 2 or preds.shape != target.shape:
            raise WrongArgumentError(
                f"scores have the shape {tuple(preds.shape)}, and targets {tuple(target.shape)}; give both for each class, (N, C)"
            )
        true = target > 0
        if self.thr is not None:
            predicted = preds >= self.thr
        else:
            assert self.topk is not None
            indices = preds.topk(min(self.topk, preds.shape[1]), dim=1).indices
            predicted = torch.zeros_like(true).scatter(1, indices, True)
        self._add(torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)]))

    def compute(self) -> dict[str, Tensor]:
        """The values by name."""
        suffix = ""
        if self.thr is None:
            suffix = f"_top{self.topk}"
        elif self.thr != _DEFAULT_THRESHOLD:
            suffix = f"_thr-{self.thr:.2f}"
        values = precision_recall(self._total(), self.items, self.average)
        return {f"multi-label/{name}{suffix}": value for name, value in values.items()}
