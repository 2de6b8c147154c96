"""The vision transformer of MaskFeat."""

from typing import Any

from torch import Tensor, nn

from widefield.components.backbones.vision_transformer import OutType, VisionTransformer, new_tokens
from widefield.components.layers.masking import replace_masked
from widefield.registry import MODELS


@MODELS.register_module()
class MaskFeatViT(VisionTransformer):
    """Vision transformer in which a learned token replaces masked patches, as MaskFeat has it.

    Wei et al., 2021, https://arxiv.org/abs/2112.09133.

    Args:
        out_type: What unmasked images give.
        kwargs: Those of `VisionTransformer`.
    """

    def __init__(self, out_type: OutType = "raw", **kwargs: Any) -> None:
        super().__init__(out_type=out_type, **kwargs)
        self.mask_token = nn.Parameter(new_tokens(1, self.embed_dims))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """The features of images.

        Args:
            x: (N, channels, H, W).
            mask: (N, rows, columns) or (N, L), 1 or True where a patch is masked; None masks none, and the outputs of `out_indices`
                are returned.

        Returns:
            With a mask all tokens of the last layer, normalised (N, 1 + L, C).
        """
        if mask is None:
            return super().forward(x)
        x, resolution = self.patch_embed(x)
        x = self.add_cls_token(replace_masked(x, mask, self.mask_token))
        x = self.pre_norm(self.drop_after_pos(self.add_positions(x, resolution)))
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.norm1(x)
        return result

    def init_tokens(self) -> None:
        super().init_tokens()
        nn.init.trunc_normal_(self.mask_token, std=0.02)
