"""Patch aggregation of BEiT v2."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from widefield.components.annotations import InitConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.attention import TransformerEncoderLayer
from widefield.registry import MODELS

_ARCHITECTURES: dict[str, dict[str, int]] = {
    "base": {"embed_dims": 768, "num_layers": 12, "num_heads": 12, "feedforward_channels": 3072},
    "large": {"embed_dims": 1024, "num_layers": 24, "num_heads": 16, "feedforward_channels": 4096},
}


@MODELS.register_module()
class BEiTV2Neck(BaseModule):
    """A second way to predict masked patches: from the final class token and the patches of an early layer alone.

    It makes the class token gather what the image shows (Peng et al., 2022, https://arxiv.org/abs/2208.06366, section 3.3).

    Args:
        num_layers: Transformer blocks.
        early_layers: Layers of the backbone before the early features; the blocks' initialisation and drop path go on from there.
        backbone_arch: The backbone: base, large, or its embed_dims, num_layers, num_heads and feedforward_channels.
        drop_rate: Dropout behind the linear layers.
        drop_path_rate: Of the last layer of the backbone, see there.
        layer_scale_init_value: Initial factor of what blocks add; 0 for none.
        init_cfg: See `BaseModule`.
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
            )
            for k in range(num_layers)
        )
        self.fc_norm = nn.LayerNorm(arch["embed_dims"], eps=1e-6)

    def init_weights(self) -> None:
        """Initialise the weights; what a block adds is divided by sqrt(2 * its number, counted from 1 through the backbone)."""
        super().init_weights()
        if self.is_pretrained:
            return
        with torch.no_grad():
            for k, block in enumerate(self.patch_aggregation, self.early_layers + 1):
                for last in (block.get_parameter("attn.proj.weight"), block.get_parameter("ffn.layers.1.weight")):
                    last.div_(math.sqrt(2 * k))

    def forward(self, inputs: Sequence[Tensor], rel_pos_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features (B, L, D) of the patches: those of the backbone, and those from the class token.

        Args:
            inputs: Tokens (B, 1 + L, D) of the early and of the final layer, that of the class first.
            rel_pos_bias: Added to the attention, (heads, 1 + L, 1 + L), the one that the backbone shares among its blocks.
        """
        early, final = inputs
        aggregated = torch.cat([final[:, :1], early[:, 1:]], dim=1)
        for block in self.patch_aggregation:
            aggregated = block(aggregated, rel_pos_bias)
        return self.fc_norm(final)[:, 1:], self.fc_norm(aggregated)[:, 1:]
