"""`widefield check` and `widefield plan`, and the model that is named on the command line.

It is `file.py:name`, `package.module:name`, `timm/NAME` or `torchvision/NAME`.
"""

import argparse
import inspect
import json
from typing import Any

import torch
from torch import nn

from widefield.models.networks import TIMM_PREFIX, make_timm, unknown_model
from widefield.registry import import_module_or_file, suggestion
from widefield.streaming import Local, stream
from widefield.streaming.check import check, explain

TORCHVISION_PREFIX = "torchvision/"


def check_model(arguments: argparse.Namespace, others: list[str]) -> int:
    """Check as the arguments say; 0 if the model is exact, else 1."""
    model = find_model(arguments.model)
    channels = arguments.channels or channels_of(model, arguments.model)
    size = arguments.size or _least_size(model)
    result = check(
        model,
        (channels, *size),
        plan_shape=(channels, *arguments.plan_size),
        plan_tile_size=arguments.tile_size,
        memory_budget=arguments.memory_budget,
    )
    told = {"explanation": explain(model, (channels, *size))} if arguments.explain and result.stages else {}
    _show(arguments, {**result.as_dict(), **told}, result, *told.values())
    return 0 if result.exact else 1


def _show(arguments: argparse.Namespace, found: dict[str, Any], *texts: object) -> None:
    print(json.dumps({"model": arguments.model, **found}, indent=2) if arguments.json else "\n\n".join(map(str, texts)))


def _least_size(model: nn.Module) -> tuple[int, int]:
    """Return the size of a small image, of odd numbers, that holds two windows of every `Local` along both axes."""
    sizes = [(97, 113)]
    for windows in (part.windows for part in model.modules() if isinstance(part, Local)):
        rows, cols = (n + stride + stride // 3 for n, stride in zip(windows.size, windows.stride, strict=True))
        sizes.append((rows, cols))
    rows, cols = (max(of) for of in zip(*sizes, strict=True))
    return rows, cols


def plan_image(arguments: argparse.Namespace, others: list[str]) -> None:
    """Plan as the arguments say."""
    model = find_model(arguments.model)
    channels = arguments.channels or channels_of(model, arguments.model)
    streamed = stream(model, arguments.tile_size, memory_budget=arguments.memory_budget)
    with torch.set_grad_enabled(not arguments.inference):
        plan = streamed.plan((arguments.batch, channels, *arguments.size))
    _show(arguments, plan.as_dict(), plan, *plan.refused)


def find_model(text: str) -> nn.Module:
    """The model that `text` names; those of timm and torchvision with random weights.

    Raises:
        ValueError: `text` names nothing, or something that is no model.
        FileNotFoundError: its file is not there.
    """
    if text.startswith(TIMM_PREFIX):
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


def channels_of(model: nn.Module, text: str) -> int:
    """The channels of the images of `model`, which `text` names: 3 for timm's, torchvision's and those without convolutions.

    For all others what the first 2-D convolution takes.
    """
    if text.startswith((TIMM_PREFIX, TORCHVISION_PREFIX)):
        return 3
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
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
