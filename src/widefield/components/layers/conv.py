"""Convolutions by description."""

from typing import Any

from torch import nn

from widefield.registry import Entry, Registry

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
    layer: nn.Module = CONVS.get(arguments.pop("type", "Conv2d"))(*args, **kwargs, **arguments)
    return layer
