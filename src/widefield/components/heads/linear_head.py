"""A linear classifier."""

from typing import Any

from torch import Tensor, nn

from widefield.components.errors import WrongArgumentError
from widefield.components.heads.cls_head import ClsHead, Features
from widefield.components.heads.vectors import vectors
from widefield.registry import MODELS


@MODELS.register_module()
class LinearClsHead(ClsHead):
    """Classification by one linear layer.

    Args:
        num_classes: Classes.
        in_channels: Channels of the features.
        kwargs: Those of `ClsHead`.
    """

    default_init_cfg = ({"type": "Normal", "layer": "Linear", "std": 0.01},)

    def __init__(self, num_classes: int, in_channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes <= 0:
            raise WrongArgumentError(f"num_classes={num_classes} must be a positive integer")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, feats: Features) -> Tensor:
        """Scores (N, num_classes)."""
        score: Tensor = self.fc(vectors(self.pre_logits(feats), self.in_channels))
        return score
