"""A function of the library, called with what stands on the command line."""

import argparse
import inspect
from collections.abc import Callable, Iterable
from typing import Any

_NOT_ARGUMENTS = ("verbose", "imports", "verb", "chosen")


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Pretrain, export or embed, as `arguments.verb` says."""
    from widefield import pretraining

    data = getattr(arguments, "data", None)
    if data is not None and len(data) == 1:
        (arguments.data,) = data  # a folder alone is not a list of folders: images are then named by their paths in it
    call(getattr(pretraining, arguments.verb), arguments, others)


def call(function: Callable[..., None], arguments: argparse.Namespace, others: Iterable[str]) -> None:
    """Call `function` with the flags that were given and with `others`, which win: key=value, dots for entries of dictionaries.

    Raises:
        ValueError: Something in `others` is no argument of `function`, or one without a default is missing.
    """
    from widefield.registry import suggestion

    flags = {name: value for name, value in vars(arguments).items() if name not in _NOT_ARGUMENTS}
    given = {name: value for name, value in flags.items() if value not in (None, False)}
    parameters = inspect.signature(function).parameters
    for text in others:
        path, value = _entry(text)
        if path[0] not in parameters:
            raise ValueError(f"there is no argument {path[0]!r}; {suggestion(path[0], parameters)}")
        _put(given, path, value, text)
    missing = [name for name, one in parameters.items() if one.default is one.empty and name not in given]
    if missing:
        raise ValueError(f"give {', '.join(f'--{name}' for name in missing)}")
    if given.get("model") is not None:
        given["model"] = _model(given["model"])
    function(**given)


def _entry(text: str) -> tuple[list[str], Any]:
    from widefield.config.load import parse_value

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


def _model(text: Any) -> Any:
    """The wrapper or model that `my_file.py:name` or `package.module:name` stands for; names of models stay."""
    if not isinstance(text, str) or ":" not in text:
        return text
    from widefield.cli.inspect_model import find_model

    return find_model(text)
