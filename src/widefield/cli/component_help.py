"""`widefield help`: the arguments of a component, or of a verb."""

import argparse
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from widefield.cli.user_code import add_imports, import_user_code

LIGHT = True
TAKES_OTHERS = False
EPILOG = "`widefield list components` shows the names; so do `list datasets`, `list transforms` and `list metrics`."
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a component, data set, transform or metric, an import path of a class, or a verb",
    )
    add_imports(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Print what the class says of itself and of its arguments."""
    from widefield.cli import VERBS, main

    if arguments.name is None or arguments.name in VERBS:
        return main([arguments.name, "--help"] if arguments.name else [])
    import_user_code(arguments.imports)
    print(component_help(arguments.name))
    return 0


def component_help(name: str) -> str:
    """Description, import path, and every argument with its type, its default and its docs.

    Raises:
        ValueError: There is no component of that name.
    """
    from widefield.components.metrics import METRICS
    from widefield.config.check import describe
    from widefield.registry import DATASETS, MODELS, TRANSFORMS, arguments_of

    registry = next((one for one in (MODELS, DATASETS, TRANSFORMS, METRICS) if name in one), MODELS)
    component = registry.get(name)
    what = registry.kind(name) or ("" if registry is MODELS else registry.name)
    kind = f", a {what}" if what else ""
    lines = [
        f"{name}{kind}: {component.__module__}.{component.__qualname__}",
        "",
        _description(component),
        "",
        "arguments:",
    ]
    arguments = arguments_of(component)
    for argument in arguments.named.values():
        default = "required" if argument.required else f"default {_short(argument.default)}"
        lines.append(f"  {argument.name}: {describe(argument.annotation)} ({default})")
        docs = _argument_docs(argument.owner).get(argument.name, "")
        lines += textwrap.wrap(docs, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if arguments.open:
        lines.append("  ... and others, which it hands on")
    return "\n".join(lines if arguments.named or arguments.open else [*lines, "  none"])


def _short(default: object) -> str:
    """A default as one would write it in a configuration."""
    import yaml

    plain = list(default) if isinstance(default, tuple) else default
    try:
        text: str = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000)
    except yaml.YAMLError:
        return repr(default)
    return text.removesuffix("...\n").strip()


def _description(component: Callable[..., Any]) -> str:
    """Return the docstring of `component` without its sections."""
    parsed = _parsed(component)
    return "\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))


def _argument_docs(component: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring of `component` says of each argument; `mean, std:` says the same of both."""
    return {
        name.strip(): " ".join((entry.description or "").split())
        for entry in _parsed(component).params
        for name in entry.arg_name.split(",")
    }


def _parsed(component: Callable[..., Any]) -> Any:
    from docstring_parser import DocstringStyle, parse

    own = component.__doc__ if isinstance(component, type) else inspect.getdoc(component)
    return parse(inspect.cleandoc(own or ""), DocstringStyle.GOOGLE)
