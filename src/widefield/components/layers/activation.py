"""Activations by description."""

from typing import Annotated, Any

from torch import nn

from widefield.registry import ComponentOf, Entry, Registry

ACTIVATIONS = Registry(
    "activation",
    lambda: [
        Entry("ELU", "torch.nn:ELU"),
        Entry("GELU", "torch.nn:GELU"),
        Entry("HSwish", "torch.nn:Hardswish"),
        Entry("LeakyReLU", "torch.nn:LeakyReLU"),
        Entry("Mish", "torch.nn:Mish"),
        Entry("PReLU", "torch.nn:PReLU"),
        Entry("ReLU", "torch.nn:ReLU"),
        Entry("ReLU6", "torch.nn:ReLU6"),
        Entry("SiLU", "torch.nn:SiLU"),
        Entry("Sigmoid", "torch.nn:Sigmoid"),
        Entry("Swish", "torch.nn:SiLU"),
        Entry("Tanh", "torch.nn:Tanh"),
    ],
)

ActivationConfig = Annotated[dict[str, Any] | None, ComponentOf(ACTIVATIONS)]


def build_activation_layer(cfg: dict[str, Any] | None) -> nn.Module:
    """An activation, `{type: GELU, ...}`; None is the identity."""
    layer: nn.Module = nn.Identity() if cfg is None else ACTIVATIONS.build(cfg)
    return layer
