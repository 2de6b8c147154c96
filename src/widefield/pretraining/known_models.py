"""Wrappers of models that are known: torchvision, timm, and the backbones of Widefield."""

import math
from typing import Any

import torch
from torch import Tensor, nn


class KnownModel(nn.Module):
    """A wrapper whose maps are averaged over all positions, or whose class token stands for the image."""

    def __init__(self, model: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self._model = model
        self._feature_dim = feature_dim

    def get_model(self) -> nn.Module:
        return self._model

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        """{"features": (B, C, H, W)} of images (B, channels, height, width)."""
        return {"features": self.maps(x)}

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        """{"pooled_features": (B, C, 1, 1)}"""
        token = x.get("cls_token")
        pooled = x["features"].mean((2, 3), keepdim=True) if token is None else token[:, :, None, None]
        return {"pooled_features": pooled}

    def feature_dim(self) -> int:
        return self._feature_dim

    def maps(self, x: Tensor) -> Tensor:
        """The last map (B, C, H, W)."""
        raise NotImplementedError


class ResNetLike(KnownModel):
    """torchvision's ResNet, and whatever has its parts."""

    PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

    def maps(self, x: Tensor) -> Tensor:
        for part in self.PARTS:
            x = getattr(self._model, part)(x)
        return x


class PartsInARow(KnownModel):
    """A model whose parts of the names `parts`, one after the other, make its last map."""

    def __init__(self, model: nn.Module, feature_dim: int, parts: tuple[str, ...]) -> None:
        super().__init__(model, feature_dim)
        self._parts = parts

    def maps(self, x: Tensor) -> Tensor:
        for part in self._parts:
            x = getattr(self._model, part)(x)
        return x


class DenseNetLike(PartsInARow):
    """torchvision's DenseNet, whose last ReLU is no part of it."""

    def maps(self, x: Tensor) -> Tensor:
        return super().maps(x).relu()


class Timm(KnownModel):
    """A timm model: maps are brought to (B, C, H, W), class tokens stand beside them as "cls_token" (B, C)."""

    def maps(self, x: Tensor) -> Tensor:
        return self.forward_features(x)["features"]  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        out: Tensor = self._model.forward_features(x)  # type: ignore[operator]
        if out.ndim == 3:
            return self._from_tokens(out, x)
        last = getattr(self._model, "output_fmt", "NCHW") == "NHWC" or (
            out.shape[1] != self._feature_dim and out.shape[-1] == self._feature_dim
        )
        return {"features": out.permute(0, 3, 1, 2) if last else out}

    def _from_tokens(self, tokens: Tensor, x: Tensor) -> dict[str, Any]:
        prefix = int(getattr(self._model, "num_prefix_tokens", 0))
        patches = tokens[:, prefix:]
        height, width = x.shape[-2:]
        rows = max(1, round(math.sqrt(patches.shape[1] * height / width)))
        maps = patches.transpose(1, 2).reshape(len(x), -1, rows, patches.shape[1] // rows)
        has_class = prefix > 0 and getattr(self._model, "cls_token", None) is not None
        return {"features": maps, **({"cls_token": tokens[:, 0]} if has_class else {})}


class Backbone(KnownModel):
    """A backbone of `widefield.components`: its last map."""

    def maps(self, x: Tensor) -> Tensor:
        out = self._model(x)
        return out[-1] if isinstance(out, tuple) else out


def channels_of_maps(wrapper: KnownModel, in_channels: int, side: int = 64) -> int:
    """Channels of the maps that `wrapper` makes, asked of the model itself; nothing of it changes."""
    device = next((p.device for p in wrapper.parameters()), torch.device("cpu"))
    modes = [(part, part.training) for part in wrapper.modules()]
    wrapper.eval()
    try:
        with torch.no_grad():
            return wrapper.maps(torch.zeros(1, in_channels, side, side, device=device)).shape[1]
    finally:
        for part, mode in modes:
            part.training = mode
