"""Metrics of classes, of one and of several for each image."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from widefield.components.metrics import METRICS
from widefield.errors import WrongArgumentError

Average = Literal["macro", "micro"] | None
Thresholds = float | None | Sequence[float | None]
ITEMS = ("precision", "recall", "f1-score", "support")
_DEFAULT_THRESHOLD = 0.5


class MeanMetric(Metric):
    """Means over images of several numbers, in percent.

    Args:
        names: Of the numbers.
        prefix: What the names of the values begin with, before a slash.
        dtype: Of their sums.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], prefix: str, dtype: torch.dtype = torch.long) -> None:
        super().__init__()
        self.names = [f"{prefix}/{name}" for name in names]
        self.add_state("total", torch.zeros(len(names), dtype=dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        """Add the numbers (N, names) of N images."""
        self.total += values.sum(0)
        self.count += len(values)

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name."""
        return dict(zip(self.names, 100 * self.total / self.count, strict=True))


class CountingMetric(Metric):
    """A metric that is computed from sums of counts, whose shape is known with the first batch.

    The sum is the one element of a list, for torchmetrics has to know the shape of every other state beforehand. Processes
    concatenate their lists.
    """

    full_state_update = False
    higher_is_better: bool | None = True
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", default=[], dist_reduce_fx="cat")

    def _add(self, counts: Tensor) -> None:
        """Add the counts of a batch."""
        self.counts = [torch.cat([*self.counts, counts[None]]).sum(0, keepdim=True)]

    def _total(self) -> Tensor:
        """Return the counts of all batches and processes."""
        return dim_zero_cat(self.counts).sum(0)


class PrecisionRecallMetric(CountingMetric):
    """Precision, recall and F1 in percent, and support; a subclass counts.

    precision = right / predicted, recall = right / true, F1 = 2 precision recall / (precision + recall), and 0 where there is
    nothing to divide by. The counts are (thresholds, 3, C): how often each class was predicted rightly, was predicted, and was
    true.

    Args:
        prefix: What the names of the values begin with.
        suffixes: What they end in, one for each threshold.
        items: Which of "precision", "recall", "f1-score" and "support".
        average: The mean over classes ("macro"), of all labels together ("micro"), or None for a value per class. Names end in
            `_micro` and `_classwise`.
    """

    def __init__(self, prefix: str, suffixes: Sequence[str], items: Sequence[str], average: Average) -> None:
        super().__init__()
        if isinstance(items, str) or not set(items) <= set(ITEMS):
            raise WrongArgumentError(f"items={items!r} must be a list of {', '.join(map(repr, ITEMS))}")
        if average not in ("macro", "micro", None):
            raise WrongArgumentError(f"average={average!r} is not one of 'macro', 'micro', None")
        self.prefix = prefix
        self.suffixes = suffixes
        self.items = tuple(items)
        self.average = average

    def compute(self) -> dict[str, Tensor]:
        """Return the values by name."""
        averaged = {"macro": "", "micro": "_micro", None: "_classwise"}[self.average]
        named: dict[str, Tensor] = {}
        for suffix, counts in zip(self.suffixes, self._total(), strict=True):
            values = self._values(counts)
            named |= {f"{self.prefix}/{item}{averaged}{suffix}": values[item] for item in self.items}
        return named

    def _values(self, counts: Tensor) -> dict[str, Tensor]:
        """Return all values of counts (3, C)."""
        right, predicted, true = counts.sum(1) if self.average == "micro" else counts
        precision = 100 * right / predicted.clamp(min=1)
        recall = 100 * right / true.clamp(min=1)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(precision.dtype).eps)
        values = dict(zip(ITEMS, (precision, recall, f1, true), strict=True))
        if self.average == "macro":
            return {name: value.sum() if name == "support" else value.mean() for name, value in values.items()}
        return values


@METRICS.register_module()
class Accuracy(MeanMetric):
    """Percent of images whose class is among the k of highest score, `accuracy/topk`.

    Args:
        topk: For which k.
        thrs: A score counts only above its threshold; None is no threshold. With several, names end in `_thr-0.50` or `_no-thr`.
        prefix: What the names begin with instead of "accuracy".
    """

    def __init__(self, topk: int | Sequence[int] = (1,), thrs: Thresholds = 0.0, prefix: str | None = None) -> None:
        self.topk = as_topk(topk)
        self.thrs = _as_thresholds(thrs)
        names = [f"top{k}{suffix}" for k in self.topk for suffix in _threshold_suffixes(self.thrs)]
        super().__init__(names, prefix or "accuracy")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C), or class indices (N,), which thresholds do not concern.
            target: True classes (N,).

        Raises:
            ValueError: A k above the number of classes, or above 1 for class indices; shapes that do not fit.
        """
        _check_predictions(preds, target)
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
        self._add(torch.cat([hits[:, :k].any(dim=1) for k in self.topk], dim=1))


@METRICS.register_module()
class SingleLabelMetric(PrecisionRecallMetric):
    """Precision, recall and F1 in percent, and support, of one class per image: `single-label/precision` etc.

    Args:
        thrs: The class of highest score is predicted only above the threshold; None is no threshold. With several, names end in
            `_thr-0.50` or `_no-thr`.
        items: Which of "precision", "recall", "f1-score" and "support".
        average: The mean over classes ("macro"), of all images together ("micro"), or None for a value per class. Names end in
            `_micro` and `_classwise`.
        num_classes: Needed for predictions that are class indices.
        prefix: What the names begin with instead of "single-label".
    """

    def __init__(
        self,
        thrs: Thresholds = 0.0,
        items: Sequence[str] = ("precision", "recall", "f1-score"),
        average: Average = "macro",
        num_classes: int | None = None,
        prefix: str | None = None,
    ) -> None:
        self.thrs = _as_thresholds(thrs)
        super().__init__(prefix or "single-label", _threshold_suffixes(self.thrs), items, average)
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C), or class indices (N,), which thresholds do not concern.
            target: True classes (N,).
        """
        label, score, classes = _predicted_classes(preds, target, self.num_classes)
        counts = []
        for thr in self.thrs:
            above = torch.ones_like(score, dtype=torch.bool) if thr is None else score > thr
            chosen = (target[above & (label == target)], label[above], target)
            counts.append(torch.stack([torch.bincount(one, minlength=classes) for one in chosen]))
        self._add(torch.stack(counts))


@METRICS.register_module()
class ConfusionMatrix(CountingMetric):
    """Count the images of each class that are predicted as each class, `confusion_matrix/result`.

    Args:
        num_classes: Needed for predictions that are class indices.
        prefix: What the names begin with instead of "confusion_matrix".
    """

    higher_is_better = None

    def __init__(self, num_classes: int | None = None, prefix: str | None = None) -> None:
        super().__init__()
        self.prefix = prefix or "confusion_matrix"
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C) or class indices (N,).
            target: True classes (N,).
        """
        label, _, classes = _predicted_classes(preds, target, self.num_classes)
        self._add(torch.bincount(target * classes + label, minlength=classes**2).view(classes, classes))

    def compute(self) -> dict[str, Tensor]:
        """Return the matrix (C, C), with true classes as rows and predicted ones as columns."""
        return {f"{self.prefix}/result": self._total()}


@METRICS.register_module()
class MultiLabelMetric(PrecisionRecallMetric):
    """Precision, recall and F1 in percent, and support, of several classes per image: `multi-label/precision` etc.

    Args:
        thr: Classes of at least this score are predicted; by default 0.5 if there is no `topk`. With another, names end in
            `_thr-0.30`.
        topk: So many classes of highest score are predicted, where there is no `thr`. Names end in `_top2`.
        items: Which of "precision", "recall", "f1-score" and "support".
        average: The mean over classes ("macro"), of all labels together ("micro"), or None for a value per class. Names end in
            `_micro` and `_classwise`.
        prefix: What the names begin with instead of "multi-label".
    """

    def __init__(
        self,
        thr: float | None = None,
        topk: int | None = None,
        items: Sequence[str] = ("precision", "recall", "f1-score"),
        average: Average = "macro",
        prefix: str | None = None,
    ) -> None:
        self.topk = None if topk is None else as_topk(topk)[0]
        self.thr = _DEFAULT_THRESHOLD if thr is None and topk is None else thr
        suffix = f"_top{self.topk}" if self.thr is None else f"_thr-{self.thr:.2f}"
        super().__init__(prefix or "multi-label", ["" if self.thr == _DEFAULT_THRESHOLD else suffix], items, average)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C).
            target: 1 or True for classes to which an image belongs, (N, C).
        """
        _check_labels(preds, target)
        true = target > 0
        if self.thr is not None:
            predicted = preds >= self.thr
        else:
            assert self.topk is not None
            indices = preds.topk(min(self.topk, preds.shape[1]), dim=1).indices
            predicted = torch.zeros_like(true).scatter(1, indices, True)
        self._add(torch.stack([(predicted & true).sum(0), predicted.sum(0), true.sum(0)])[None])


@METRICS.register_module()
class AveragePrecision(Metric):
    """Average precision of each class in percent, `multi-label/AP_classwise`, or their mean, `multi-label/mAP`.

    The sum over thresholds of precision times gain in recall, without interpolation. Images of equal score share a rank, so that
    the order of the images counts for nothing. A class without a positive image has none (NaN), and the mean leaves it out.
    torchmetrics takes scores beyond 0 and 1 for logits, whose sigmoid makes large ones equal; here they are ranked as they are.

    Args:
        average: The mean over classes ("macro"), or None for a value per class.
        prefix: What the names begin with instead of "multi-label".
    """

    full_state_update = False
    higher_is_better = True
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, average: Literal["macro"] | None = "macro", prefix: str | None = None) -> None:
        super().__init__()
        if average not in ("macro", None):
            raise WrongArgumentError(f"average={average!r} is not one of 'macro', None")
        self.average = average
        self.prefix = prefix or "multi-label"
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep a batch.

        Args:
            preds: Scores (N, C).
            target: 1 for classes to which an image belongs, 0 for others, -1 for those that do not count, (N, C).
        """
        _check_labels(preds, target)
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> dict[str, Tensor]:
        """Return the values by name."""
        preds, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        classes = [
            _average_precision(score[label >= 0], label[label >= 0] > 0)
            for score, label in zip(preds.unbind(1), target.unbind(1), strict=True)
        ]
        values = 100 * torch.stack(classes)
        return (
            {f"{self.prefix}/AP_classwise": values}
            if self.average is None
            else {f"{self.prefix}/mAP": values.nanmean()}
        )


def as_topk(topk: int | Sequence[int]) -> tuple[int, ...]:
    """Return one k or several as a tuple.

    Raises:
        WrongArgumentError: There is none, or one below 1.
    """
    given = (topk,) if isinstance(topk, int) else tuple(topk)
    if not given or min(given) < 1:
        raise WrongArgumentError(f"topk={topk} must be positive")
    return given


def _as_thresholds(thrs: Thresholds) -> tuple[float | None, ...]:
    return (thrs,) if thrs is None or isinstance(thrs, (int, float)) else tuple(thrs)


def _threshold_suffixes(thrs: Sequence[float | None]) -> list[str]:
    """Return what the names of values end in: nothing for a single threshold, else such as `_thr-0.50` and `_no-thr`."""
    if len(thrs) == 1:
        return [""]
    return ["_no-thr" if thr is None else f"_thr-{thr:.2f}" for thr in thrs]


def _average_precision(score: Tensor, positive: Tensor) -> Tensor:
    """Return the average precision, from 0 to 1, of scores (N,) against what is positive (N,); NaN where nothing is."""
    score, order = score.sort(descending=True)
    found = positive[order].cumsum(0)
    is_last = torch.ones_like(positive)  # of the images with its score
    is_last[:-1] = score[1:] != score[:-1]
    precision = found / torch.arange(1, len(score) + 1, device=score.device)
    gain = found[is_last].diff(prepend=found.new_zeros(1))
    return (precision[is_last] * gain).sum() / positive.sum()


def _predicted_classes(preds: Tensor, target: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor, int]:
    """Return predicted classes (N,), their scores (N,) and the number of classes, of scores (N, C) or of class indices (N,).

    The score of a class index is infinite: no threshold discards it.

    Raises:
        WrongArgumentError: Shapes do not fit, the number of classes is unknown, or there are labels beyond it.
    """
    _check_predictions(preds, target)
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


def _check_predictions(preds: Tensor, target: Tensor) -> None:
    """Refuse what is neither scores (N, C) nor class indices (N,), and targets that are not (N,)."""
    is_known = preds.ndim == 2 or (preds.ndim == 1 and not preds.is_floating_point())
    if not is_known or target.shape != preds.shape[:1]:
        raise WrongArgumentError(
            f"predictions of type {preds.dtype} have the shape {tuple(preds.shape)}, and targets {tuple(target.shape)}; "
            f"give scores (N, C) or class indices (N,), and targets (N,)"
        )


def _check_labels(preds: Tensor, target: Tensor) -> None:
    if preds.ndim != 2 or preds.shape != target.shape:
        raise WrongArgumentError(
            f"scores have the shape {tuple(preds.shape)}, and targets {tuple(target.shape)}; give both for each class, (N, C)"
        )
