"""Precision, recall and F1 of images that belong to one class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from widefield.components.metrics import METRICS
from widefield.components.metrics.counting import CountingMetric, count_classes, predicted_classes
from widefield.components.metrics.precision_recall import Average, check_items, precision_recall
from widefield.components.metrics.thresholds import Thresholds, as_thresholds, threshold_suffixes


@METRICS.register_module()
class SingleLabelMetric(CountingMetric):
    """Precision, recall and F1 in percent, and support, of one class per image: `single-label/precision` etc.

    Args:
        thrs: The class of highest score is predicted only above the threshold; None is no threshold. With several, names end in
            `_thr-0.50` or `_no-thr`.
        items: Which of "precision", "recall", "f1-score" and "support".
        average: The mean over classes ("macro"), of all images together ("micro"), or None for a value per class. Names end in
            `_micro` and `_classwise`.
        num_classes: Needed for predictions that are class indices.
    """

    higher_is_better = True

    def __init__(
        self,
        thrs: Thresholds = 0.0,
        items: Sequence[str] = ("precision", "recall", "f1-score"),
        average: Average = "macro",
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        check_items(items, average)
        self.thrs = as_thresholds(thrs)
        self.items = tuple(items)
        self.average = average
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C), or class indices (N,), which thresholds do not concern.
            target: True classes (N,).
        """
        label, score, classes = predicted_classes(preds, target, self.num_classes)
        true = count_classes(target, classes)
        counts = []
        for thr in self.thrs:
            above = torch.ones_like(score, dtype=torch.bool) if thr is None else score > thr
            right = count_classes(target[above & (label == target)], classes)
            counts.append(torch.stack([right, count_classes(label[above], classes), true]))
        self._add(torch.stack(counts))

    def compute(self) -> dict[str, Tensor]:
        """The values by name."""
        values = {}
        for suffix, counts in zip(threshold_suffixes(self.thrs), self._total(), strict=True):
            for name, value in precision_recall(counts, self.items, self.average).items():
                values[f"single-label/{name}{suffix}"] = value
        return values
