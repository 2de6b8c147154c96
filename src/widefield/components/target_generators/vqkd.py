"""The visual tokenizer of BEiT v2."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.annotations import BackboneConfig, InitConfig
from widefield.components.errors import WrongArgumentError
from widefield.components.target_generators.base_target_generator import PretrainedTargetGenerator
from widefield.registry import MODELS


class CosineQuantizer(nn.Module):
    """Replaces vectors by the index of the code that points most nearly in their direction.

    Peng et al., 2022, https://arxiv.org/abs/2208.06366, equation 1.

    Args:
        num_embed: Codes.
        embed_dims: Width of a code.
    """

    def __init__(self, num_embed: int, embed_dims: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embed, embed_dims)

    def forward(self, z: Tensor) -> Tensor:
        """Indices (...) of the codes of greatest cosine with vectors (..., embed_dims)."""
        codes = functional.normalize(self.embedding.weight.float(), dim=-1)
        return (functional.normalize(z.float(), dim=-1) @ codes.T).argmax(dim=-1)


@MODELS.register_module()
class VQKD(PretrainedTargetGenerator):
    """Visual tokens by vector-quantised knowledge distillation, the targets of BEiT v2.

    A vision transformer, two linear layers with tanh between them, and a codebook (Peng et al., 2022,
    https://arxiv.org/abs/2208.06366, section 3.1). Tokens are computed in 32 bits from what the transformer gives.

    Args:
        encoder_config: The transformer; it gives maps (`out_type: featmap`) and knows its `embed_dims`.
        num_embed: Codes.
        embed_dims: Width of a code.
        init_cfg: `{type: Pretrained, checkpoint: FILE}`.
        allow_random_weights: Do without a checkpoint; the tokens mean nothing then.
    """

    def __init__(
        self,
        encoder_config: BackboneConfig,
        num_embed: int = 8192,
        embed_dims: int = 32,
        init_cfg: InitConfig = None,
        allow_random_weights: bool = False,
    ) -> None:
        super().__init__(init_cfg, allow_random_weights)
        self.encoder = MODELS.build(encoder_config)
        width = getattr(self.encoder, "embed_dims", None)
        if not isinstance(width, int):
            raise WrongArgumentError(
                f"the encoder {type(self.encoder).__name__} has no embed_dims, its width; give a vision transformer"
            )
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, embed_dims))
        self.quantize = CosineQuantizer(num_embed, embed_dims)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L), int64 from 0 to below num_embed, of the L patches of images (B, C, H, W), row by row."""
        features = self.encoder(x)[-1]
        if features.ndim != 4:
            raise WrongArgumentError(
                f"the encoder gives features of shape {tuple(features.shape)}, not maps (B, D, h, w); "
                f"set out_type='featmap' in encoder_config"
            )
        with torch.autocast(x.device.type, enabled=False):
            patches = features.flatten(2).transpose(1, 2).to(self.quantize.embedding.weight.dtype)
            tokens: Tensor = self.quantize(self.encode_task_layer(patches))
        return tokens
