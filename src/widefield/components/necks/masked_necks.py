"""Necks of masked image modelling: the decoder of MAE, and the patch aggregation of BEiT v2."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from widefield.components.component import Component, InitConfig, NormConfig, build_norm_layer
from widefield.components.layers.transformer_layers import (
    TransformerEncoderLayer,
    shrink_branches,
    sincos_position_embedding,
)
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module()
class MAEPretrainDecoder(Component):
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
        norm_cfg: Type and options of the norm layers.
        predict_feature_dim: Values that are predicted for a patch; None is that of its pixels.
        init_cfg: See `Component`.
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
        norm_cfg: NormConfig = {"type": "LN", "eps": 1e-6},  # noqa: B006  # read, never written
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
            TransformerEncoderLayer(
                decoder_embed_dim, decoder_num_heads, int(mlp_ratio * decoder_embed_dim), norm_cfg=norm_cfg
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = build_norm_layer(norm_cfg, decoder_embed_dim)[1]
        features = patch_size**2 * in_chans if predict_feature_dim is None else predict_feature_dim
        self.decoder_pred = nn.Linear(decoder_embed_dim, features)

    def init_weights(self) -> None:
        super().init_weights()
        if not self.is_pretrained:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Return predictions (B, L, D) of all L patches.

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


_ARCHITECTURES: dict[str, dict[str, int]] = {
    "base": {"embed_dims": 768, "num_layers": 12, "num_heads": 12, "feedforward_channels": 3072},
    "large": {"embed_dims": 1024, "num_layers": 24, "num_heads": 16, "feedforward_channels": 4096},
}


@MODELS.register_module()
class BEiTV2Neck(Component):
    """A second way to predict masked patches: from the final class token and the patches of an early layer alone.

    It makes the class token gather what the image shows (Peng et al., 2022, https://arxiv.org/abs/2208.06366, section 3.3).

    Args:
        num_layers: Transformer blocks.
        early_layers: Layers of the backbone before the early features; the blocks' initialisation and drop path go on from there.
        backbone_arch: The backbone: base, large, or its embed_dims, num_layers, num_heads and feedforward_channels.
        drop_rate: Dropout behind the linear layers.
        drop_path_rate: Of the last layer of the backbone, see there.
        layer_scale_init_value: Initial factor of what blocks add; 0 for none.
        norm_cfg: Type and options of the norm layers.
        init_cfg: See `Component`.
    """

    component_kind = "neck"
    default_init_cfg = ({"type": "TruncNormal", "layer": "Linear", "std": 0.02},)

    def __init__(
        self,
        num_layers: int = 2,
        early_layers: int = 9,
        backbone_arch: Literal["base", "large"] | Mapping[str, int] = "base",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 0.1,
        norm_cfg: NormConfig = {"type": "LN", "eps": 1e-6},  # noqa: B006  # read, never written
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = _ARCHITECTURES.get(backbone_arch) if isinstance(backbone_arch, str) else backbone_arch
        if arch is None or set(arch) != set(_ARCHITECTURES["base"]):
            raise WrongArgumentError(
                f"backbone_arch={backbone_arch!r} is not one of {', '.join(map(repr, _ARCHITECTURES))}, "
                f"nor a dictionary of {', '.join(_ARCHITECTURES['base'])}"
            )
        self.early_layers = early_layers
        rates = torch.linspace(0, drop_path_rate, max(arch["num_layers"], early_layers + num_layers)).tolist()
        self.patch_aggregation = nn.ModuleList(
            TransformerEncoderLayer(
                arch["embed_dims"],
                arch["num_heads"],
                arch["feedforward_channels"],
                layer_scale_init_value=layer_scale_init_value,
                drop_rate=drop_rate,
                drop_path_rate=rates[early_layers + k],
                qkv_bias="qv",
                norm_cfg=norm_cfg,
            )
            for k in range(num_layers)
        )
        self.fc_norm = build_norm_layer(norm_cfg, arch["embed_dims"])[1]

    def init_weights(self) -> None:
        """Initialise the weights; what a block adds is divided by sqrt(2 * its number, counted from 1 through the backbone)."""
        super().init_weights()
        if not self.is_pretrained:
            shrink_branches(self.patch_aggregation, self.early_layers + 1)

    def forward(self, inputs: Sequence[Tensor], rel_pos_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return features (B, L, D) of the patches: those of the backbone, and those from the class token.

        Args:
            inputs: Tokens (B, 1 + L, D) of the early and of the final layer, that of the class first.
            rel_pos_bias: Added to the attention, (heads, 1 + L, 1 + L), the one that the backbone shares among its blocks.
        """
        early, final = inputs
        aggregated = torch.cat([final[:, :1], early[:, 1:]], dim=1)
        for block in self.patch_aggregation:
            aggregated = block(aggregated, rel_pos_bias)
        return self.fc_norm(final)[:, 1:], self.fc_norm(aggregated)[:, 1:]
