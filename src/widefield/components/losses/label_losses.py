"""Losses of labels."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from widefield.components.losses.reduction import WeightedLoss
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS

SmoothMode = Literal["original", "classy_vision", "multi_label"]


def label_scores(label: Tensor, num_classes: int) -> Tensor:
    """Return labels as a score per class.

    Args:
        label: Class indices, integers of shape (N,) or (N, 1), or scores (N, C), one-hot or mixed.
        num_classes: C.

    Returns:
        Scores of shape (N, C); float, unless scores of another floating type were given.

    Raises:
        WrongArgumentError: The labels are neither.
    """
    if label.ndim == 2 and label.shape[1] == num_classes:
        return label if label.is_floating_point() else label.to(torch.get_default_dtype())
    if not label.is_floating_point() and (label.ndim == 1 or label.shape[1:] == (1,)):
        indices = label.reshape(-1).long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_classes:
            raise WrongArgumentError(
                f"there are labels from {int(indices.min())} to {int(indices.max())}, and {num_classes} classes, from 0"
            )
        return functional.one_hot(indices, num_classes).to(torch.get_default_dtype())
    raise WrongArgumentError(
        f"labels of type {label.dtype} have the shape {tuple(label.shape)}; give class indices, integers of shape (N,), "
        f"or scores of shape (N, {num_classes})"
    )


@MODELS.register_module()
class CrossEntropyLoss(WeightedLoss):
    """Cross-entropy of class indices, of soft labels, or of independent labels.

    Args:
        use_sigmoid: Each class is a question of its own (binary cross-entropy); labels are (N, C).
        use_soft: Labels are scores (N, C), one-hot or mixed.
        class_weight: A factor per class. The mean still divides by the number of images; `torch.nn.CrossEntropyLoss` divides by the
            sum of the weights.
        pos_weight: With `use_sigmoid`, a factor for the positive labels of each class.
        kwargs: Those of `WeightedLoss`.
    """

    def __init__(
        self,
        use_sigmoid: bool = False,
        use_soft: bool = False,
        *,
        class_weight: Sequence[float] | None = None,
        pos_weight: Sequence[float] | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if use_sigmoid and use_soft:
            raise WrongArgumentError("use_sigmoid and use_soft exclude each other; give one of them")
        if pos_weight is not None and not use_sigmoid:
            raise WrongArgumentError("pos_weight is for use_sigmoid=True")
        self.use_sigmoid = use_sigmoid
        self.use_soft = use_soft
        self.class_weight = class_weight
        self.pos_weight = pos_weight

    def forward(  # type: ignore[override]  # the names of MMPretrain
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss of scores (N, C).

        Args:
            cls_score: Logits.
            label: Class indices (N,), or scores (N, C).
            weight: A factor per image, (N,); with `use_sigmoid` it may be one per label, (N, C).
            avg_factor: What the mean divides by instead of the number of images (with `use_sigmoid`: of labels).
            reduction_override: Instead of the loss's own reduction.
            kwargs: Ignored, so that a head may pass what another loss needs.
        """
        return super().forward(cls_score, label, weight, avg_factor, reduction_override)

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the losses of images (N,), with `use_sigmoid` of labels (N, C)."""
        class_weight = None if self.class_weight is None else pred.new_tensor(self.class_weight)
        classes = pred.shape[-1 if self.use_sigmoid or self.use_soft else 1]
        if class_weight is not None and len(class_weight) != classes:
            raise WrongArgumentError(
                f"class_weight={list(self.class_weight or ())} must be a factor for each of {classes} classes"
            )
        if self.use_sigmoid:
            pos_weight = None if self.pos_weight is None else torch.as_tensor(self.pos_weight).to(pred)
            loss = functional.binary_cross_entropy_with_logits(
                pred, target.to(pred.dtype), pos_weight=pos_weight, reduction="none"
            )
            return loss if class_weight is None else loss * class_weight
        if self.use_soft:
            loss = -target * functional.log_softmax(pred, dim=-1)
            return (loss if class_weight is None else loss * class_weight).sum(dim=-1)
        return functional.cross_entropy(pred, target, weight=class_weight, reduction="none")


@MODELS.register_module()
class LabelSmoothLoss(CrossEntropyLoss):
    """Cross-entropy of smoothed labels.

    With e the `label_smooth_val`, K classes and a label y (one-hot or mixed), the label becomes

    - original: (1 - e) y + e / K (Szegedy et al., 2015, https://arxiv.org/abs/1512.00567, section 7);
    - classy_vision: (y + e / K) / (1 + e), the original with e / (1 + e) for e, as Classy Vision has it;
    - multi_label: 1 - e where y is positive, and e elsewhere; each class is a question of its own.

    Args:
        label_smooth_val: e, a float from 0 to below 1.
        num_classes: K; None takes it from the first batch.
        use_sigmoid: Binary cross-entropy of each class; None means for multi_label alone.
        mode: One of the above.
        kwargs: Those of `CrossEntropyLoss`.
    """

    def __init__(
        self,
        label_smooth_val: float,
        num_classes: int | None = None,
        use_sigmoid: bool | None = None,
        mode: SmoothMode = "original",
        **kwargs: Any,
    ) -> None:
        if not isinstance(label_smooth_val, float) or not 0 <= label_smooth_val < 1:
            raise WrongArgumentError(f"label_smooth_val={label_smooth_val!r} must be a float from 0.0 to below 1.0")
        if mode not in get_args(SmoothMode):
            raise WrongArgumentError(f"mode={mode!r} is not one of {', '.join(map(repr, get_args(SmoothMode)))}")
        if mode == "multi_label" and use_sigmoid is False:
            raise WrongArgumentError("mode='multi_label' smooths independent labels; leave use_sigmoid out")
        sigmoid = mode == "multi_label" or bool(use_sigmoid)
        super().__init__(use_sigmoid=sigmoid, use_soft=not sigmoid, **kwargs)
        self.label_smooth_val = label_smooth_val
        self.num_classes = num_classes
        self.mode = mode

    def smooth_label(self, label: Tensor) -> Tensor:
        """Return the smoothed scores (N, K) of class indices (N,) or (N, 1), or of scores (N, K)."""
        if self.num_classes is None:
            raise WrongArgumentError("the number of classes is known with the first batch; give num_classes")
        scores = label_scores(label, self.num_classes)
        e = self.label_smooth_val
        if self.mode == "multi_label":
            return torch.where(scores > 0, 1 - e, e).to(scores)
        if self.mode == "classy_vision":
            e = e / (1 + e)
        return (1 - e) * scores + e / self.num_classes

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the losses of logits (N, K); labels are those of `smooth_label`.

        Raises:
            WrongArgumentError: There are scores of another number of classes.
        """
        if self.num_classes is None:
            self.num_classes = pred.shape[1]
        if pred.shape[1] != self.num_classes:
            raise WrongArgumentError(
                f"there are scores of {pred.shape[1]} classes, and num_classes={self.num_classes}; give the same number"
            )
        return super().elements(pred, self.smooth_label(target))


@MODELS.register_module()
class FocalLoss(WeightedLoss):
    """Binary cross-entropy of each class, in which what is right already counts little.

    -a (1 - p)^gamma log p, with p the probability of the true answer, and a = alpha where the label is positive and 1 - alpha where
    it is not (Lin et al., 2017, https://arxiv.org/abs/1708.02002).

    Args:
        gamma: How little.
        alpha: The weight of positive labels.
        kwargs: Those of `WeightedLoss`.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.alpha = alpha

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the losses of logits (N, C); targets are class indices (N,) or (N, 1), or scores (N, C)."""
        pred, target = _with_scores(pred, target)
        p = pred.sigmoid()
        wrong = (1 - p) * target + p * (1 - target)
        wrong = wrong.clamp(min=torch.finfo(wrong.dtype).tiny)  # at 0 the slope of a root would be infinite
        alpha = self.alpha * target + (1 - self.alpha) * (1 - target)
        return alpha * wrong**self.gamma * functional.binary_cross_entropy_with_logits(pred, target, reduction="none")


@MODELS.register_module()
class AsymmetricLoss(WeightedLoss):
    """Focal loss with one exponent for positive labels and another for negative ones.

    -(1 - p)^gamma_pos log p for positive labels, and for negative ones -q^gamma_neg log(1 - q) with q = max(p - clip, 0),
    so that easy ones do not count at all (Ridnik et al., 2020, https://arxiv.org/abs/2009.14119).

    Args:
        gamma_pos: Exponent of positive labels.
        gamma_neg: Exponent of negative labels.
        clip: The probability below which a negative label does not count; None or 0 for no such bound.
        use_sigmoid: Each class is a question of its own; otherwise the probabilities are those of a softmax.
        eps: Probabilities are at least that inside of the logarithm.
        kwargs: Those of `WeightedLoss`.
    """

    def __init__(
        self,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        clip: float | None = 0.05,
        *,
        use_sigmoid: bool = True,
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.gamma_pos = gamma_pos
        self.gamma_neg = gamma_neg
        self.clip = clip or 0.0
        self.use_sigmoid = use_sigmoid
        self.eps = eps

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the losses of logits (N, C); targets are class indices (N,) or (N, 1), or scores (N, C)."""
        pred, target = _with_scores(pred, target)
        p = pred.sigmoid() if self.use_sigmoid else pred.softmax(dim=-1)
        right = p * target + (1 - p + self.clip).clamp(max=1) * (1 - target)
        gamma = self.gamma_pos * target + self.gamma_neg * (1 - target)
        # Where `right` is 1, the slope of a root would be infinite, and its product with the slope of the clamp no number.
        return -right.clamp(min=self.eps).log() * (1 - right).clamp(min=self.eps) ** gamma


def _with_scores(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (N, C) and labels as scores (N, C), both in 32 bits at least."""
    target = label_scores(target, pred.shape[1]).to(torch.promote_types(pred.dtype, torch.float32))
    return pred.to(target), target
