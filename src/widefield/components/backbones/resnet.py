"""ResNet, and its forms for small images and with a deep stem."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from widefield.components.backbones.base_backbone import (
    StreamableBackbone,
    StreamingOptions,
    check_drop_path_rate,
    check_frozen_stages,
)
from widefield.components.component import ConvConfig, InitConfig, NormConfig, build_conv_layer, build_norm_layer
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, Range

Style = Literal["pytorch", "caffe"]


class ResidualBlock(nn.Module):
    """A residual branch of convolutions beside a shortcut, and a ReLU over their sum.

    Args:
        kernels: Sides of the kernels: 3 and 3, or those of a bottleneck, 1, 3 and 1, which has few channels inside.
        in_channels: Of the block's input.
        out_channels: Of its output.
        expansion: Channels of the output per channel inside.
        stride: Of the block.
        dilation: Of the first 3 x 3 convolution.
        downsample: The shortcut; None passes the input on.
        style: Which convolution of a bottleneck has the stride: the 3 x 3 ("pytorch") or the first ("caffe").
        with_cp: Recompute the branch in the backward pass instead of keeping its activations.
        conv_cfg: See `build_conv_layer`.
        norm_cfg: See `build_norm_layer`.
        drop_path_rate: Probability with which the branch of an image is left out in training.
    """

    def __init__(
        self,
        kernels: Sequence[int],
        in_channels: int,
        out_channels: int,
        expansion: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: Style = "pytorch",
        with_cp: bool = False,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] = {"type": "BN"},  # noqa: B006  # read, never written
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.names: list[tuple[str, str]] = []
        spatial = kernels.index(3)
        strided = spatial if style == "pytorch" else 0
        before = in_channels
        for k, kernel in enumerate(kernels):
            after = out_channels if k == len(kernels) - 1 else out_channels // expansion
            conv = _convolution(
                conv_cfg, before, after, kernel, stride if k == strided else 1, dilation if k == spatial else 1
            )
            name, norm = build_norm_layer(norm_cfg, after, postfix=k + 1)
            self.names.append((f"conv{k + 1}", name))
            self.add_module(f"conv{k + 1}", conv)
            self.add_module(name, norm)
            before = after
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = StochasticDepth(drop_path_rate, "row") if drop_path_rate else nn.Identity()

    @property
    def last_norm(self) -> nn.Module:
        """The norm layer at the end of the branch."""
        return self.get_submodule(self.names[-1][1])

    def _branch(self, x: Tensor) -> Tensor:
        for k, (conv, norm) in enumerate(self.names):
            x = getattr(self, norm)(getattr(self, conv)(self.relu(x) if k else x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """The output of the block."""
        branch = (
            checkpoint(self._branch, x, use_reentrant=False) if self.with_cp and x.requires_grad else self._branch(x)
        )
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(branch) + shortcut)


def _convolution(
    conv_cfg: dict[str, Any] | None, before: int, after: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Module:
    """Return a convolution without bias that shrinks maps by its stride alone."""
    padding = dilation * (kernel // 2)
    return build_conv_layer(
        conv_cfg, before, after, kernel, stride=stride, padding=padding, dilation=dilation, bias=False
    )


_BASIC, _BOTTLENECK = (3, 3), (1, 3, 1)
_EXPANSIONS = {_BASIC: 1, _BOTTLENECK: 4}
_ARCHITECTURES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    18: (_BASIC, (2, 2, 2, 2)),
    34: (_BASIC, (3, 4, 6, 3)),
    50: (_BOTTLENECK, (3, 4, 6, 3)),
    101: (_BOTTLENECK, (3, 4, 23, 3)),
    152: (_BOTTLENECK, (3, 8, 36, 3)),
}


@MODELS.register_module()
class ResNet(StreamableBackbone):
    """ResNet of depth 18, 34, 50, 101 or 152.

    He et al., 2015, https://arxiv.org/abs/1512.03385. The names of its weights are those of torchvision.

    Args:
        depth: Layers with weights.
        in_channels: Channels of the image.
        stem_channels: Channels of the stem.
        base_channels: Channels inside the blocks of the first stage; each stage has twice those of the one before.
        expansion: Channels of a block's output per channel inside; None is 1 below depth 50, and 4 from there on.
        num_stages: How many of the four stages there are.
        strides: Of each stage.
        dilations: Of each stage.
        out_indices: Stages whose maps are returned, from 0.
        style: Which convolution of a bottleneck has the stride: the 3 x 3 ("pytorch") or the first ("caffe").
        deep_stem: Three 3 x 3 convolutions instead of one of 7 x 7.
        avg_down: Shortcuts pool on average before a 1 x 1 convolution of stride 1.
        frozen_stages: The stem (0) and this many stages do not train; -1 freezes nothing.
        conv_cfg: Type and options of the convolutions.
        norm_cfg: Type and options of the norm layers.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        with_cp: Recompute the blocks in the backward pass instead of keeping their activations.
        zero_init_residual: Each block begins as the identity: the weight of its last norm layer is 0.
        drop_path_rate: Probability with which an image skips the last block in training; it grows linearly from the first block on.
        init_cfg: See `Component`.
        streaming: Compute the maps tile by tile; see `StreamingOptions`.
    """

    default_init_cfg = (
        {"type": "Kaiming", "layer": ["Conv2d"]},
        {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
    )

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152],
        in_channels: Annotated[int, Range(1)] = 3,
        stem_channels: Annotated[int, Range(1)] = 64,
        base_channels: Annotated[int, Range(1)] = 64,
        expansion: int | None = None,
        num_stages: Literal[1, 2, 3, 4] = 4,
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        out_indices: Sequence[int] = (3,),
        style: Style = "pytorch",
        deep_stem: bool = False,
        avg_down: bool = False,
        frozen_stages: Literal[-1, 0, 1, 2, 3, 4] = -1,
        conv_cfg: ConvConfig = None,
        norm_cfg: NormConfig = {"type": "BN", "requires_grad": True},  # noqa: B006  # read, never written
        norm_eval: bool = False,
        with_cp: bool = False,
        zero_init_residual: bool = True,
        init_cfg: InitConfig = None,
        drop_path_rate: float = 0.0,
        streaming: StreamingOptions | None = None,
    ) -> None:
        super().__init__(streaming, init_cfg)
        if depth not in _ARCHITECTURES:
            raise WrongArgumentError(f"depth={depth} is not one of {', '.join(map(str, _ARCHITECTURES))}")
        if not 1 <= num_stages <= 4:
            raise WrongArgumentError(f"num_stages={num_stages} is not one of 1, 2, 3, 4")
        if not (len(strides) >= num_stages <= len(dilations)):
            raise WrongArgumentError(
                f"strides={strides} and dilations={dilations} must have one for each of {num_stages} stages"
            )
        if not out_indices or not all(0 <= stage < num_stages for stage in out_indices):
            raise WrongArgumentError(f"out_indices={tuple(out_indices)} must be stages from 0 to {num_stages - 1}")
        if style not in ("pytorch", "caffe"):
            raise WrongArgumentError(f"style={style!r} is not one of 'pytorch', 'caffe'")
        check_frozen_stages(frozen_stages, -1, num_stages)
        check_drop_path_rate(drop_path_rate)
        self.depth = depth
        self.out_indices = tuple(out_indices)
        self.style = style
        self.deep_stem = deep_stem
        self.avg_down = avg_down
        self.frozen_stages = frozen_stages
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.zero_init_residual = zero_init_residual
        self._make_stem_layer(in_channels, stem_channels)
        kernels, blocks = _ARCHITECTURES[depth]
        self.expansion = _EXPANSIONS[kernels] if expansion is None else expansion
        rates = iter([drop_path_rate * k / (sum(blocks) - 1) for k in range(sum(blocks))])
        self.res_layers = [f"layer{stage + 1}" for stage in range(num_stages)]
        before, after = stem_channels, base_channels * self.expansion
        for stage, name in enumerate(self.res_layers):
            stage_rates = [next(rates) for _ in range(blocks[stage])]
            layer = self._make_stage(kernels, before, after, strides[stage], dilations[stage], stage_rates)
            self.add_module(name, layer)
            before, after = after, 2 * after
        self.feat_dim = before
        self.train(self.training)  # freezes the stages

    def _make_stem_layer(self, in_channels: int, base_channels: int) -> None:
        """Make the layers before the first stage. Override it together with `forward`.

        Args:
            in_channels: Of the image.
            base_channels: Of the stem's output.
        """
        if self.deep_stem:
            half = base_channels // 2
            self.stem = nn.Sequential(
                self._stem_conv(in_channels, half, 2), self._stem_conv(half, half), self._stem_conv(half, base_channels)
            )
        else:
            self._make_stem_conv(in_channels, base_channels, kernel_size=7, stride=2)
        self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _make_stem_conv(self, in_channels: int, channels: int, kernel_size: int, stride: int) -> None:
        self.conv1 = _convolution(self.conv_cfg, in_channels, channels, kernel_size, stride)
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.relu = nn.ReLU(inplace=True)

    @property
    def norm1(self) -> nn.Module:
        """The norm layer of the stem."""
        return cast(nn.Module, getattr(self, self.norm1_name))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x) if self.deep_stem else self.relu(self.norm1(self.conv1(x)))
        x = self.maxpool(x)
        outs = []
        for stage, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if stage in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def init_weights(self) -> None:
        super().init_weights()
        if self.zero_init_residual and not self.is_pretrained:
            for part in self.modules():
                if isinstance(part, ResidualBlock):
                    nn.init.constant_(cast(Tensor, part.last_norm.weight), 0)

    def frozen_parts(self) -> Iterable[nn.Module]:
        if self.frozen_stages >= 0:
            yield from [self.stem] if self.deep_stem else [self.conv1, self.norm1]
        for name in self.res_layers[: max(self.frozen_stages, 0)]:
            yield getattr(self, name)

    def _stem_conv(self, before: int, after: int, stride: int = 1) -> nn.Module:
        conv = _convolution(self.conv_cfg, before, after, 3, stride)
        norm = build_norm_layer(self.norm_cfg, after)[1]
        return nn.Sequential(OrderedDict(conv=conv, bn=norm, activate=nn.ReLU(inplace=True)))

    def _make_stage(
        self, kernels: Sequence[int], before: int, after: int, stride: int, dilation: int, rates: list[float]
    ) -> nn.Sequential:
        block = partial(
            ResidualBlock,
            kernels,
            expansion=self.expansion,
            dilation=dilation,
            style=self.style,
            with_cp=self.with_cp,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
        )
        shortcut = self._make_shortcut(before, after, stride) if stride != 1 or before != after else None
        first = block(before, after, stride=stride, downsample=shortcut, drop_path_rate=rates[0])
        return nn.Sequential(first, *(block(after, after, drop_path_rate=rate) for rate in rates[1:]))

    def _make_shortcut(self, before: int, after: int, stride: int) -> nn.Sequential:
        pools = self.avg_down and stride != 1
        pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if pools else []
        conv = _convolution(self.conv_cfg, before, after, 1, 1 if pools else stride)
        return nn.Sequential(*pool, conv, build_norm_layer(self.norm_cfg, after)[1])


@MODELS.register_module()
class ResNetV1c(ResNet):
    """ResNet whose stem is three 3 x 3 convolutions instead of one of 7 x 7.

    Args:
        kwargs: Those of `ResNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=False, **kwargs)


@MODELS.register_module()
class ResNetV1d(ResNet):
    """ResNet with a stem of three 3 x 3 convolutions, whose shortcuts pool on average before a 1 x 1 convolution of stride 1.

    He et al., 2018, Bag of tricks for image classification, https://arxiv.org/abs/1812.01187.

    Args:
        kwargs: Those of `ResNet`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(deep_stem=True, avg_down=True, **kwargs)


@MODELS.register_module(replaceable=True)
class ResNet_CIFAR(ResNet):
    """ResNet for images of 32 x 32 pixels: a 3 x 3 stem of stride 1, and no pooling behind it.

    Args:
        depth: See `ResNet`.
        deep_stem: Not to be had here.
        kwargs: Those of `ResNet`.
    """

    def __init__(self, depth: Literal[18, 34, 50, 101, 152], deep_stem: bool = False, **kwargs: Any) -> None:
        if deep_stem:
            raise WrongArgumentError("ResNet_CIFAR do not support deep_stem")
        super().__init__(depth, deep_stem=deep_stem, **kwargs)

    def _make_stem_layer(self, in_channels: int, base_channels: int) -> None:
        self._make_stem_conv(in_channels, base_channels, kernel_size=3, stride=1)
        self.maxpool = nn.Identity()
