"""`widefield pretrain`, `export` and `embed`: functions of the library, called with what stands on the command line."""

import argparse
import inspect
from typing import Any

import torch

from widefield import pretraining
from widefield.cli.inspect_model import find_model
from widefield.config.load import parse_value
from widefield.registry import suggestion

_NOT_ARGUMENTS = ("verbose", "imports", "verb", "chosen")


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Call the function named `arguments.verb` with the flags that were given and with `others`, which win.

    These are key=value, with dots for entries of dictionaries.

    Raises:
        ValueError: Something in `others` is no argument of the function, or one without a default is missing.
    """
    function = getattr(pretraining, arguments.verb)
    flags = {name: value for name, value in vars(arguments).items() if name not in _NOT_ARGUMENTS}
    given: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None and value is not False:  # 0 is a value
            _put(given, name.split("."), value, name)
    if len(given.get("data", ())) == 1:
        # A folder alone is not a list of folders: images are named by their paths in it.
        (given["data"],) = given["data"]
    parameters = inspect.signature(function).parameters
    for text in others:
        path, value = _entry(text)
        if path[0] not in parameters:
            raise ValueError(f"there is no argument {path[0]!r}; {suggestion(path[0], parameters)}")
        _put(given, path, value, text)
    missing = [name for name, one in parameters.items() if one.default is one.empty and name not in given]
    if missing:
        raise ValueError(f"give {', '.join(f'--{name}' for name in missing)}")
    model = given.get("model")
    if isinstance(model, str) and ":" in model:  # else it is the name of a model
        if "seed" in parameters:
            torch.manual_seed(given.get("seed", parameters["seed"].default))
        given["model"] = find_model(model)
    function(**given)


def _entry(text: str) -> tuple[list[str], Any]:
    name, equals, value = text.partition("=")
    path = name.removeprefix("--").replace("-", "_").split(".")
    if not equals or not all(path):
        raise ValueError(f"got {text!r}, expected key=value, as in epochs=10 or optim_args.lr=0.1")
    return path, None if value == "None" else parse_value(value)


def _put(given: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    *outer, last = path
    for key in outer:
        given = given.setdefault(key, {})
        if not isinstance(given, dict):
            raise ValueError(f"{text}: {key} has the value {given!r} already, so nothing can be in it")
    given[last] = value
