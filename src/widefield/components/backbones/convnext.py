"""ConvNeXt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from timm.layers import LayerNorm2d
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import Tensor, nn

from widefield.components.backbones.base_backbone import (
    StreamableBackbone,
    StreamingOptions,
    check_drop_path_rate,
    check_frozen_stages,
    parse_out_indices,
)
from widefield.components.component import ActivationConfig, InitConfig, NormConfig, build_activation_layer
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, suggestion

_STAGES = 4
_ARCHITECTURES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


@MODELS.register_module()
class ConvNeXt(StreamableBackbone):
    """ConvNeXt and ConvNeXt V2: four stages of depthwise 7 x 7 convolutions and perceptrons over channels.

    Liu et al., 2022, https://arxiv.org/abs/2201.03545; Woo et al., 2023, https://arxiv.org/abs/2301.00808. The layers are timm's;
    checkpoints of timm's ConvNeXts and of torchvision's load.

    Args:
        arch: The network by name, or `{depths: [blocks of each of four stages], channels: [of each]}`.
        in_channels: Channels of the image.
        stem_patch_size: Kernel size and stride of the stem.
        linear_pw_conv: The perceptrons are linear layers; False makes them 1 x 1 convolutions, as timm's small ones have them.
        use_grn: Global response normalisation in the perceptrons, as V2 has it.
        drop_path_rate: Probability with which an image skips the last block in training; it grows linearly from the first block on.
        layer_scale_init_value: What each block's output is multiplied by at first; 0 leaves the factor out, as V2 does.
        out_indices: Stages that are returned, from 0; negative ones count from the end. Each has a norm layer of its own.
        frozen_stages: How many stages, from the stem on, do not train.
        norm_cfg: Options of the norm layers, which are LN2d.
        act_cfg: Type and options of the activations.
        with_cp: Recompute the blocks in the backward pass instead of keeping their activations.
        gap_before_final_norm: Return the normalised averages over all positions (N, C), not the normalised maps (N, C, H, W).
        streaming: See `StreamableBackbone`.
        init_cfg: See `Component`; None keeps what timm initialises with.
    """

    def __init__(
        self,
        arch: Literal["atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge", "huge"]
        | dict[str, Sequence[int]] = "tiny",
        in_channels: int = 3,
        stem_patch_size: int = 4,
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        norm_cfg: NormConfig = {"type": "LN2d", "eps": 1e-6},  # noqa: B006  # read, never written
        act_cfg: ActivationConfig = {"type": "GELU"},  # noqa: B006  # read, never written
        with_cp: bool = False,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(streaming, init_cfg)
        depths, channels = _architecture(arch)
        check_drop_path_rate(drop_path_rate)
        check_frozen_stages(frozen_stages, 0, _STAGES)
        if norm_cfg.get("type") != "LN2d" or norm_cfg.keys() > {"type", "eps"}:
            raise WrongArgumentError(
                f"norm_cfg={norm_cfg} must be {{type: LN2d, eps: ...}}: ConvNeXt has no other norms"
            )
        eps = norm_cfg.get("eps", 1e-5)
        self.arch = arch
        self.out_indices = parse_out_indices(out_indices, _STAGES)
        self.frozen_stages = frozen_stages
        self.gap_before_final_norm = gap_before_final_norm
        net = TimmConvNeXt(
            in_chans=in_channels,
            num_classes=0,
            depths=depths,
            dims=channels,
            conv_mlp=not linear_pw_conv,
            use_grn=use_grn,
            ls_init_value=layer_scale_init_value or None,
            drop_path_rate=drop_path_rate,
            norm_eps=eps,
            act_layer=lambda: build_activation_layer(act_cfg),
        )
        net.set_grad_checkpointing(with_cp)
        if stem_patch_size != net.stem[0].stride[0]:  # timm would give the first stage a stride as well
            net.stem[0] = nn.Conv2d(in_channels, channels[0], stem_patch_size, stem_patch_size)
            nn.init.trunc_normal_(net.stem[0].weight, std=0.02)
            nn.init.zeros_(net.stem[0].bias)
        self.stem = net.stem
        self.stages = net.stages
        for stage in self.out_indices:
            self.add_module(f"norm{stage}", LayerNorm2d(channels[stage], eps=eps))
        self.train(self.training)  # freezes the stages

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        outs = []
        for index, stage in enumerate(self.stages[: self.out_indices[-1] + 1]):
            x = stage(x)
            if index in self.out_indices:
                norm = getattr(self, f"norm{index}")
                pooled = self.gap_before_final_norm
                outs.append(norm(x.mean((2, 3), keepdim=True)).flatten(1) if pooled else norm(x))
        return tuple(outs)

    def frozen_parts(self) -> Iterable[nn.Module]:
        return [self.stem, *self.stages[: self.frozen_stages]] if self.frozen_stages else []

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """See `AdaptsWeights`; 1 x 1 convolutions load linear layers, and the other way round."""
        super().adapt(weights, prefix)
        for name, like in self.state_dict().items():
            value = weights.get(prefix + name)
            if value is not None and like.ndim != value.ndim and like.numel() == value.numel():
                weights[prefix + name] = value.reshape(like.shape)


def _architecture(arch: str | Mapping[str, Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels of each stage."""
    if isinstance(arch, str):
        if arch not in _ARCHITECTURES:
            raise WrongArgumentError(f"arch={arch!r} is unknown; {suggestion(arch, _ARCHITECTURES)}")
        return _ARCHITECTURES[arch]
    if set(arch) != {"depths", "channels"}:
        raise WrongArgumentError(f"arch={dict(arch)} must have depths and channels")
    depths, channels = tuple(arch["depths"]), tuple(arch["channels"])
    if not (len(depths) == len(channels) == _STAGES) or min(*depths, *channels) < 1:
        raise WrongArgumentError(f"arch={dict(arch)} must have {_STAGES} positive depths, and as many channels")
    return depths, channels
