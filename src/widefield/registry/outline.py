"""Outlines of classes and functions: what their source says, without importing what it needs.

torch, lightly and lightning take many seconds to import; to know the arguments of a method of pretraining, nothing of them is
needed. An outline has the bases, the docstring, the class attributes and the signatures of the original, and `arguments_of` and its
relatives answer for it as for that. What other packages define is a stand-in of the same name.
"""

import ast
import importlib
import importlib.util
import sys
from abc import ABCMeta
from functools import cache
from pathlib import Path
from typing import Any

from widefield.errors import WidefieldError

_OUTLINED = ("widefield", "lightning", "torch")
"""Packages whose source is read, each for itself: of another one it takes stand-ins."""
_IMPORTED = (
    "widefield.config",
    "widefield.errors",
    "widefield.pretraining.settings",
    "widefield.pretraining.transform_args",
    "widefield.registry",
)
"""Modules that are light, and imported."""
_KEPT = ("dataclass", "property", "classmethod", "staticmethod")
_Definition = ast.FunctionDef | ast.ClassDef


class OutlineError(WidefieldError, ImportError):
    """Something cannot be outlined; import it."""


def outline(target: str) -> Any:
    """Return the outline of the class or function that `target` names: `package.module:Name`.

    Raises:
        OutlineError: There is none: it is of a package that is not outlined, or its source does what an outline does not follow.
    """
    module, _, name = target.partition(":")
    try:
        return _namespace(module)[name]
    except Exception as error:  # whatever running a part of a module may raise
        raise OutlineError(f"{target}: {error}") from error


class _StandIn(ABCMeta):
    """The type of stand-ins, which have any attribute, and take any call and any subscript."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or "stands_in" not in vars(cls):
            raise AttributeError(name)
        return _stand_in(name)

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls if "stands_in" in vars(cls) else super().__call__(*args, **kwargs)


def _stand_in(name: str) -> Any:
    return _StandIn(name, (), {"stands_in": True})


class _Namespace(dict[str, Any]):
    """The names of a module, of which each is made when it is first looked up.

    Args:
        module: Its name.
        file: Its source.
    """

    def __init__(self, module: str, file: Path) -> None:
        super().__init__(__name__=module, __file__=str(file))
        body = ast.parse(file.read_bytes()).body
        self._future: list[ast.stmt] = [
            one for one in body if isinstance(one, ast.ImportFrom) and one.module == "__future__"
        ]
        self._statements: dict[str, ast.stmt] = {}
        for statement in body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                names = [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
            elif isinstance(statement, _Definition):
                names = [statement.name]
            else:
                names = [one.id for one in _names(statement, ast.Store)]
            self._statements |= dict.fromkeys(names, statement)

    def __missing__(self, name: str) -> Any:
        statement = self._statements.get(name)
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            self[name] = _imported(statement, name, str(self["__name__"]))
        elif statement is not None:
            if isinstance(statement, _Definition):
                _strip(statement)
            for needed in _names(statement, ast.Load):  # Python looks for names of a class body in a plain dictionary
                earlier = self._statements.get(needed.id, statement)
                if earlier.lineno < statement.lineno:
                    self[needed.id]
            code = compile(ast.Module([*self._future, statement], []), self["__file__"], "exec", dont_inherit=True)
            exec(code, self)
        else:
            raise KeyError(name)
        return self[name]


@cache
def _namespace(module: str) -> _Namespace:
    package, *inner = module.split(".")
    found = importlib.util.find_spec(package) if package in _OUTLINED else None  # imports nothing
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, *inner)
        for file in (path / "__init__.pyi", path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return _Namespace(module, file)
    raise OutlineError(f"there is no source of {module}")


def _imported(statement: ast.Import | ast.ImportFrom, name: str, importer: str) -> Any:
    """Return what an import statement of the module `importer` brings under `name`."""
    alias = next(one for one in statement.names if name in (one.asname, one.name.partition(".")[0]))
    if isinstance(statement, ast.Import):
        light = alias.name.partition(".")[0] in sys.stdlib_module_names
        return importlib.import_module(alias.name if alias.asname else name) if light else _stand_in(name)
    module = str(statement.module)
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names or module.startswith(_IMPORTED):
        return getattr(importlib.import_module(module), alias.name)
    return _namespace(module)[alias.name] if package == importer.partition(".")[0] else _stand_in(alias.name)


def _strip(definition: _Definition) -> None:
    """Remove what an outline does not need: decorators that do something, return types, annotations of other methods."""
    for node in ast.walk(definition):
        if isinstance(node, _Definition):
            node.decorator_list = [one for one in node.decorator_list if ast.unparse(one).partition("(")[0] in _KEPT]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            if node is not definition and node.name != "__init__":
                for argument in ast.walk(node.args):
                    if isinstance(argument, ast.arg):
                        argument.annotation = None


def _names(node: ast.AST, context: type[ast.expr_context]) -> list[ast.Name]:
    """Return the names that running a statement loads or stores, without those in bodies of functions."""
    if isinstance(node, ast.Name):
        return [node] if isinstance(node.ctx, context) else []
    inside = [node.args, *node.decorator_list] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    return [name for child in inside for name in _names(child, context)]
