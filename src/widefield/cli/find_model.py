"""From what is written on the command line to a model: `file.py:name`, `package.module:name`, `timm/NAME`, `torchvision/NAME`."""

import inspect
from typing import Any

from torch import nn

from widefield.models.networks import TIMM_PREFIX, unknown_model
from widefield.registry import import_module_or_file, suggestion

TORCHVISION_PREFIX = "torchvision/"


def find_model(text: str) -> nn.Module:
    """The model that `text` names; those of timm and torchvision with random weights.

    Raises:
        ValueError: `text` names nothing, or something that is no model.
        FileNotFoundError: its file is not there.
    """
    if text.startswith(TIMM_PREFIX):
        from widefield.models.networks import make_timm

        return make_timm(text, 1000, None)
    if text.startswith(TORCHVISION_PREFIX):
        return _torchvision(text)
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(
            f"MODEL is {text!r}; give my_file.py:model, package.module:attribute, timm/NAME or torchvision/NAME"
        )
    found: Any = import_module_or_file(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{place} has no {name!r}; {suggestion(part, _models_in(found))}")
        found = getattr(found, part)
    return _make(found, text)


def image_channels(text: str, model: nn.Module) -> int:
    """Channels of the images of `model`, which `text` names: 3 for timm's and torchvision's and for those without convolutions.

    For all others what the first 2-D convolution takes.
    """
    if text.startswith((TIMM_PREFIX, TORCHVISION_PREFIX)):
        return 3
    convolutions = (part for part in model.modules() if isinstance(part, nn.Conv2d))
    first = next(convolutions, None)
    return first.in_channels if first else 3


def _torchvision(text: str) -> nn.Module:
    import torchvision

    name = text.removeprefix(TORCHVISION_PREFIX)
    names = torchvision.models.list_models()
    if name not in names:
        raise unknown_model(text, [TORCHVISION_PREFIX + choice for choice in names])
    takes = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    options = {"weights_backbone": None} if "weights_backbone" in takes else {}  # else it is downloaded
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _make(found: Any, text: str) -> nn.Module:
    """`found` itself, or what it makes when it is called."""
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ValueError(f"{text} is a {type(found).__name__}, not a torch.nn.Module or something that makes one")
    needed = [
        name
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"{text} needs arguments ({', '.join(needed)}); write a function without any that makes the model, and give that"
        )
    model = found()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text}() makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _models_in(holder: Any) -> list[str]:
    """Names in a module (or other object) that may be meant: those that are models or could make one."""
    return [
        name
        for name, value in vars(holder).items()
        if not name.startswith("_") and (isinstance(value, nn.Module) or callable(value))
    ]
