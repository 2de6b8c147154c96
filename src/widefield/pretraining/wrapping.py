"""Wrappers: their contract, those of models that are known, and which of them a model gets."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import densenet, mnasnet, regnet, shufflenetv2, swin_transformer

from widefield.components.component import Component
from widefield.models.networks import adapt_first_layer, unknown_model
from widefield.models.resnet.resnet import TRUNK
from widefield.registry import MODELS


class KnownModel(nn.Module):
    """A wrapper whose maps are averaged over all positions, or whose class token stands for the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._feature_dim = 0

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


class PartsInARow(KnownModel):
    """A model whose parts of the names `parts`, one after the other, make its last map."""

    def __init__(self, model: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__(model)
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

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._feature_dim = int(model.num_features)  # type: ignore[arg-type]

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


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its parts back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


METHODS_OF_A_WRAPPER = ("get_model", "forward_features", "forward_pool", "feature_dim")


@runtime_checkable
class ModelWrapper(Protocol):
    """The methods that `widefield.train` asks of a model, which is a `torch.nn.Module`."""

    def get_model(self) -> nn.Module:
        """The model whose weights are exported."""

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        """Features of images (B, C, H_in, W_in): a dict with "features" (B, feature_dim, H_out, W_out), and whatever else
        `forward_pool` needs.
        """

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        """Pools the whole dict of `forward_features`: a dict with "pooled_features" (B, feature_dim, H_out, W_out)."""

    def feature_dim(self) -> int:
        """Channels of "features" and of "pooled_features"."""


Wrapped = Any
"""A `torch.nn.Module` that is a `ModelWrapper`, which Python's types cannot say."""

RGB = 3
PACKAGES = ("torchvision", "timm", "widefield")
_PARTS: dict[type[nn.Module], tuple[str, ...]] = {
    shufflenetv2.ShuffleNetV2: ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"),
    mnasnet.MNASNet: ("layers",),
    regnet.RegNet: ("stem", "trunk_output"),
    swin_transformer.SwinTransformer: ("features", "norm", "permute"),
}


def wrap(model: Any, model_args: Mapping[str, Any] | None = None, num_channels: int = 3) -> Wrapped:
    """The wrapper of `model`.

    Args:
        model: A wrapper, which is returned as it is; a model of torchvision or timm or a backbone of Widefield; or
            "package/name", such as "torchvision/resnet18", "timm/convnext_tiny" or "widefield/ResNet".
        model_args: Arguments of the model's constructor, for a name only.
        num_channels: Of the images; models of timm and torchvision are made for them.

    Raises:
        ValueError: It is none of these; the message names the methods that a wrapper of one's own still lacks, or the near names.
    """
    if isinstance(model, str):
        return wrap(_make(model, dict(model_args or {}), num_channels))
    if model_args:
        raise ValueError(
            f'model_args are for a name such as "torchvision/resnet18"; model is a {type(model).__name__} that is made already'
        )
    missing = [name for name in METHODS_OF_A_WRAPPER if not callable(getattr(model, name, None))]
    if isinstance(model, nn.Module):
        wrapper = _known(model) if missing else model
        if wrapper is not None:
            return wrapper
    raise ValueError(
        f"model is a {type(model).__name__}, which is no model that is known by itself. To train a model of your own, wrap it:\n"
        f" - inherits from torch.nn.Module: {isinstance(model, nn.Module)}\n"
        f" - missing methods: {', '.join(missing) if missing else 'none'}"
        + ("" if not isinstance(model, type) else "\n - it is a class: give an instance")
    )


def has_batch_norm(wrapper: Wrapped) -> bool:
    """Return True if the model is a convolutional network with batch norm.

    Its optional `architecture_info()` says so, {"model_type": "convolutional", "norm_type": "batchnorm"}, else its layers do.
    """
    if callable(getattr(wrapper, "architecture_info", None)):
        return wrapper.architecture_info() == {"model_type": "convolutional", "norm_type": "batchnorm"}  # type: ignore[no-any-return]
    kinds = [type(part).__name__ for part in wrapper.get_model().modules()]
    return any("BatchNorm" in kind for kind in kinds) and not any("Attention" in kind for kind in kinds)


def to_training_mode(model: nn.Module) -> None:
    """`model.train()`, which Lightning leaves to its user, but what is frozen and in evaluation mode stays in it.

    Frozen is a part with weights of which none requires a gradient: a batch norm of a frozen backbone keeps its statistics, if the
    user called its `eval()`.
    """
    frozen = [part for part in model.modules() if not part.training and _is_frozen(part)]
    model.train()
    for part in frozen:
        part.eval()


def _is_frozen(part: nn.Module) -> bool:
    weights = list(part.parameters())
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def _known(model: nn.Module) -> KnownModel | None:
    """Return the wrapper of a model that is known; torchvision's vision transformers are not: they take one image size only."""
    package = next((c.__module__.partition(".")[0] for c in type(model).__mro__ if c.__module__[:4] == "timm"), "")
    if package == "timm" and hasattr(model, "forward_features"):
        return Timm(model)
    if isinstance(model, Component) and getattr(model, "component_kind", "") == "backbone":
        return _measured(Backbone(model))
    if isinstance(model, densenet.DenseNet):
        return _measured(DenseNetLike(model, ("features",)))
    if all(hasattr(model, part) for part in TRUNK):
        return _measured(PartsInARow(model, TRUNK))
    for kind, parts in _PARTS.items():
        if isinstance(model, kind):
            return _measured(PartsInARow(model, parts))
    if type(model).__module__.startswith("torchvision.models") and isinstance(
        getattr(model, "features", None), nn.Module
    ):
        return _measured(PartsInARow(model, ("features",)))
    return None


def _measured(wrapper: KnownModel, side: int = 64) -> KnownModel:
    """Ask the model itself how many channels its maps have; nothing of it changes."""
    first = next((layer for layer in wrapper.modules() if isinstance(layer, nn.Conv2d)), None)
    device = next((p.device for p in wrapper.parameters()), torch.device("cpu"))
    images = torch.zeros(1, 3 if first is None else first.in_channels, side, side, device=device)
    with evaluating(wrapper), torch.no_grad():
        wrapper._feature_dim = wrapper.maps(images).shape[1]
    return wrapper


def _make(name: str, arguments: dict[str, Any], num_channels: int) -> nn.Module | ModelWrapper:
    package, short = split_name(name)
    if package == "torchvision":
        of_torchvision = torchvision.models.list_models(torchvision.models)
        if short not in of_torchvision:
            raise unknown_model(name, [f"{package}/{one}" for one in of_torchvision])
        made = _built(name, torchvision.models.get_model, short, **arguments)
        if num_channels != RGB:
            adapt_first_layer(made, num_channels)
        return made
    if package == "timm":
        import timm

        if not timm.is_model(short):
            raise unknown_model(name, [f"{package}/{one}" for one in timm.list_models()])
        given = {"num_classes": 0, "in_chans": num_channels, **arguments}
        with suppress(TypeError):  # transformers know it, so that views may have other sizes; most others do not
            return timm.create_model(short, **{"dynamic_img_size": True, **given})  # type: ignore[no-any-return]
        return _built(name, timm.create_model, short, **given)  # type: ignore[no-any-return]
    return _built(name, MODELS.build, {"type": short, **arguments})  # type: ignore[no-any-return]


def split_name(name: str) -> tuple[str, str]:
    """Return the package and the model that a name such as "torchvision/resnet18" is made of.

    Raises:
        ValueError: It has none of the `PACKAGES`.
    """
    package, _, short = name.partition("/")
    if package in PACKAGES and short:
        return package, short
    if package in THEIRS and short:
        raise ValueError(f"{name!r} is a name of LightlyTrain; {_theirs(package, short)}")
    hint = "such as torchvision/resnet18" if "/" in name else f"did you mean torchvision/{name} or timm/{name}?"
    raise ValueError(f"model {name!r} must be written package/name, with a package of {', '.join(PACKAGES)}; {hint}")


THEIRS = {
    "dinov2": "Meta's, Apache-2.0",
    "dinov3": "Meta's, under its DINOv3 licence",
    **dict.fromkeys(("edgecrafter", "rfdetr", "super_gradients", "ultralytics"), ""),
}
"""Packages in the names of LightlyTrain's models, and whose the weights are that timm has of them."""

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant", "h": "huge", "7b": "7b"}


def _theirs(package: str, name: str) -> str:
    """Return where a model of LightlyTrain is found, and its weights."""
    made = re.fullmatch(r"(vit(s|b|l|g|h|7b)1[46](plus)?|convnext-(\w+))(-noreg|-notpretrained)?", name)
    if not THEIRS[package] or made is None:
        return "it is not here: make the model with its own package, load its weights, and give a wrapper of it"
    size, convnext = _SIZES.get(made[2] or ""), made[4]
    if convnext:
        found = f"convnext_{convnext}.dinov3_lvd1689m"
    elif package == "dinov3":
        found = f"vit_{size}{'_plus' if made[3] else ''}_patch16_dinov3"
    else:
        found = f"vit_{size}_patch14_{'' if made[5] == '-noreg' else 'reg4_'}dinov2"
    return (
        f"the model is timm/{found}, whose weights ({THEIRS[package]}) timm downloads with {{'pretrained': True}} as model_args, "
        "or as teacher_args of a teacher; a file of them is taken as checkpoint, or as teacher_weights"
    )


def _built(name: str, make: Any, *positional: Any, **arguments: Any) -> Any:
    try:
        return make(*positional, **arguments)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{name} cannot be made with model_args={arguments}: {error}") from error
