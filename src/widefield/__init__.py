"""Widefield: train and run vision models on images of any size, exactly, in the memory you have.

Names load their part of the library on first use (PEP 562), so ``import widefield`` is instant and imports no torch. The names,
and where they are, stand in ``__init__.pyi``, which editors and mypy read as well. ``__all__`` are those that most programs need;
the others that lightstream, LightlyTrain and MMPretrain have at their top can be imported from here too.
"""

import ast
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def lazy_names(
    package: str, file: str, more: Callable[[], Iterable[str]] = tuple
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose names, and modules, load on first use.

    Args:
        package: Its `__name__`.
        file: Its `__file__`, beside which `__init__.pyi` imports the names. `__all__` are all of them, unless it says which.
        more: Gives names that the package finds itself, for `__dir__` and messages.
    """
    homes, public = {}, None
    for line in ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(line, ast.ImportFrom) and line.module != package:
            homes |= {name.name: str(line.module) for name in line.names if name.name != "*"}
        elif isinstance(line, ast.Assign):
            public = ast.literal_eval(line.value)
    shown = sorted(homes) if public is None else public

    def get(name: str) -> Any:
        if name not in homes:
            if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
                return importlib.import_module(f"{package}.{name}")
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join([*shown, *more()])}")
        return getattr(importlib.import_module(homes[name]), name)

    return get, lambda: [*shown, *more()], shown


__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
