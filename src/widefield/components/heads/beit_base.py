"""What the heads of BEiT share."""

from torch import Tensor, nn

from widefield.components.annotations import InitConfig, LossConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.registry import MODELS


class VisualTokenHead(BaseModule):
    """Predicts the visual tokens of masked patches by one linear layer.

    Args:
        embed_dims: Width of the features.
        num_embed: Different tokens.
        loss: Called with scores (M, num_embed) and tokens (M,) of the M masked patches.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"
    default_init_cfg = ({"type": "TruncNormal", "layer": "Linear", "std": 0.02},)

    def __init__(self, embed_dims: int, num_embed: int, loss: LossConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        self.cls_head = nn.Linear(embed_dims, num_embed)
        self.loss_module = MODELS.build(loss)

    def token_loss(self, feats: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The loss of features (B, L, D) of patches against tokens (B, L) where `mask` (B, L) is True.

        Raises:
            WrongArgumentError: The shapes differ, or the mask selects nothing.
        """
        if feats.shape[:2] != tokens.shape or tokens.shape != mask.shape:
            raise WrongArgumentError(
                f"there are features {tuple(feats.shape)}, tokens {tuple(tokens.shape)} and a mask {tuple(mask.shape)}; "
                f"give one of each per patch"
            )
        masked = feats[mask]
        if not len(masked):
            raise WrongArgumentError(
                "the mask selects no patch, and the loss is that of masked patches; mask one at least"
            )
        loss: Tensor = self.loss_module(self.cls_head(masked), tokens[mask])
        return loss
