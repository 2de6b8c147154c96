"""Normalisation layers by description."""

from typing import Any

from torch import nn

from widefield.registry import Entry, Registry

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
