"""Types of arguments that take a component or its description."""

from typing import Annotated, Any

from torch import nn

from widefield.components.initializers import INITIALIZERS
from widefield.components.layers.conv import CONVS
from widefield.components.layers.norm import NORMS
from widefield.registry import MODELS, ComponentOf

BackboneConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "backbone")]
NeckConfig = Annotated[nn.Module | dict[str, Any] | list[dict[str, Any]], ComponentOf(MODELS, "neck")]
HeadConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "head")]
LossConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "loss")]
InitConfig = Annotated[dict[str, Any] | list[dict[str, Any]] | None, ComponentOf(INITIALIZERS)]
ConvConfig = Annotated[
    dict[str, Any] | None,
    ComponentOf(
        CONVS,
        given=("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
]
NormConfig = Annotated[
    dict[str, Any],
    ComponentOf(NORMS, given=("num_features", "num_channels", "normalized_shape"), also={"requires_grad": bool}),
]
