"""ResNet for small images."""

from typing import Any, Literal

from torch import nn

from widefield.components.backbones.resnet import ResNet
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.conv import build_conv_layer
from widefield.components.layers.norm import build_norm_layer
from widefield.registry import MODELS


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
        self.conv1 = build_conv_layer(
            self.conv_cfg, in_channels, base_channels, kernel_size=3, stride=1, padding=1, bias=False
        )
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, base_channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
