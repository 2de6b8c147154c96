"""Losses of predicted features and pixels."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from widefield.components.losses.label_losses import label_scores
from widefield.components.losses.reduction import WeightedLoss, masked_mean
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module(replaceable=True)
class L1Loss(WeightedLoss):
    """Absolute difference of predictions and targets.

    Without `avg_factor` the mean is that of all elements. With the number of images as `avg_factor`, as heads of classification
    give it, the loss is the mean over images of the L1 distance, summed over classes. Arguments are those of `WeightedLoss`.
    """

    def elements(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the absolute difference of every element.

        Args:
            pred: Predictions of any shape.
            target: Of the same shape; or, for predictions (N, C), class indices (N,), which are compared as one-hot scores.
        """
        if pred.ndim == 2 and target.shape != pred.shape:
            target = label_scores(target, pred.shape[1])
        if pred.shape != target.shape or not target.numel():
            raise WrongArgumentError(
                f"predictions of shape {tuple(pred.shape)} are compared with targets of shape {tuple(target.shape)}; "
                f"give targets of the same shape, of one element at least"
            )
        return (pred - target).abs()


@MODELS.register_module()
class PixelReconstructionLoss(nn.Module):
    """Difference of predicted and true values of masked patches.

    sum of (losses * mask) / sum of the mask, and 0 if the mask selects nothing (He et al., 2021,
    https://arxiv.org/abs/2111.06377).

    Args:
        criterion: Absolute ("L1") or squared ("L2") differences.
        channel: Divides the result for a mask, where one entry of it stands for this many channels.
    """

    component_kind = "loss"

    def __init__(self, criterion: Literal["L1", "L2"], channel: int | None = None) -> None:
        super().__init__()
        if criterion not in ("L1", "L2"):
            raise NotImplementedError(f"criterion={criterion!r} is not one of 'L1', 'L2'")
        self.criterion = criterion
        self.channel = 1 if channel is None else channel

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            pred: Values of patches (B, L, D), whose mean over D is taken, or of pixels (B, C, H, W).
            target: Of the same shape.
            mask: 1 where a patch (B, L), or a pixel (B, 1, H, W), is to be reconstructed; None takes the mean of all.
        """
        loss = (pred - target).abs() if self.criterion == "L1" else (pred - target) ** 2
        if loss.ndim == 3:
            loss = loss.mean(dim=-1)
        return masked_mean(loss, mask) / (1 if mask is None else self.channel)


@MODELS.register_module()
class CosineSimilarityLoss(nn.Module):
    """shift - scale * cosine of the angle between prediction and target.

    Args:
        shift_factor: The shift.
        scale_factor: The scale.
    """

    component_kind = "loss"

    def __init__(self, shift_factor: float = 0.0, scale_factor: float = 1.0) -> None:
        super().__init__()
        self.shift_factor = shift_factor
        self.scale_factor = scale_factor

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean loss of vectors (..., D).

        Args:
            pred: Vectors.
            target: Of the same shape.
            mask: 1 where a vector counts, of shape (...); None counts all, and the loss is 0 if it selects nothing.
        """
        cosine = functional.cosine_similarity(pred, target, dim=-1)
        return masked_mean(self.shift_factor - self.scale_factor * cosine, mask)
