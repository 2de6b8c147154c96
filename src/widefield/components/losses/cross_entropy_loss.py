"""Cross-entropy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.errors import WrongArgumentError
from widefield.components.losses.reduction import Reduction, check_reduction, weight_reduce_loss
from widefield.registry import MODELS


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """Cross-entropy of class indices, of soft labels, or of independent labels.

    Args:
        use_sigmoid: Each class is a question of its own (binary cross-entropy); labels are (N, C).
        use_soft: Labels are scores (N, C), one-hot or mixed.
        reduction: How the losses of the images become one.
        loss_weight: Multiplied with the result.
        class_weight: A factor per class. The mean still divides by the number of images; `torch.nn.CrossEntropyLoss` divides by the
            sum of the weights.
        pos_weight: With `use_sigmoid`, a factor for the positive labels of each class.
    """

    component_kind = "loss"

    def __init__(
        self,
        use_sigmoid: bool = False,
        use_soft: bool = False,
        reduction: Reduction = "mean",
        loss_weight: float = 1.0,
        class_weight: Sequence[float] | None = None,
        pos_weight: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        if use_sigmoid and use_soft:
            raise WrongArgumentError("use_sigmoid and use_soft exclude each other; give one of them")
        if pos_weight is not None and not use_sigmoid:
            raise WrongArgumentError("pos_weight is for use_sigmoid=True")
        check_reduction(reduction)
        self.use_sigmoid = use_sigmoid
        self.use_soft = use_soft
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.class_weight = class_weight
        self.pos_weight = pos_weight

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of scores (N, C).

        Args:
            cls_score: Logits.
            label: Class indices (N,), or scores (N, C).
            weight: A factor per image, (N,); with `use_sigmoid` it may be one per label, (N, C).
            avg_factor: What the mean divides by instead of the number of images (with `use_sigmoid`: of labels).
            reduction_override: Instead of the loss's own reduction.
            kwargs: Ignored, so that a head may pass what another loss needs.
        """
        class_weight = None if self.class_weight is None else cls_score.new_tensor(self.class_weight)
        loss = self._elements(cls_score, label, class_weight)
        reduction = reduction_override or self.reduction
        return self.loss_weight * weight_reduce_loss(loss, weight, reduction, avg_factor)

    def _elements(self, score: Tensor, label: Tensor, class_weight: Tensor | None) -> Tensor:
        classes = score.shape[-1 if self.use_sigmoid or self.use_soft else 1]
        if class_weight is not None and len(class_weight) != classes:
            raise WrongArgumentError(
                f"class_weight={list(self.class_weight or ())} must be a factor for each of {classes} classes"
            )
        if self.use_sigmoid:
            pos_weight = None if self.pos_weight is None else torch.as_tensor(self.pos_weight).to(score)
            loss = functional.binary_cross_entropy_with_logits(
                score, label.to(score.dtype), pos_weight=pos_weight, reduction="none"
            )
            return loss if class_weight is None else loss * class_weight
        if self.use_soft:
            loss = -label * functional.log_softmax(score, dim=-1)
            return (loss if class_weight is None else loss * class_weight).sum(dim=-1)
        return functional.cross_entropy(score, label, weight=class_weight, reduction="none")
