"""MobileNets and EfficientNet, with the layers and weights of torchvision."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torchvision import models
from torchvision.models.mobilenetv3 import MobileNetV3 as MobileNetV3Classifier
from torchvision.models.mobilenetv3 import _mobilenet_v3_conf
from torchvision.ops import Conv2dNormActivation

from widefield.components.backbones.base_backbone import SequentialBackbone, check_drop_path_rate, check_frozen_stages
from widefield.components.component import ConvConfig, NormConfig, build_conv_layer, build_norm_layer
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, suggestion

_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
"""Blocks of each stage of MobileNetV2."""


def _norm_layer(norm_cfg: NormConfig) -> Callable[[int], nn.Module]:
    return lambda channels: build_norm_layer(norm_cfg, channels)[1]


@MODELS.register_module()
class MobileNetV2(SequentialBackbone):
    """MobileNetV2: seven stages of inverted residuals and a last convolution.

    Sandler et al., 2018, https://arxiv.org/abs/1801.04381. The layers are torchvision's, whose checkpoints load, as do those of
    MMPretrain.

    Args:
        widen_factor: Multiplies the channels of every layer; of the last one only above 1.
        out_indices: What is returned: maps of the stages (0 to 6) and of the last convolution (7).
        frozen_stages: The stem (0) and this many stages do not train; -1 freezes nothing.
        norm_cfg: Type and options of the norm layers.
        kwargs: Those of `SequentialBackbone`.
    """

    def __init__(
        self,
        widen_factor: float = 1.0,
        out_indices: int | Sequence[int] = (7,),
        frozen_stages: int = -1,
        norm_cfg: NormConfig = {"type": "BN"},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        if widen_factor <= 0:
            raise WrongArgumentError(f"widen_factor={widen_factor} must be positive")
        check_frozen_stages(frozen_stages, -1, len(_BLOCKS))

        net = models.MobileNetV2(num_classes=1, width_mult=widen_factor, norm_layer=_norm_layer(norm_cfg))
        ends = [1 + sum(_BLOCKS[: stage + 1]) for stage in range(len(_BLOCKS))]
        frozen_layers = 0 if frozen_stages < 0 else [1, *ends][frozen_stages]
        ends.append(len(net.features))
        super().__init__(net.features, ends, out_indices, frozen_layers, **kwargs)
        self.widen_factor = widen_factor
        self.frozen_stages = frozen_stages


_NARROW = {
    "small_075": (
        (16, 16), (72, 24), (88, 24), (96, 32), (192, 32), (192, 32), (96, 40), (120, 40), (240, 72), (432, 72), (432, 72),
    ),
    "small_050": (
        (16, 8), (40, 16), (56, 16), (64, 24), (144, 24), (144, 24), (72, 24), (72, 24), (144, 48), (288, 48), (288, 48),
    ),
}  # fmt: skip
"""Channels inside and behind each block of the narrow networks of MMPretrain and timm, which round otherwise than torchvision."""
_MOBILENETS = ("small", *_NARROW, "large")


def _mobilenet_v3(arch: str, norm_layer: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the layers of the network `arch`."""
    if arch not in _NARROW:
        net = models.get_model(f"mobilenet_v3_{arch}", weights=None, num_classes=1, norm_layer=norm_layer)
        return net.features  # type: ignore[return-value]
    blocks, _ = _mobilenet_v3_conf("mobilenet_v3_small")
    for block, (inside, after), before in zip(blocks, _NARROW[arch], [(0, 16), *_NARROW[arch]], strict=False):
        block.input_channels, block.expanded_channels, block.out_channels = before[1], inside, after
    return MobileNetV3Classifier(blocks, 1, 1, norm_layer=norm_layer).features


@MODELS.register_module()
class MobileNetV3(SequentialBackbone):
    """MobileNetV3: inverted residuals with squeeze-and-excitation and hard swish.

    Howard et al., 2019, https://arxiv.org/abs/1905.02244. The layers are torchvision's, whose checkpoints load, as do those of
    MMPretrain.

    Args:
        arch: The network; `small_075` and `small_050`, which torchvision does not have, are those of MMPretrain.
        out_indices: What is returned: maps of the stem (0), of the blocks, and of the last convolution (12 of the small ones, 16 of
            the large one), which is what None returns.
        frozen_stages: The stem and this many blocks behind it do not train; -1 freezes nothing.
        norm_cfg: Type and options of the norm layers.
        kwargs: Those of `SequentialBackbone`.
    """

    def __init__(
        self,
        arch: Literal["small", "small_075", "small_050", "large"] = "small",
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_cfg: NormConfig = {"type": "BN", "eps": 0.001, "momentum": 0.01},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        if arch not in _MOBILENETS:
            raise WrongArgumentError(f"arch={arch!r} is unknown; {suggestion(str(arch), _MOBILENETS)}")

        features = _mobilenet_v3(arch, _norm_layer(norm_cfg))
        check_frozen_stages(frozen_stages, -1, len(features) - 1)
        ends = range(1, len(features) + 1)
        out_indices = -1 if out_indices is None else out_indices
        super().__init__(features, ends, out_indices, frozen_stages + 1, **kwargs)
        self.arch = arch
        self.frozen_stages = frozen_stages


_EFFICIENTNETS = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")
_ENDS = (1, 2, 3, 4, 6, 8, 9)
"""Layers of torchvision's up to the end of each stage: a stage ends where the resolution changes next."""


@MODELS.register_module()
class EfficientNet(SequentialBackbone):
    """EfficientNet b0 to b7: a stem, five stages, and a last convolution.

    Tan and Le, 2019, https://arxiv.org/abs/1905.11946. The layers are torchvision's, whose checkpoints load. Those of
    MMPretrain load where `conv_cfg` and `norm_cfg` are given: there they are `{type: Conv2dAdaptivePadding}`, which pads as
    TensorFlow does, and `{type: BN, eps: 0.001}`. `TimmBackbone` has the edge networks and EfficientNetV2.

    Args:
        arch: The network.
        drop_path_rate: Probability with which an image skips a block in training; it grows linearly towards this.
        out_indices: What is returned: maps of the stem (0), of the stages (1 to 5: a half, a quarter, ... of the image's size) and
            of the last convolution (6).
        frozen_stages: How many of these seven, from the stem on, do not train.
        conv_cfg: Type and options of the convolutions; None takes torchvision's, which pad as PyTorch does.
        norm_cfg: Type and options of the norm layers; None takes those that torchvision's checkpoint was trained with.
        kwargs: Those of `SequentialBackbone`.
    """

    def __init__(
        self,
        arch: Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"] = "b0",
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (6,),
        frozen_stages: int = 0,
        conv_cfg: ConvConfig = None,
        norm_cfg: NormConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if arch not in _EFFICIENTNETS:
            raise WrongArgumentError(
                f"arch={arch!r} is not one of {', '.join(_EFFICIENTNETS)}; TimmBackbone has other EfficientNets, "
                "such as tf_efficientnet_b8, efficientnet_es and tf_efficientnetv2_s"
            )
        check_drop_path_rate(drop_path_rate)
        check_frozen_stages(frozen_stages, 0, len(_ENDS))
        net: nn.Module = models.get_model(
            f"efficientnet_{arch}", weights=None, num_classes=1, stochastic_depth_prob=drop_path_rate
        )
        features = net.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        _replace_layers(features, conv_cfg, norm_cfg)
        frozen_layers = [0, *_ENDS][frozen_stages]
        super().__init__(features, _ENDS, out_indices, frozen_layers, **kwargs)
        self.arch = arch
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.frozen_stages = frozen_stages

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """See `AdaptsWeights`.

        Raises:
            WrongArgumentError: The weights are MMPretrain's, and it is not said that the network is as it is there.
        """
        if (self.conv_cfg is None or self.norm_cfg is None) and f"{prefix}layers.0.conv.weight" in weights:
            raise WrongArgumentError(
                "these are weights of MMPretrain's EfficientNet, which pads and normalises otherwise than torchvision's, unless "
                "its configuration says so; give conv_cfg={type: Conv2dAdaptivePadding} and norm_cfg={type: BN, eps: 0.001}, "
                "or what the configuration says"
            )
        super().adapt(weights, prefix)


def _replace_layers(features: nn.Module, conv_cfg: ConvConfig, norm_cfg: NormConfig | None) -> None:
    """Replace the convolutions that a norm layer follows, which keep their weights, and the norm layers; for None neither."""
    for layer in features.modules():
        if not isinstance(layer, Conv2dNormActivation):
            continue
        conv = layer[0]
        assert isinstance(conv, nn.Conv2d)
        if conv_cfg is not None:
            options = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
            layer[0] = build_conv_layer(conv_cfg, conv.in_channels, conv.out_channels, **options, bias=False)
            layer[0].weight = conv.weight
        if norm_cfg is not None:
            layer[1] = build_norm_layer(norm_cfg, conv.out_channels)[1]
