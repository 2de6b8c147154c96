"""Visual tokens of BEiT v2."""

from torch import Tensor

from widefield.components.heads.beit_base import VisualTokenHead
from widefield.registry import MODELS


@MODELS.register_module()
class BEiTV2Head(VisualTokenHead):
    """Predicts VQ-KD's tokens of masked patches twice, by one layer.

    Peng et al., 2022, https://arxiv.org/abs/2208.06366.

    Args:
        embed_dims: Width of the features.
        num_embed: Different tokens.
        loss: Called with scores (M, num_embed) and tokens (M,) of the M masked patches.
        init_cfg: See `BaseModule`.
    """

    def loss(self, feats: Tensor, feats_cls_pt: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of both features.

        Args:
            feats: Final features (B, L, D) of the patches.
            feats_cls_pt: Those from the class token and an early layer, see `BEiTV2Neck`.
            target: Visual tokens, integers (B, L).
            mask: (B, h, w) or (B, L), True or 1 for masked patches.
        """
        mask = mask.flatten(1).bool()
        return self.token_loss(feats, target, mask), self.token_loss(feats_cls_pt, target, mask)
