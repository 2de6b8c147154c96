"""Verbs that answer at once, without torch: `widefield list`, `help` and `config`."""

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from widefield.cli.verbs import REGISTRIES, VERBS
from widefield.inference.names import matches, model_names
from widefield.registry import (
    DATASETS,
    MODELS,
    TRANSFORMS,
    OutlineError,
    arguments_of,
    import_module_or_file,
    import_object,
    outline,
    suggestion,
)

_WIDTH = 100


def list_names(arguments: argparse.Namespace, others: list[str]) -> None:
    """Print one name a line, with its kind and a summary if there are some."""
    rows: list[tuple[str, ...]]
    if arguments.what in REGISTRIES:
        registry = import_object(REGISTRIES[arguments.what])
        rows = [(entry.name, entry.kind or "-", entry.summary) for entry in registry.entries(arguments.pattern)]
    elif arguments.what == "components":
        rows = _components(arguments.pattern, arguments.kind)
    elif arguments.what == "models":
        rows = [(name, summary) for name, _, summary in _components(arguments.pattern, "model")]
        rows += [(name,) for name in model_names() if matches(name, arguments.pattern)]
    else:
        from widefield.config.load import ready_configs, summary

        rows = [(name, summary(name)) for name in ready_configs() if matches(name, arguments.pattern)]
    if not rows:
        print(f"no {arguments.what} match", file=sys.stderr)
    widths = [max(map(len, column)) for column in zip(*rows)] if rows and len({len(row) for row in rows}) == 1 else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths or map(len, row))).rstrip())


def _components(pattern: str, kind: str | None) -> list[tuple[str, ...]]:
    found = sorted(MODELS.entries(pattern, kind), key=lambda entry: entry.kind)
    return [(entry.name, entry.kind or "-", entry.summary) for entry in found]


def show_config(arguments: argparse.Namespace, others: list[str]) -> int:
    """Print, check or convert the configuration."""
    if arguments.what == "convert":
        from widefield.cli.mmpretrain.convert import run

        if others:
            raise ValueError(f"got {others[0]!r}, expected one file; values are changed in the result, as path=value")
        return run(arguments)
    if arguments.out is not None or arguments.timm:
        raise ValueError(f"--out and --timm belong to `widefield config convert`, not to `{arguments.what}`")
    from widefield.cli.fit_sections import SECTIONS
    from widefield.config import ConfigError, check_config, load, override, write_yaml

    flags = [text for text in others if text.startswith("--") and "=" not in text]
    if flags:
        raise ValueError(f"there is no {flags[0]} here; values are given as path=value, as in data.images=slides")
    files = [Path(arguments.file), *(Path(text) for text in others if "=" not in text)]
    try:
        config = load(*files)
        for place in config.data.get("imports") or ():
            import_module_or_file(place)
        config = override(config, (text for text in others if "=" in text), SECTIONS)
        if arguments.what == "print":
            print(write_yaml(config.data), end="")
            return 0
        from widefield.cli.trial import try_out

        check_config(config, SECTIONS)
        try_out(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{files[-1]}: nothing wrong")
    return 0


def show_help(arguments: argparse.Namespace, others: list[str]) -> int:
    """Print the help of a verb, or what a component says of itself and of its arguments."""
    from widefield.cli import main

    if arguments.name is None or arguments.name in VERBS:
        return main([arguments.name, "--help"] if arguments.name else [])
    print(component_help(arguments.name))
    return 0


def component_help(name: str) -> str:
    """Description, import path, and every argument with its type, its default and its docs.

    Raises:
        ValueError: There is no component of that name.
    """
    from widefield.components.metrics import METRICS
    from widefield.config.check import describe
    from widefield.pretraining.methods import METHODS, RULE

    registries = (MODELS, DATASETS, TRANSFORMS, METRICS, METHODS)
    registry = next((one for one in registries if name in one), MODELS)
    if name not in registry and "." not in name and ":" not in name:  # nor an import path
        names = [known for one in registries for known in one.names()]
        raise ValueError(f"no component named {name!r}; {suggestion(name, [*names, *VERBS])}")
    try:
        component = registry.get(name, find=outline)
    except OutlineError:  # of another package
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
    named = [one for one in arguments.named.values() if registry is not METHODS or one.name not in ("embedding", "run")]
    if registry is METHODS:
        rule: Any = component.optim  # type: ignore[attr-defined]
        of_all = arguments_of(rule.__class__).named
        named += [replace(of_all[one], default=getattr(rule, one)) for one in RULE]
    for argument in named:
        default = "required" if argument.required else f"default {_short(argument.default)}"
        lines.append(f"  {argument.name}: {describe(argument.annotation)} ({default})")
        docs = _argument_docs(argument.owner).get(argument.name, "")
        lines += textwrap.wrap(docs, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if arguments.open:
        lines.append("  ... and others, which it hands on")
    return "\n".join(lines if named or arguments.open else [*lines, "  none"])


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
