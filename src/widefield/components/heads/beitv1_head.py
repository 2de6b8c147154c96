"""Visual tokens of BEiT."""

from torch import Tensor

from widefield.components.heads.beit_base import VisualTokenHead
from widefield.registry import MODELS


@MODELS.register_module()
class BEiTV1Head(VisualTokenHead):
    """Predicts which of the DALL-E encoder's tokens masked patches have.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254.

    Args:
        embed_dims: Width of the features.
        num_embed: Different tokens.
        loss: Called with scores (M, num_embed) and tokens (M,) of the M masked patches.
        init_cfg: See `BaseModule`.
    """

    def loss(self, feats: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss.

        Args:
            feats: Tokens (B, 1 + L, D) of the backbone, that of the class first.
            target: Scores (B, num_embed, h, w) of the visual tokens on a grid of L = h * w patches.
            mask: (B, h, w), True or 1 for masked patches.
        """
        return self.token_loss(feats[:, 1:], target.argmax(dim=1).flatten(1), mask.flatten(1).bool())
