"""Vision transformer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from widefield.components.backbones.base_backbone import (
    BaseBackbone,
    StreamingOptions,
    check_drop_path_rate,
    check_frozen_stages,
    parse_out_indices,
)
from widefield.components.component import InitConfig, NormConfig, build_norm_layer
from widefield.components.layers.transformer_layers import (
    LayerConfig,
    PatchConfig,
    PatchEmbed,
    QKVBias,
    Resolution,
    TransformerEncoderLayer,
    replace_masked,
    resize_position_embedding,
    sincos_position_embedding,
)
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, suggestion

OutType = Literal["cls_token", "raw", "featmap", "avg_featmap"]
_ViT = Literal["s", "small", "b", "base", "l", "large", "h", "huge"]
_DeiT = Literal["deit-t", "deit-tiny", "deit-s", "deit-small", "deit-b", "deit-base"]
_Others = Literal[
    "mocov3-s", "mocov3-small", "dinov2-s", "dinov2-small", "dinov2-g", "dinov2-giant", "eva-g", "eva-giant"
]
_SETTINGS = ("embed_dims", "num_layers", "num_heads", "feedforward_channels")
_ARCHITECTURES: dict[str, tuple[int, int, int, int]] = {
    **dict.fromkeys(("s", "small"), (768, 8, 8, 2304)),
    **dict.fromkeys(("b", "base", "deit-b", "deit-base"), (768, 12, 12, 3072)),
    **dict.fromkeys(("l", "large"), (1024, 24, 16, 4096)),
    **dict.fromkeys(("h", "huge"), (1280, 32, 16, 5120)),
    **dict.fromkeys(("deit-t", "deit-tiny"), (192, 12, 3, 768)),
    **dict.fromkeys(("deit-s", "deit-small", "dinov2-s", "dinov2-small"), (384, 12, 6, 1536)),
    **dict.fromkeys(("mocov3-s", "mocov3-small"), (384, 12, 12, 1536)),
    **dict.fromkeys(("eva-g", "eva-giant"), (1408, 40, 16, 6144)),
    **dict.fromkeys(("dinov2-g", "dinov2-giant"), (1536, 40, 24, 6144)),
}
_TOKEN_STD = 0.02


@MODELS.register_module()
class VisionTransformer(BaseBackbone):
    """Vision transformer: patches as tokens, pre-norm attention over all of them.

    Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929. It takes images of other sizes than `img_size`, whose position
    embedding is interpolated, and checkpoints of another size, likewise.

    Args:
        arch: The network by name, or `{embed_dims: ..., num_layers: ..., num_heads: ..., feedforward_channels: ...}`.
        img_size: Side, or height and width, of the images that the position embedding is for.
        patch_size: Side of a patch in pixels; an image is padded with zeros at its end to whole patches.
        in_channels: Channels of the image.
        out_indices: Layers whose output is returned, from 0; negative ones count from the end.
        drop_rate: Dropout on tokens and on outputs of linear layers.
        drop_path_rate: Probability with which an image skips the last layer in training; it grows linearly from the first layer on.
        qkv_bias: Biases of queries, keys and values.
        norm_cfg: Type and options of the norm layers.
        final_norm: Normalise the output of the last layer.
        out_type: What is returned per layer: the class token (N, C) ("cls_token"), all tokens (N, 1 + L, C) ("raw"), those of the
            patches as a map (N, C, rows, columns) ("featmap"), or their average (N, C), normalised ("avg_featmap").
        with_cls_token: Whether there is a class token.
        frozen_stages: The embedding (0) and this many layers do not train, with all layers the last norm layer neither; -1 freezes
            nothing.
        interpolate_mode: How the position embedding is resized, a mode of `torch.nn.functional.interpolate`.
        layer_scale_init_value: What each branch's output is multiplied by at first, per channel; 0 leaves the factor out.
        patch_cfg: Options of the layer that makes tokens of patches: stride, padding, bias.
        layer_cfgs: Options of all layers, or a list of those of each: `{act_cfg: {type: QuickGELU}}`.
        pre_norm: Normalise the tokens before the first layer, as CLIP does.
        streaming: Not to be had: each token depends on all others.
        init_cfg: See `Component`.

    Attributes:
        patch_resolution: Rows and columns of patches of an image of `img_size`.
    """

    default_init_cfg = (
        {"type": "TruncNormal", "std": _TOKEN_STD, "layer": ["Linear", "Conv2d"]},
        {"type": "Constant", "val": 1, "layer": "LayerNorm"},
    )
    needs_cls_token = False

    def __init__(
        self,
        arch: Literal[_ViT, _DeiT, _Others] | dict[str, int] = "base",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: QKVBias = True,
        norm_cfg: NormConfig = {"type": "LN", "eps": 1e-6},  # noqa: B006  # read, never written
        final_norm: bool = True,
        out_type: OutType = "cls_token",
        with_cls_token: bool = True,
        frozen_stages: int = -1,
        interpolate_mode: Literal["nearest", "bilinear", "bicubic", "area"] = "bicubic",
        layer_scale_init_value: float = 0.0,
        patch_cfg: PatchConfig = {},  # noqa: B006  # read, never written
        layer_cfgs: LayerConfig | Sequence[LayerConfig] = {},  # noqa: B006  # read, never written
        pre_norm: bool = False,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        if streaming is not None:
            raise WrongArgumentError(
                f"{type(self).__name__} cannot stream: attention relates each patch to all others, so no part of the image can be "
                "computed alone; leave streaming away and use smaller images, or a backbone of convolutions"
            )
        self.embed_dims, self.num_layers, self.num_heads, self.feedforward_channels = _architecture(arch)
        if out_type not in get_args(OutType):
            raise WrongArgumentError(
                f"out_type={out_type!r} is unknown; {suggestion(str(out_type), get_args(OutType))}"
            )
        if self.needs_cls_token and not with_cls_token:
            raise WrongArgumentError(
                f"{type(self).__name__} needs its class token: with_cls_token=False is not to be had"
            )
        if out_type == "cls_token" and not with_cls_token:
            raise WrongArgumentError(
                "out_type='cls_token' needs with_cls_token=True; others are raw, featmap, avg_featmap"
            )
        check_drop_path_rate(drop_path_rate)
        check_frozen_stages(frozen_stages, -1, self.num_layers)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.out_indices = parse_out_indices(out_indices, self.num_layers)
        self.out_type = out_type
        self.frozen_stages = frozen_stages
        self.interpolate_mode = interpolate_mode
        self.patch_embed = PatchEmbed(
            self.img_size,
            patch_size,
            in_channels,
            self.embed_dims,
            **{"bias": not pre_norm, **patch_cfg},  # type: ignore[arg-type]
        )
        self.patch_resolution = self.patch_embed.resolution
        patches = self.patch_resolution[0] * self.patch_resolution[1]
        self.num_extra_tokens = int(with_cls_token)
        self.cls_token = nn.Parameter(new_tokens(1, self.embed_dims)) if with_cls_token else None
        self.pos_embed: nn.Parameter | None = nn.Parameter(new_tokens(self.num_extra_tokens + patches, self.embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.pre_norm = build_norm_layer(norm_cfg, self.embed_dims)[1] if pre_norm else nn.Identity()
        layer: dict[str, Any] = {
            "num_heads": self.num_heads,
            "feedforward_channels": self.feedforward_channels,
            "layer_scale_init_value": layer_scale_init_value,
            "drop_rate": drop_rate,
            "qkv_bias": qkv_bias,
            "norm_cfg": norm_cfg,
        }
        given: Any = layer_cfgs
        own = [given] * self.num_layers if isinstance(given, Mapping) else list(given)
        if len(own) != self.num_layers:
            raise WrongArgumentError(f"layer_cfgs has {len(own)} items, and there are {self.num_layers} layers")
        self.layers = nn.ModuleList()
        for index, options in enumerate(own):
            rate = drop_path_rate * index / max(self.num_layers - 1, 1)
            self.layers.append(TransformerEncoderLayer(self.embed_dims, **{**layer, "drop_path_rate": rate, **options}))
        self.norm1_name, norm1 = build_norm_layer(norm_cfg, self.embed_dims, postfix=1)
        self.add_module(self.norm1_name, norm1 if final_norm else nn.Identity())
        if out_type == "avg_featmap":
            self.norm2_name, norm2 = build_norm_layer(norm_cfg, self.embed_dims, postfix=2)
            self.add_module(self.norm2_name, norm2)
        self.train(self.training)  # freezes the stages

    @property
    def norm1(self) -> nn.Module:
        """The norm layer behind the last layer."""
        return cast(nn.Module, getattr(self, self.norm1_name))

    @property
    def norm2(self) -> nn.Module:
        """The norm layer behind the average of the patches, with `out_type="avg_featmap"`."""
        return cast(nn.Module, getattr(self, self.norm2_name))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.encode(*self.tokens(x))

    def tokens(
        self, x: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Resolution]:
        """Return the class token, if there is one, and the tokens of patches with their positions, (N, 1 + L, C), and their grid.

        Args:
            x: Images (N, channels, H, W).
            mask: (N, rows, columns) or (N, L), 1 or True where `mask_token` stands for a patch; None masks none.
            mask_token: (1, 1, C), needed with a mask.
        """
        x, resolution = self.patch_embed(x)
        if mask is not None:
            assert mask_token is not None
            x = replace_masked(x, mask, mask_token)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        positions = self.position_embedding(resolution)
        return (x if positions is None else x + positions), resolution

    def position_embedding(self, resolution: Resolution) -> Tensor | None:
        """Return the position embedding (1, 1 + L, C) for `resolution` patches; None where there is none."""
        if self.pos_embed is None:
            return None
        return resize_position_embedding(
            self.pos_embed, self.patch_resolution, resolution, self.interpolate_mode, self.num_extra_tokens
        )

    def attention_biases(self, resolution: Resolution) -> Sequence[Tensor | None]:
        """Return the bias of each layer's attention, (heads, 1 + L, 1 + L) or None."""
        return (None,) * self.num_layers

    def layer_outputs(
        self, x: Tensor, resolution: Resolution | None, norm: nn.Module | None = None
    ) -> Iterator[Tensor]:
        """Yield what every layer makes of tokens (N, 1 + L, C), the last one normalised.

        Args:
            x: Tokens, see `tokens`; some patches may be left out.
            resolution: Rows and columns of patches; None if some were left out, so that their attention gets no bias.
            norm: Normalises the last one; None: `norm1`.
        """
        x = self.pre_norm(self.drop_after_pos(x))
        biases = [None] * self.num_layers if resolution is None else self.attention_biases(resolution)
        for index, (layer, bias) in enumerate(zip(self.layers, biases, strict=True), 1):
            x = layer(x, bias)
            yield (norm or self.norm1)(x) if index == self.num_layers else x

    def encode(self, x: Tensor, resolution: Resolution) -> tuple[Tensor, ...]:
        """Return the outputs of the layers `out_indices` for tokens (N, 1 + L, C), as `out_type` says."""
        outs = enumerate(self.layer_outputs(x, resolution))
        return tuple(self._as_out_type(out, resolution) for index, out in outs if index in self.out_indices)

    def init_weights(self) -> None:
        super().init_weights()
        if not self.is_pretrained:
            self.init_tokens()

    def init_tokens(self) -> None:
        """Initialise what is no layer: the class token and the position embedding."""
        for tokens in (self.cls_token, self.pos_embed):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=_TOKEN_STD)

    def frozen_parts(self) -> Iterable[nn.Module]:
        if self.frozen_stages < 0:
            return
        yield nn.ParameterList(tokens for tokens in (self.cls_token, self.pos_embed) if tokens is not None)
        yield from (self.patch_embed, self.drop_after_pos, self.pre_norm)
        yield from self.layers[: self.frozen_stages]
        if self.frozen_stages == self.num_layers:
            yield self.norm1
            if self.out_type == "avg_featmap":
                yield self.norm2

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the depth of a parameter and the number of depths, for learning rates that fall with depth.

        The embedding has depth 0, layer k has depth k + 1, and whatever follows or does not begin with `prefix` the last.
        """
        depths = self.num_layers + 2
        name = param_name.removeprefix(prefix)
        if param_name.startswith(prefix) and name.startswith("layers."):
            return int(name.split(".")[1]) + 1, depths
        embedding = name.startswith(("cls_token", "mask_token", "pos_embed", "patch_embed", "pre_norm"))
        return (0 if param_name.startswith(prefix) and embedding else depths - 1), depths

    def _as_out_type(self, x: Tensor, resolution: Resolution) -> Tensor:
        if self.out_type == "raw":
            return x
        if self.out_type == "cls_token":
            return x[:, 0]
        patches = x[:, self.num_extra_tokens :]
        if self.out_type == "featmap":
            return patches.transpose(1, 2).unflatten(2, resolution)
        return self.norm2(patches.mean(1))

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """See `AdaptsWeights`; a position embedding for another square of patches is resized."""
        super().adapt(weights, prefix)
        given = weights.get(f"{prefix}pos_embed")
        if given is not None and self.pos_embed is not None and given.shape != self.pos_embed.shape:
            side = round((given.shape[1] - self.num_extra_tokens) ** 0.5)
            if side**2 + self.num_extra_tokens == given.shape[1]:
                weights[f"{prefix}pos_embed"] = resize_position_embedding(
                    given, (side, side), self.patch_resolution, self.interpolate_mode, self.num_extra_tokens
                )


class SinCosTransformer(VisionTransformer):
    """A vision transformer whose position embedding is one of sines and cosines and does not train; it has a class token."""

    default_init_cfg = (
        {"type": "Xavier", "distribution": "uniform", "layer": "Linear"},
        {"type": "Constant", "val": 1, "layer": "LayerNorm"},
    )
    needs_cls_token = True
    token_std: ClassVar[float] = _TOKEN_STD

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pos_embed = nn.Parameter(self._sincos(), requires_grad=False)

    def frozen_parts(self) -> Iterable[nn.Module]:
        assert self.pos_embed is not None
        yield from super().frozen_parts()
        yield nn.ParameterList([self.pos_embed])

    def init_tokens(self) -> None:
        assert self.pos_embed is not None
        assert self.cls_token is not None
        with torch.no_grad():
            self.pos_embed.copy_(self._sincos())
        projection = self.patch_embed.projection.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))  # as the linear layer that it is
        nn.init.normal_(self.cls_token, std=self.token_std)

    def _sincos(self) -> Tensor:
        return sincos_position_embedding(self.patch_resolution, self.embed_dims, cls_token=True)


@MODELS.register_module()
class MoCoV3ViT(SinCosTransformer):
    """Vision transformer of MoCo v3, with a position embedding of sines and cosines that does not train.

    Chen et al., 2021, https://arxiv.org/abs/2104.02057.

    Args:
        stop_grad_conv1: The layer that makes tokens of patches does not train, which makes training stable.
        kwargs: Those of `VisionTransformer`; there is always a class token.
    """

    token_std = 1e-6

    def __init__(self, stop_grad_conv1: bool = False, **kwargs: Any) -> None:
        self.stop_grad_conv1 = stop_grad_conv1
        super().__init__(**kwargs)

    def init_tokens(self) -> None:
        super().init_tokens()
        for layer in self.layers:  # queries, keys and values are layers of their own
            for weight in layer.get_parameter("attn.qkv.weight").detach().chunk(3):
                nn.init.xavier_uniform_(weight)
        bias = self.patch_embed.projection.bias
        if bias is not None:
            nn.init.zeros_(bias)

    def frozen_parts(self) -> Iterable[nn.Module]:
        yield from super().frozen_parts()
        if self.stop_grad_conv1:
            yield self.patch_embed


def new_tokens(count: int, channels: int) -> Tensor:
    """Tokens (1, count, channels) from a truncated normal distribution."""
    return nn.init.trunc_normal_(torch.empty(1, count, channels), std=_TOKEN_STD)


def _architecture(arch: str | Mapping[str, int]) -> tuple[int, int, int, int]:
    if isinstance(arch, str):
        if arch not in _ARCHITECTURES:
            raise WrongArgumentError(f"arch={arch!r} is unknown; {suggestion(arch, _ARCHITECTURES)}")
        return _ARCHITECTURES[arch]
    if set(arch) != set(_SETTINGS) or min(arch.values()) < 1:
        raise WrongArgumentError(f"arch={dict(arch)} must have {', '.join(_SETTINGS)}, all positive")
    embed_dims, num_layers, num_heads, feedforward_channels = (arch[name] for name in _SETTINGS)
    return embed_dims, num_layers, num_heads, feedforward_channels
