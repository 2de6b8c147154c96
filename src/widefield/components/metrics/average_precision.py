"""Average precision of classes."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from widefield.components.errors import WrongArgumentError
from widefield.components.metrics import METRICS


@METRICS.register_module()
class AveragePrecision(Metric):
    """Average precision of each class in percent, `multi-label/AP_classwise`, or their mean, `multi-label/mAP`.

    The sum over thresholds of precision times gain in recall, without interpolation. Images of equal score share a rank, so that
    the order of the images counts for nothing. A class without a positive image has none (NaN), and the mean leaves it out.

    Args:
        average: The mean over classes ("macro"), or None for a value per class.
    """

    full_state_update = False
    higher_is_better = True
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, average: Literal["macro"] | None = "macro") -> None:
        super().__init__()
        if average not in ("macro", None):
            raise WrongArgumentError(f"average={average!r} is not one of 'macro', None")
        self.average = average
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep a batch.

        Args:
            preds: Scores (N, C).
            target: 1 for classes to which an image belongs, 0 for others, -1 for those that do not count, (N, C).
        """
        if preds.ndim != 2 or preds.shape != target.shape:
            raise WrongArgumentError(
                f"scores have the shape {tuple(preds.shape)}, and targets {tuple(target.shape)}; give both for each class, (N, C)"
            )
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> dict[str, Tensor]:
        """The values by name."""
        preds, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        classes = [
            average_precision(score[label >= 0], label[label >= 0] > 0)
            for score, label in zip(preds.unbind(1), target.unbind(1), strict=True)
        ]
        values = 100 * torch.stack(classes)
        return {"multi-label/AP_classwise": values} if self.average is None else {"multi-label/mAP": values.nanmean()}


def average_precision(score: Tensor, positive: Tensor) -> Tensor:
    """Average precision, from 0 to 1, of scores (N,) against what is positive (N,); NaN where nothing is."""
    score, order = score.sort(descending=True)
    found = positive[order].cumsum(0)
    is_last = torch.ones_like(positive)  # of the images with its score
    is_last[:-1] = score[1:] != score[:-1]
    precision = found / torch.arange(1, len(score) + 1, device=score.device)
    gain = found[is_last].diff(prepend=found.new_zeros(1))
    return (precision[is_last] * gain).sum() / positive.sum()
