"""What docstrings say of arguments."""

import inspect
from collections.abc import Callable
from typing import Any

from docstring_parser import DocstringStyle, parse


def description(component: Callable[..., Any]) -> str:
    """The docstring of `component` without its sections."""
    parsed = parse(_docstring(component), DocstringStyle.GOOGLE)
    return "\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))


def argument_docs(component: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of `component` says of each argument; of arguments that share a line, `mean, std:`, the same."""
    parsed = parse(_docstring(component), DocstringStyle.GOOGLE)
    return {
        name.strip(): " ".join((entry.description or "").split())
        for entry in parsed.params
        for name in entry.arg_name.split(",")
    }


def _docstring(component: Callable[..., Any]) -> str:
    own = component.__doc__ if isinstance(component, type) else inspect.getdoc(component)
    return inspect.cleandoc(own or "")
