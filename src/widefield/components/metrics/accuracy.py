"""Accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from widefield.components.errors import WrongArgumentError
from widefield.components.metrics import METRICS
from widefield.components.metrics.counting import check_predictions
from widefield.components.metrics.thresholds import Thresholds, as_thresholds, threshold_suffixes


@METRICS.register_module()
class Accuracy(Metric):
    """Percent of images whose class is among the k of highest score, `accuracy/topk`.

    Args:
        topk: For which k.
        thrs: A score counts only above its threshold; None is no threshold. With several, names end in `_thr-0.50` or `_no-thr`.
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    images: Tensor

    def __init__(self, topk: int | Sequence[int] = (1,), thrs: Thresholds = 0.0) -> None:
        super().__init__()
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        self.thrs = as_thresholds(thrs)
        if not self.topk or min(self.topk) < 1:
            raise WrongArgumentError(f"topk={topk} must be positive")
        shape = (len(self.topk), len(self.thrs))
        self.add_state("correct", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C), or class indices (N,), which thresholds do not concern.
            target: True classes (N,).

        Raises:
            ValueError: A k above the number of classes, or above 1 for class indices; shapes that do not fit.
        """
        check_predictions(preds, target)
        is_label = preds.ndim == 1
        most = max(self.topk)
        if is_label and most > 1:
            raise ValueError(f"Top-{most} accuracy is unavailable for class indices; give scores.")
        if not is_label and most > preds.shape[1]:
            raise ValueError(f"Top-{most} accuracy is unavailable since the number of categories is {preds.shape[1]}.")
        if is_label:
            hits = (preds == target)[:, None, None].expand(-1, 1, len(self.thrs))
        else:
            scores, labels = preds.topk(most, dim=1)
            above = [torch.ones_like(scores, dtype=torch.bool) if thr is None else scores > thr for thr in self.thrs]
            hits = (labels == target[:, None])[:, :, None] & torch.stack(above, dim=2)
        self.correct += torch.stack([hits[:, :k].any(dim=1).sum(dim=0) for k in self.topk])
        self.images += len(target)

    def compute(self) -> dict[str, Tensor]:
        """The accuracies by name."""
        percent = 100 * self.correct / self.images
        return {
            f"accuracy/top{k}{suffix}": percent[i, j]
            for i, k in enumerate(self.topk)
            for j, suffix in enumerate(threshold_suffixes(self.thrs))
        }
