"""Reconstruction of masked patches."""

from typing import Literal

from torch import Tensor, nn

from widefield.components.losses.masked_mean import masked_mean
from widefield.registry import MODELS


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
        """The loss.

        Args:
            pred: Values of patches (B, L, D), whose mean over D is taken, or of pixels (B, C, H, W).
            target: Of the same shape.
            mask: 1 where a patch (B, L), or a pixel (B, 1, H, W), is to be reconstructed; None takes the mean of all.
        """
        loss = (pred - target).abs() if self.criterion == "L1" else (pred - target) ** 2
        if loss.ndim == 3:
            loss = loss.mean(dim=-1)
        return masked_mean(loss, mask) / (1 if mask is None else self.channel)
