"""MobileNets and EfficientNet, with the layers of torchvision."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn
from torchvision import models
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from widefield.components.backbones.base_backbone import (
    SequentialBackbone,
    check_drop_path_rate,
    check_frozen_stages,
    convolution_like,
    replace_layers,
)
from widefield.components.component import (
    ActivationConfig,
    ConvConfig,
    NormConfig,
    build_activation_layer,
    build_norm_layer,
)
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, suggestion

_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
"""Blocks of each stage of MobileNetV2."""


def _norm_layer(norm_cfg: NormConfig) -> Callable[[int], nn.Module]:
    return lambda channels: build_norm_layer(norm_cfg, channels)[1]


def _adapt(features: nn.Module, conv_cfg: ConvConfig, activation: type[nn.Module], act_cfg: ActivationConfig) -> None:
    """Make the convolutions and the activations of torchvision's layers those that are described."""
    if conv_cfg is not None:
        replace_layers(features, nn.Conv2d, lambda layer: convolution_like(layer, conv_cfg))
    if not isinstance(build_activation_layer(act_cfg), activation):
        replace_layers(features, activation, lambda layer: build_activation_layer(act_cfg))


@MODELS.register_module()
class MobileNetV2(SequentialBackbone):
    """MobileNetV2: seven stages of inverted residuals and a last convolution.

    Sandler et al., 2018, https://arxiv.org/abs/1801.04381. The layers are torchvision's, whose checkpoints load, as do those of
    MMPretrain.

    Args:
        widen_factor: Multiplies the channels of every layer; of the last one only above 1.
        out_indices: What is returned: maps of the stages (0 to 6) and of the last convolution (7).
        frozen_stages: The stem (0) and this many stages do not train; -1 freezes nothing.
        conv_cfg: Type and options of the convolutions.
        norm_cfg: Type and options of the norm layers.
        act_cfg: Type and options of the activations.
        kwargs: Those of `SequentialBackbone`.
    """

    def __init__(
        self,
        widen_factor: float = 1.0,
        out_indices: int | Sequence[int] = (7,),
        frozen_stages: int = -1,
        conv_cfg: ConvConfig = None,
        norm_cfg: NormConfig = {"type": "BN"},  # noqa: B006  # read, never written
        act_cfg: ActivationConfig = {"type": "ReLU6"},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        if widen_factor <= 0:
            raise WrongArgumentError(f"widen_factor={widen_factor} must be positive")
        check_frozen_stages(frozen_stages, -1, len(_BLOCKS))

        net = models.MobileNetV2(num_classes=1, width_mult=widen_factor, norm_layer=_norm_layer(norm_cfg))
        _adapt(net.features, conv_cfg, nn.ReLU6, act_cfg)
        ends = [1 + sum(_BLOCKS[: stage + 1]) for stage in range(len(_BLOCKS))]
        frozen_layers = 0 if frozen_stages < 0 else [1, *ends][frozen_stages]
        ends.append(len(net.features))
        super().__init__(net.features, ends, out_indices, frozen_layers, **kwargs)
        self.widen_factor = widen_factor
        self.frozen_stages = frozen_stages


_SMALL = {
    "small": (16, 24, 24, 40, 40, 40, 48, 48, 96, 96, 96),
    "small_075": (16, 24, 24, 32, 32, 32, 40, 40, 72, 72, 72),
    "small_050": (8, 16, 16, 24, 24, 24, 24, 24, 48, 48, 48),
}
"""Channels behind each block of the small networks; the stem has 16 in all of them."""
_EXPANDED = {
    "small": (16, 72, 88, 96, 240, 240, 120, 144, 288, 576, 576),
    "small_075": (16, 72, 88, 96, 192, 192, 96, 120, 240, 432, 432),
    "small_050": (16, 40, 56, 64, 144, 144, 72, 72, 144, 288, 288),
}
"""Channels inside of each block."""
_STRIDED, _KERNEL_3, _SQUEEZED = (0, 1, 3, 8), 3, (0, *range(3, 11))
"""Blocks of stride 2, how many have kernels of 3 x 3, and which have Squeeze-and-Excite."""


def _mobilenet_v3(arch: str, norm_layer: Callable[[int], nn.Module]) -> nn.Sequential:
    """Return the layers of torchvision; it has the widths of MMPretrain, not 3 / 4 and 1 / 2 of all of the small network."""
    if arch == "large":
        return models.mobilenet_v3_large(weights=None, num_classes=1, norm_layer=norm_layer).features  # type: ignore[no-any-return]
    blocks = [
        InvertedResidualConfig(
            before,
            3 if k < _KERNEL_3 else 5,
            inside,
            after,
            k in _SQUEEZED,
            "RE" if k < _KERNEL_3 else "HS",
            2 if k in _STRIDED else 1,
            dilation=1,
            width_mult=1.0,
        )
        for k, (before, inside, after) in enumerate(zip((16, *_SMALL[arch]), _EXPANDED[arch], _SMALL[arch]))
    ]
    return models.MobileNetV3(blocks, last_channel=8, num_classes=1, norm_layer=norm_layer).features


@MODELS.register_module()
class MobileNetV3(SequentialBackbone):
    """MobileNetV3: inverted residuals with squeeze-and-excitation and hard swish.

    Howard et al., 2019, https://arxiv.org/abs/1905.02244. The layers are torchvision's, whose checkpoints load, as do those of
    MMPretrain.

    Args:
        arch: The network; `small_075` and `small_050` have about that share of the channels, and a stem of as many.
        out_indices: What is returned: maps of the stem (0), of the blocks, and of the last convolution (12 of the small ones, 16 of
            the large one), which is what None returns.
        frozen_stages: The stem and this many blocks behind it do not train; -1 freezes nothing.
        conv_cfg: Type and options of the convolutions.
        norm_cfg: Type and options of the norm layers.
        kwargs: Those of `SequentialBackbone`.
    """

    def __init__(
        self,
        arch: Literal["small", "small_075", "small_050", "large"] = "small",
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        conv_cfg: ConvConfig = None,
        norm_cfg: NormConfig = {"type": "BN", "eps": 0.001, "momentum": 0.01},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        if arch not in (*_SMALL, "large"):
            raise WrongArgumentError(f"arch={arch!r} is unknown; {suggestion(str(arch), [*_SMALL, 'large'])}")

        features = _mobilenet_v3(arch, _norm_layer(norm_cfg))
        if conv_cfg is not None:
            replace_layers(features, nn.Conv2d, lambda layer: convolution_like(layer, conv_cfg))
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

    Tan and Le, 2019, https://arxiv.org/abs/1905.11946. The layers are torchvision's, but by default they pad as TensorFlow does,
    and `eps` is 1e-3, as in the paper's networks and in MMPretrain, whose checkpoints load. Those of torchvision need
    `conv_cfg={type: Conv2d}`, and up to b4 `norm_cfg={type: BN}`, and are refused otherwise. `TimmBackbone` has the edge
    networks and EfficientNetV2.

    Args:
        arch: The network.
        drop_path_rate: Probability with which an image skips a block in training; it grows linearly towards this.
        out_indices: What is returned: maps of the stem (0), of the stages (1 to 5: a half, a quarter, ... of the image's size) and
            of the last convolution (6).
        frozen_stages: How many of these seven, from the stem on, do not train.
        conv_cfg: Type and options of the convolutions: Conv2dAdaptivePadding pads as TensorFlow does, Conv2d as PyTorch.
        norm_cfg: Type and options of the norm layers.
        act_cfg: Type and options of the activations.
        kwargs: Those of `SequentialBackbone`.
    """

    def __init__(
        self,
        arch: Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"] = "b0",
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (6,),
        frozen_stages: int = 0,
        conv_cfg: ConvConfig = {"type": "Conv2dAdaptivePadding"},  # noqa: B006  # read, never written
        norm_cfg: NormConfig = {"type": "BN", "eps": 0.001},  # noqa: B006  # read, never written
        act_cfg: ActivationConfig = {"type": "Swish"},  # noqa: B006  # read, never written
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
        replace_layers(features, nn.BatchNorm2d, lambda layer: build_norm_layer(norm_cfg, layer.num_features)[1])
        _adapt(features, conv_cfg, nn.SiLU, act_cfg)
        frozen_layers = [0, *_ENDS][frozen_stages]
        super().__init__(features, _ENDS, out_indices, frozen_layers, **kwargs)
        self.arch = arch
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.frozen_stages = frozen_stages

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """See `AdaptsWeights`.

        Raises:
            WrongArgumentError: The weights are torchvision's, whose network pads otherwise.
        """
        padded = self.conv_cfg is not None and self.conv_cfg.get("type") == "Conv2dAdaptivePadding"
        if padded and f"{prefix}classifier.1.weight" in weights:
            raise WrongArgumentError(
                "these are weights of torchvision's EfficientNet, which pads and normalises otherwise than this one; give "
                "conv_cfg={type: Conv2d}, and up to b4 norm_cfg={type: BN}"
            )
        super().adapt(weights, prefix)
