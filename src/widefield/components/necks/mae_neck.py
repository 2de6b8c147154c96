"""The decoder of MAE."""

import math

import torch
from torch import Tensor, nn

from widefield.components.annotations import InitConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.attention import TransformerEncoderLayer
from widefield.components.layers.position import sincos_position_embedding
from widefield.registry import MODELS


@MODELS.register_module()
class MAEPretrainDecoder(BaseModule):
    """Decoder of masked autoencoders: predicts the pixels of every patch from the tokens of those that were seen.

    He et al., 2021, https://arxiv.org/abs/2111.06377.

    Args:
        num_patches: Patches of an image, a square number: their grid is square.
        patch_size: Side of a patch, in pixels.
        in_chans: Channels of the image.
        embed_dim: Width of the encoder.
        decoder_embed_dim: Width of the decoder, a multiple of 4.
        decoder_depth: Transformer blocks.
        decoder_num_heads: Attention heads.
        mlp_ratio: Width inside of a block's perceptron, per width of the decoder.
        predict_feature_dim: Values that are predicted for a patch; None is that of its pixels.
        init_cfg: See `BaseModule`.
    """

    component_kind = "neck"

    def __init__(
        self,
        num_patches: int = 196,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        predict_feature_dim: int | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        side = math.isqrt(max(num_patches, 0))
        if side < 1 or side**2 != num_patches:
            raise WrongArgumentError(f"num_patches={num_patches} must be a square number, such as {max(side, 1) ** 2}")
        self.num_patches = num_patches
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        positions = sincos_position_embedding((side, side), decoder_embed_dim, cls_token=True)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            TransformerEncoderLayer(decoder_embed_dim, decoder_num_heads, int(mlp_ratio * decoder_embed_dim))
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        features = patch_size**2 * in_chans if predict_feature_dim is None else predict_feature_dim
        self.decoder_pred = nn.Linear(decoder_embed_dim, features)

    def init_weights(self) -> None:
        super().init_weights()
        if not self.is_pretrained:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Predictions (B, L, D) of all L patches.

        Args:
            x: Tokens (B, 1 + K, embed_dim): that of the class, then those of the K patches that were seen.
            ids_restore: (B, L), where each patch stands among those seen, in their order, followed by those that were not.
        """
        if ids_restore.shape[1] != self.num_patches:
            raise WrongArgumentError(
                f"there are {ids_restore.shape[1]} patches, and num_patches={self.num_patches}; give the decoder their number"
            )
        x = self.decoder_embed(x)
        hidden = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], dim=1)
        patches = patches.gather(1, ids_restore[:, :, None].expand(-1, -1, patches.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(x))
        return predicted[:, 1:]
