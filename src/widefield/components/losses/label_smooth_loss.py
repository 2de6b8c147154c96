"""Cross-entropy of smoothed labels."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.components.errors import WrongArgumentError
from widefield.components.losses.cross_entropy_loss import CrossEntropyLoss
from widefield.components.losses.labels import label_scores
from widefield.components.losses.reduction import Reduction
from widefield.registry import MODELS

_MODES = ("original", "classy_vision", "multi_label")


@MODELS.register_module()
class LabelSmoothLoss(nn.Module):
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
        reduction: How the losses of the images become one.
        loss_weight: Multiplied with the result.
        class_weight: A factor per class, see `CrossEntropyLoss`.
        pos_weight: With binary cross-entropy, a factor for the positive labels of each class.
    """

    component_kind = "loss"

    def __init__(
        self,
        label_smooth_val: float,
        num_classes: int | None = None,
        use_sigmoid: bool | None = None,
        mode: Literal["original", "classy_vision", "multi_label"] = "original",
        reduction: Reduction = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | None = None,
        pos_weight: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(label_smooth_val, float) or not 0 <= label_smooth_val < 1:
            raise WrongArgumentError(f"label_smooth_val={label_smooth_val!r} must be a float from 0.0 to below 1.0")
        if mode not in _MODES:
            raise WrongArgumentError(f"mode={mode!r} is not one of {', '.join(map(repr, _MODES))}")
        if mode == "multi_label" and use_sigmoid is False:
            raise WrongArgumentError("mode='multi_label' smooths independent labels; leave use_sigmoid out")
        self.label_smooth_val = label_smooth_val
        self.num_classes = num_classes
        self.mode = mode
        sigmoid = mode == "multi_label" or bool(use_sigmoid)
        self.ce = CrossEntropyLoss(
            use_sigmoid=sigmoid,
            use_soft=not sigmoid,
            reduction=reduction,
            loss_weight=loss_weight,
            class_weight=class_weight,
            pos_weight=pos_weight,
        )

    def smooth_label(self, label: Tensor) -> Tensor:
        """The smoothed scores (N, K) of class indices (N,) or (N, 1), or of scores (N, K)."""
        if self.num_classes is None:
            raise WrongArgumentError("the number of classes is known with the first batch; give num_classes")
        scores = label_scores(label, self.num_classes)
        e = self.label_smooth_val
        if self.mode == "multi_label":
            return torch.where(scores > 0, 1 - e, e).to(scores)
        if self.mode == "classy_vision":
            e = e / (1 + e)
        return (1 - e) * scores + e / self.num_classes

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of logits (N, K); the labels are as in `smooth_label`, the rest as in `CrossEntropyLoss`.

        Raises:
            WrongArgumentError: There are scores of another number of classes.
        """
        if self.num_classes is None:
            self.num_classes = cls_score.shape[1]
        if cls_score.shape[1] != self.num_classes:
            raise WrongArgumentError(
                f"there are scores of {cls_score.shape[1]} classes, and num_classes={self.num_classes}; give the same number"
            )
        smoothed = self.smooth_label(label)
        loss: Tensor = self.ce(cls_score, smoothed, weight, avg_factor, reduction_override, **kwargs)
        return loss
