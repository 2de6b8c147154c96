"""Metrics of maps, from sums that are gathered tile by tile."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from widefield.errors import WrongArgumentError


class SegmentationScores(Metric):
    """Mean and per-class intersection over union, accuracy and Dice, of confusion matrices that are added up.

    With the counts n(t, p) of positions of class t for which p was predicted, the intersection over union of class c is n(c, c) /
    (sum over p of n(c, p) + sum over t of n(t, c) - n(c, c)), and its Dice twice n(c, c) over the sum of both; `mean_iou` and
    `dice` are means over the classes that are there, in labels or predictions. `accuracy` is the share of positions that are
    right. Counts are whole numbers of 64 bits, so that the scores of a data set are those of all its pixels, over several processes
    too.

    Args:
        class_names: Names of the classes, for the keys `iou_NAME`.
    """

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self.class_names = list(class_names)
        count = len(self.class_names)
        self.add_state("confusion", torch.zeros(count, count, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, confusion: Tensor) -> None:
        """Add a confusion matrix (C, C): true classes in rows, predicted ones in columns.

        Raises:
            WrongArgumentError: It is of another number of classes.
        """
        if confusion.shape != self.confusion.shape:
            raise WrongArgumentError(
                f"a confusion matrix of shape {tuple(confusion.shape)}, expected {tuple(self.confusion.shape)}"
            )
        self.confusion += confusion.round().to(self.confusion)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores by name, NaN for classes that are not there, and the `confusion_matrix` of all."""
        counts = self.confusion.double()
        right, areas = counts.diagonal(), counts.sum(0) + counts.sum(1)
        iou, dice = right / (areas - right), 2 * right / areas
        scores = {
            "mean_iou": iou.nanmean(),
            "dice": dice.nanmean(),
            "accuracy": right.sum() / counts.sum(),
            **{f"iou_{name}": value for name, value in zip(self.class_names, iou, strict=True)},
        }
        return {**{name: value.float() for name, value in scores.items()}, "confusion_matrix": self.confusion.clone()}


class RegressionScores(Metric):
    """Errors of maps over all values of a data set, from sums.

    `mae` is the mean absolute error, `rmse` the root of the mean squared error, and `r2` the coefficient of determination: one
    minus the sum of squared errors over that of squared differences of the target from its mean, the mean over the channels, as
    torchmetrics' `R2Score` computes it; NaN where a target is constant.

    Args:
        channels: Of the maps.
    """

    full_state_update = False
    higher_is_better = False
    sums: Tensor

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(5, channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor) -> None:
        """Add sums over the positions of a map, of each channel: (5, C).

        They are of absolute errors, squared errors, true values, their squares, and ones.
        """
        self.sums += sums.to(self.sums)

    def compute(self) -> dict[str, Tensor]:
        """Return `mae`, `rmse` and `r2`."""
        absolute, squared, true, true_squared, count = self.sums
        spread = true_squared - true.square() / count
        r2 = torch.where(spread > 0, 1 - squared / spread, torch.nan).mean()
        scores = {"mae": absolute.sum() / count.sum(), "rmse": (squared.sum() / count.sum()).sqrt(), "r2": r2}
        return {name: value.float() for name, value in scores.items()}
