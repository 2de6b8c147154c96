"""Plain networks by name, before they are split and streamed."""

from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import URLError

import torchvision.models
from torch import nn
from torchvision.models import ResNet, WeightsEnum

from widefield.models.names import RESNETS, TIMM_PREFIX, unknown_model
from widefield.models.narrow_resnet import NARROW_RESNETS, NarrowResNet
from widefield.models.weights import load_weights

Weights: TypeAlias = str | Path | WeightsEnum | None
_ELSEWHERE = ("hf_hub:", "hf-hub:", "local-dir:")  # where else timm finds models


def make_resnet(name: str, num_classes: int, weights: Weights) -> ResNet | NarrowResNet:
    """A torchvision ResNet with the last layer of its weights, or a narrow one with `num_classes` outputs.

    Args:
        name: One of `RESNETS`.
        num_classes: Outputs of a network without pretrained weights.
        weights: "DEFAULT", None or a file, as for `StreamingResNet`.
    """
    if name not in NARROW_RESNETS:
        return make_torchvision(name, num_classes, weights)  # type: ignore[return-value]
    if weights == "DEFAULT":
        raise ValueError(f"{name} has no pretrained weights; give weights=None for random ones, or a file")
    net = NarrowResNet(*NARROW_RESNETS[name], num_classes)
    if weights is not None:
        load_weights(net, str(weights))
    return net


def make_torchvision(name: str, num_classes: int, weights: Weights, **options: Any) -> nn.Module:
    """The torchvision model `name`: with the last layer of its published weights, else with `num_classes` outputs.

    `weights` are "DEFAULT" or another name or member of its `WeightsEnum`, a file, or None.
    """
    check_num_classes(num_classes)
    known = torchvision.models.get_model_weights(name)
    published = weights if isinstance(weights, WeightsEnum) else known.__members__.get(str(weights))
    if published is not None:
        try:
            net: nn.Module = torchvision.models.get_model(name, weights=published, **options)
        except (URLError, OSError) as error:
            raise _no_download(name, error) from error
        return net
    if weights is not None and not (isinstance(weights, (str, Path)) and Path(weights).exists()):
        raise FileNotFoundError(
            f"weights={weights!r} is neither a file nor one of the published {', '.join(known.__members__)}; None makes random ones"
        )
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if weights is not None:
        load_weights(net, str(weights))
    return net


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError if it is no positive number."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} must be a positive int")


def new_linear(channels: int, num_classes: int) -> nn.Linear:
    """A last layer with Xavier-normal weights and no bias at first."""
    layer = nn.Linear(channels, num_classes)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def make_timm(name: str, num_classes: int, weights: Weights, **options: Any) -> nn.Module:
    """The timm model `name`, with or without the prefix `timm/`, with `num_classes` outputs."""
    import timm  # seconds to import, and most runs don't need it

    check_num_classes(num_classes)
    short = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(short) and not short.startswith(_ELSEWHERE):
        raise unknown_model(name, [TIMM_PREFIX + choice for choice in timm.list_models()])
    try:
        net: nn.Module = timm.create_model(short, pretrained=weights == "DEFAULT", num_classes=num_classes, **options)
    except OSError as error:
        raise _no_download(name, error) from error
    if weights is not None and weights != "DEFAULT":
        load_weights(net, str(weights))
    return net


def make_model(name: str, num_classes: int, weights: Weights) -> nn.Module:
    """The network of any name that `fit --model` takes: a torchvision ResNet, a narrow ResNet, or `timm/NAME`.

    Raises:
        ValueError: There is no such model.
    """
    if name.startswith(TIMM_PREFIX):
        return make_timm(name, num_classes, weights)
    if name not in RESNETS:
        import timm

        near_timm = [TIMM_PREFIX + choice for choice in timm.list_models(f"{name}*")[:20]]
        raise unknown_model(name, [*RESNETS, *near_timm])
    return make_resnet(name, num_classes, weights)


def _no_download(name: str, error: Exception) -> OSError:
    return OSError(
        f"the pretrained weights of {name} could not be downloaded ({error}); "
        "fetch the file by other means and give its path as weights, or give none for random weights"
    )
