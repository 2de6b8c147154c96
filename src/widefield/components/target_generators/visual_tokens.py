"""The visual tokenizers of BEiT and BEiT v2."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.component import BackboneConfig, InitConfig
from widefield.components.target_generators.base_target_generator import PretrainedTargetGenerator
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS

_WIDTHS = (1, 2, 4, 8)
"""Channels of each group, in multiples of those of the first."""


class _Conv(nn.Module):
    """A convolution that keeps the size of the map; `w` and `b` are the names of the weights in checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_normal_(self.w, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """x + gain * four convolutions with ReLU before each."""

    def __init__(self, in_channels: int, out_channels: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        inside = out_channels // 4
        self.id_path = _Conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        channels = (in_channels, inside, inside, inside, out_channels)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for k in range(1, 5):
            layers[f"relu_{k}"] = nn.ReLU()
            layers[f"conv_{k}"] = _Conv(channels[k - 1], channels[k], 3 if k < 4 else 1)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


@MODELS.register_module()
class DALLEEncoder(PretrainedTargetGenerator):
    """Scores of the visual tokens of DALL-E's discrete autoencoder, the targets of BEiT.

    Ramesh et al., 2021, https://arxiv.org/abs/2102.12092, appendix A. Images are scaled to 0.1 + 0.8 x with x from 0 to 1.

    Args:
        in_channels: Channels of the image.
        n_hid: Channels of the first group of blocks, a multiple of 4; the others have 2, 4 and 8 times as many.
        n_blk_per_group: Blocks of a group.
        vocab_size: Tokens.
        init_cfg: `{type: Pretrained, checkpoint: FILE}`.
        allow_random_weights: Do without a checkpoint; the tokens mean nothing then.
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        vocab_size: int = 8192,
        init_cfg: InitConfig = None,
        allow_random_weights: bool = False,
    ) -> None:
        super().__init__(init_cfg, allow_random_weights)
        gain = 1 / (len(_WIDTHS) * n_blk_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=_Conv(in_channels, n_hid, 7))
        before = n_hid
        for k, factor in enumerate(_WIDTHS, 1):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, n_blk_per_group + 1):
                group[f"block_{block}"] = _Block(before, factor * n_hid, gain)
                before = factor * n_hid
            if k < len(_WIDTHS):
                group["pool"] = nn.MaxPool2d(2)
            layers[f"group_{k}"] = nn.Sequential(group)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_Conv(before, vocab_size, 1)))
        self.blocks = nn.Sequential(layers)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, vocab_size, H / 8, W / 8) of images (B, C, H, W)."""
        return self.blocks(x)


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
