"""Patch encoders: a network for small pictures, applied to every patch of an image of any size."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widefield.errors import WrongArgumentError
from widefield.models.networks import make_timm
from widefield.streaming.local import Local, Partial

Pooling = Literal["default", "token", "avg", "token+avg"]
POOLINGS: tuple[Pooling, ...] = ("default", "token", "avg", "token+avg")


class PatchEncoder(Local):
    """A network on every patch of an image: (B, C, H, W) to a map of features (B, D, rows, columns).

    `stream(nn.Sequential(PatchEncoder("timm/vit_small_patch16_224"), head))` trains encoder and head together on whole slides.
    Patches are normalised, and resized if `size` is not what the network takes, as timm's configuration of the network says.
    Images hold values from 0 to 1.

    Args:
        network: `timm/NAME`, `timm/hf-hub:OWNER/NAME` or `timm/local-dir:FOLDER`, or a module that takes (N, C, size, size) and
            gives vectors (N, D) or small maps (N, D, a, b).
        size: pixels of a patch, along each side.
        spacing: micrometres per pixel of the images that the network is for; noted, for whoever opens them.
        stride: distance of two patches in pixels; None: `size`.
        weights: "DEFAULT" fetches those of timm; a file, `.safetensors` or what `torch.save` wrote; None: random ones, or those
            that the module has.
        pooling: "default", as the network's own head has it, or of the tokens of a transformer: "token", its class token, "avg",
            the mean of its patch tokens, "token+avg", both one after the other.
        input_size: pixels of the pictures that the network takes; None: those of timm's configuration; of a module, `size`.
        mean, std: per channel; None: those of timm's configuration; of a module without one, none.
        padding, partial, fill, chunk: As of `Local`. Padding is a value from 0 to 1.
        options: more arguments of the timm network, such as `{"drop_path_rate": 0.1}`.

    Attributes:
        spacing: see above.
        input_size, interpolation: what patches are resized to, and how.

    Raises:
        WrongArgumentError: there is no such network, or an argument cannot be used.
        OSError: weights cannot be fetched or read.

    Examples:
        >>> encoder = PatchEncoder("timm/vit_tiny_patch16_224", size=32, input_size=32)
        >>> encoder(torch.rand(1, 3, 100, 70)).shape
        torch.Size([1, 192, 3, 2])
    """

    def __init__(
        self,
        network: str | nn.Module,
        size: int = 224,
        spacing: float = 0.5,
        *,
        stride: int | None = None,
        weights: str | Path | None = None,
        pooling: Pooling = "default",
        input_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        padding: int = 0,
        partial: Partial = "drop",
        fill: float = 0.0,
        chunk: int = 64,
        options: dict[str, Any] | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise WrongArgumentError(f"pooling={pooling!r} must be one of {', '.join(map(repr, POOLINGS))}")
        if not isinstance(spacing, (int, float)) or not isfinite(spacing) or spacing <= 0:
            raise WrongArgumentError(f"spacing={spacing!r} must be a positive number, micrometres per pixel")
        named = isinstance(network, str)
        if isinstance(network, str):
            network = _timm_network(network, weights, input_size, options or {})
        elif not isinstance(network, nn.Module):
            raise WrongArgumentError(f"network must be the name of one or a module, got {type(network).__name__}")
        elif weights is not None or options:
            raise WrongArgumentError(
                f"weights={weights!r}, options={options!r} are for networks by name: load them into the module first"
            )
        config = _data_config(network)
        taken = input_size or (config["input_size"][-1] if named else size)
        mean, std = config.get("mean") if mean is None else mean, config.get("std") if std is None else std
        interpolation = config.get("interpolation", "bicubic")
        if interpolation not in ("bicubic", "bilinear"):
            interpolation = "bicubic"
        encoder = _Encoder(network, None if taken == size else taken, interpolation, mean, std, pooling)
        super().__init__(encoder, size, stride, padding, partial=partial, fill=fill, chunk=chunk)
        self.spacing, self.input_size, self.interpolation = float(spacing), taken, interpolation


def _timm_network(name: str, weights: str | Path | None, input_size: int | None, options: dict[str, Any]) -> nn.Module:
    if not name.startswith("timm/"):
        raise WrongArgumentError(f"network={name!r} must be timm/NAME, such as timm/vit_small_patch16_224, or a module")
    sized = {} if input_size is None else {"img_size": input_size}
    try:
        network: Any = make_timm(name, 1, weights, **sized, **options)
    except TypeError as error:
        if not sized:
            raise WrongArgumentError(f"{name} does not take options={options}: {error}") from error
        network = _timm_network(name, weights, None, options)  # a network of convolutions takes any size
    network.reset_classifier(0)
    return network


def _data_config(network: nn.Module) -> dict[str, Any]:
    """timm's configuration of a network of timm; an empty one for others."""
    if not (hasattr(network, "pretrained_cfg") or hasattr(network, "default_cfg")):
        return {}
    from timm.data import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(network)
    return found


class _Encoder(nn.Module):
    """Patches (N, C, h, w) from 0 to 1, as the network takes them, to its features."""

    def __init__(
        self,
        network: nn.Module,
        size: int | None,
        interpolation: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        pooling: Pooling,
    ) -> None:
        super().__init__()
        if pooling != "default" and not hasattr(network, "forward_features"):
            raise WrongArgumentError(
                f"pooling={pooling!r} is for transformers of timm, whose tokens are known; {type(network).__name__} pools by itself"
            )
        self.network, self.size, self.interpolation, self.pooling = network, size, interpolation, pooling
        for name, values in (("mean", mean), ("std", std)):
            given = None if values is None else torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)
            if given is not None and name == "std" and not (given > 0).all():
                raise WrongArgumentError(f"std={tuple(values or ())} must be positive")
            dtype = torch.get_default_dtype()
            self.register_buffer(name, None if given is None else given.to(dtype), persistent=False)
        self.mean: Tensor | None
        self.std: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode=self.interpolation, antialias=True)
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        network: Any = self.network
        if self.pooling == "default":
            return network(x)  # type: ignore[no-any-return]
        tokens = network.forward_features(x)
        prefix = getattr(network, "num_prefix_tokens", 0)
        if tokens.ndim != 3 or (prefix == 0 and "token" in self.pooling):
            raise WrongArgumentError(
                f"pooling={self.pooling!r} is for transformers with such tokens; {type(network).__name__} gives features of shape "
                f"{tuple(tokens.shape)} with {prefix} class tokens: use pooling='default'"
            )
        parts = {"token": tokens[:, 0] if prefix else None, "avg": tokens[:, prefix:].mean(1)}
        return torch.cat([part for key in self.pooling.split("+") if (part := parts[key]) is not None], 1)
