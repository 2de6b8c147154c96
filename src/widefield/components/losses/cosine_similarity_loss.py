"""Cosine similarity."""

from torch import Tensor, nn
from torch.nn import functional

from widefield.components.losses.masked_mean import masked_mean
from widefield.registry import MODELS


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
        """The mean loss of vectors (..., D).

        Args:
            pred: Vectors.
            target: Of the same shape.
            mask: 1 where a vector counts, of shape (...); None counts all, and the loss is 0 if it selects nothing.
        """
        cosine = functional.cosine_similarity(pred, target, dim=-1)
        return masked_mean(self.shift_factor - self.scale_factor * cosine, mask)
