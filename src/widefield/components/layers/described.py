"""Convolutions, norm layers and activations by description."""

from typing import Annotated, Any

from torch import nn

from widefield.registry import ComponentOf, Entry, Registry

CONVS = Registry(
    "convolution",
    lambda: [
        Entry("Conv1d", "torch.nn:Conv1d"),
        Entry("Conv2d", "torch.nn:Conv2d"),
        Entry("Conv3d", "torch.nn:Conv3d"),
        Entry("Conv", "torch.nn:Conv2d"),
    ],
)


def build_conv_layer(cfg: dict[str, Any] | None, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution.

    Args:
        cfg: `{type: Conv2d, ...}` with arguments that the caller leaves open, such as `padding_mode`; None is a `Conv2d`.
        args: Channels in, channels out, kernel size and so on, as the layer takes them.
        kwargs: The same by name.
    """
    arguments = dict(cfg or {"type": "Conv2d"})
    return CONVS.get(arguments.pop("type", "Conv2d"))(*args, **kwargs, **arguments)


NORMS = Registry(
    "norm layer",
    lambda: [
        Entry("BN", "torch.nn:BatchNorm2d", "bn"),
        Entry("BN1d", "torch.nn:BatchNorm1d", "bn"),
        Entry("BN2d", "torch.nn:BatchNorm2d", "bn"),
        Entry("BN3d", "torch.nn:BatchNorm3d", "bn"),
        Entry("SyncBN", "torch.nn:SyncBatchNorm", "bn"),
        Entry("GN", "torch.nn:GroupNorm", "gn"),
        Entry("IN", "torch.nn:InstanceNorm2d", "in"),
        Entry("LN", "torch.nn:LayerNorm", "ln"),
        Entry("LN2d", "timm.layers:LayerNorm2d", "ln"),
    ],
)
"""The kind of a norm layer is how the attributes that hold it begin."""

_CHANNELS = {"GN": "num_channels", "LN": "normalized_shape", "LN2d": "num_channels"}


def build_norm_layer(cfg: dict[str, Any], num_features: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    """A norm layer, and the name of the attribute that holds it, such as `bn1`.

    Args:
        cfg: `{type: BN, eps: 1e-5, requires_grad: true, ...}`; `requires_grad: false` freezes weight and bias.
        num_features: Channels.
        postfix: The end of the name.
    """
    arguments = dict(cfg)
    requires_grad = arguments.pop("requires_grad", True)
    name = arguments.get("type", "")
    layer: nn.Module = NORMS.build(arguments, **{_CHANNELS.get(name, "num_features"): num_features})
    for parameter in layer.parameters():
        parameter.requires_grad = requires_grad
    return f"{NORMS.kind(name) or 'norm'}{postfix}", layer


ACTIVATIONS = Registry(
    "activation",
    lambda: [
        Entry("HSwish", "torch.nn:Hardswish"),
        Entry("Swish", "torch.nn:SiLU"),
        *(
            Entry(name, f"torch.nn:{name}")
            for name in ("ELU", "GELU", "LeakyReLU", "Mish", "PReLU", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Tanh")
        ),
    ],
)

ActivationConfig = Annotated[dict[str, Any] | None, ComponentOf(ACTIVATIONS)]


def build_activation_layer(cfg: dict[str, Any] | None) -> nn.Module:
    """An activation, `{type: GELU, ...}`; None is the identity."""
    return nn.Identity() if cfg is None else ACTIVATIONS.build(cfg)
