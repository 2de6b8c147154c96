"""Read Python configurations of MMEngine without running them: their statements are interpreted, and nothing else can happen.

Both styles are read: `_base_ = [...]` with `{{_base_.x}}` and `_base_.x`, and `with read_base(): from .base import *` with classes
as types. What would need foreign code to run is noted with its line, and its statement is left out.
"""

import ast
import copy
import operator
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

from widefield.config.config import Config, ConfigError, Origin, Path
from widefield.config.load import BASE
from widefield.config.merge import DELETE
from widefield.errors import WidefieldError

_OWN = ("mmpretrain", "mmcls", "mmengine", "mmcv", "torch")
"""Packages whose classes go by their last name."""
_BASE_PART = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_ENVIRONMENT = re.compile(r"\{\{\s*\$(\w+)\s*(?::([^}]*?))?\s*\}\}")
_LARGEST = 100_000
"""Items of a list, characters of a text, and digits of a number, beyond which an expression is refused."""
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow},
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
    **{ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b},
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_PURE = (list, tuple, set, int, float, str, bool, round, len, min, max, sum, abs, sorted, zip, enumerate, reversed)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{one.__name__: one for one in _PURE},
    **{"copy.deepcopy": copy.deepcopy, "deepcopy": copy.deepcopy, "copy.copy": copy.copy},
}
_METHODS = {
    dict: ("update", "get", "pop", "setdefault", "copy", "keys", "values", "items", "merge"),
    list: ("append", "extend", "insert", "pop", "copy", "index"),
    str: ("lower", "upper", "replace", "split", "join", "strip", "startswith", "endswith"),
}


class _Unreadable(WidefieldError, ValueError):
    """An expression or a statement that is not understood."""


class _Located(dict[Any, Any]):
    """A dictionary that knows where each of its keys was written; items are attributes too, as in MMEngine."""

    def __init__(self, items: Any = (), origin: Origin | None = None) -> None:
        super().__init__(items)
        self.origins = {} if origin is None else dict.fromkeys(self, origin)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Located":
        made = _Located({key: copy.deepcopy(value, memo) for key, value in self.items()})
        made.origins = dict(self.origins)
        return made


class _Imported(str):
    """A class or function by its import path."""

    @property
    def written(self) -> str:
        """The name as configurations in the style of texts have it."""
        return self.rpartition(".")[2] if self.partition(".")[0] in _OWN else str(self)


def read_mmengine(file: FilePath | str) -> tuple[Config, list[str]]:
    """Return the configuration in a Python file of MMEngine, with its bases, and what of it was not understood.

    Variables are keys of it too, as in MMEngine. Dictionaries merge as there: a changed `type` drops no arguments.

    Raises:
        FileNotFoundError: The file, or one that it is based on, is not there.
        ConfigError: A file is no Python, files are based on each other in a circle, or say different things about one key.
    """
    notes: list[str] = []
    data = _read(FilePath(file), (), notes)
    origins: dict[Path, Origin] = {}
    return Config(_plain(data, (), origins), origins), notes


def _read(file: FilePath, below: tuple[FilePath, ...], notes: list[str]) -> _Located:
    return _evaluated(file, below, notes).result()


def _evaluated(file: FilePath, below: tuple[FilePath, ...], notes: list[str]) -> "_File":
    file = file.resolve()
    if file in below:
        raise ConfigError(
            f"{BASE}: the files are based on each other in a circle: {' -> '.join(map(str, (*below, file)))}"
        )
    if not file.is_file():
        named = f", which {below[-1]} is based on," if below else ""
        raise FileNotFoundError(f"the configuration {file}{named} does not exist")
    made = _File(file, below, notes)
    made.read()
    return made


class _File:
    """One file, and what its names stand for after each statement."""

    def __init__(self, file: FilePath, below: tuple[FilePath, ...], notes: list[str]) -> None:
        self.file, self.below, self.notes = file, below, notes
        self.base = _Located()
        self.names = _Located()
        self.imported: dict[str, _Imported] = {}
        self.line = 1

    def result(self) -> _Located:
        """Return the keys of the file over those of its bases."""
        return _merged(self.base, self.names, self.file)

    def read(self) -> None:
        """Interpret the file, statement by statement."""
        text = _substituted(self.file.read_text(encoding="utf-8"), self.file)
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise ConfigError(f"{self.file}, line {error.lineno}: {error.msg}") from error
        for node in tree.body:
            self._attempt(node)

    def _attempt(self, node: ast.stmt) -> None:
        self.line = node.lineno
        try:
            self._run(node)
        except (ConfigError, FileNotFoundError):  # of this file or a base, and of a base that is not there
            raise
        except Exception as error:  # whatever an operation on plain data may raise
            source = ast.unparse(node).partition("\n")[0]
            source = source if len(source) < 60 else f"{source[:57]}..."
            reason = str(error) if isinstance(error, _Unreadable) else f"{type(error).__name__}: {error}"
            self.notes.append(f"{self.file}, line {self.line}: `{source}` was left out: {reason}")

    def _run(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self._value(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self._value(node.value))
        elif isinstance(node, ast.AugAssign):
            current = self._value(_loaded(node.target))
            self._assign(node.target, self._operate(node.op, current, self._value(node.value)))
        elif isinstance(node, ast.Import):
            for name in node.names:
                self.imported[name.asname or name.name.partition(".")[0]] = _Imported(
                    name.name if name.asname else name.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                path = f"{node.module}.{name.name}" if node.module else name.name
                self.imported[name.asname or name.name] = _Imported(path)
        elif isinstance(node, ast.With) and ast.unparse(node.items[0].context_expr) == "read_base()":
            for inner in node.body:
                self._read_base(inner)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                self._delete(target)
        elif isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Constant)):
            self._value(node.value)
        elif isinstance(node, ast.If):
            for inner in node.body if self._value(node.test) else node.orelse:
                self._run(inner)
        elif isinstance(node, ast.For):
            for item in self._value(node.iter):
                self._assign(node.target, item)
                for inner in node.body:
                    self._run(inner)
        else:
            raise _Unreadable(f"a configuration has no {type(node).__name__.lower()} statements")

    def _read_base(self, node: ast.stmt) -> None:
        if not isinstance(node, ast.ImportFrom) or not node.level or not node.module:
            raise ConfigError(f"{self.file}, line {node.lineno}: expected `from .file import *` below read_base()")
        folder = self.file.parents[node.level - 1]
        place = folder.joinpath(*node.module.split(".")).with_suffix(".py")
        base = _evaluated(place, (*self.below, self.file), self.notes)
        found = base.result()
        wanted = {name.name: name.asname or name.name for name in node.names}
        for name, value in found.items():
            if "*" in wanted or name in wanted:
                self.names[wanted.get(name, name)] = value
                self.names.origins[wanted.get(name, name)] = found.origins[name]
        if "*" in wanted:
            self.imported |= base.imported

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            if target.id == BASE:
                self._read_bases(value)
                return
            self._put(self.names, target.id, value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for one, item in zip(target.elts, value, strict=True):
                self._assign(one, item)
        elif isinstance(target, ast.Attribute):
            self._put(self._value(target.value), target.attr, value)
        elif isinstance(target, ast.Subscript):
            self._put(self._value(target.value), self._value(target.slice), value)
        else:
            raise _Unreadable(f"nothing is assigned to {ast.unparse(target)}")

    def _put(self, container: Any, key: Any, value: Any) -> None:
        if not isinstance(container, (dict, list)):
            raise _Unreadable(f"a {type(container).__name__} takes no items")
        container[key] = value
        if isinstance(container, _Located):
            container.origins[key] = Origin(str(self.file), self.line)

    def _delete(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            del self.names[target.id]
        elif isinstance(target, ast.Attribute):
            del self._value(target.value)[target.attr]
        elif isinstance(target, ast.Subscript):
            del self._value(target.value)[self._value(target.slice)]

    def _read_bases(self, value: Any) -> None:
        for name in [value] if isinstance(value, str) else value:
            if "::" in name:
                raise ConfigError(
                    f"{self.file}, line {self.line}: {name} lies in a package; copy it, and name it by its path"
                )
            found = _read(self.file.parent / name, (*self.below, self.file), self.notes)
            if shared := sorted(set(found) & set(self.base)):
                raise ConfigError(
                    f"{self.file}, line {self.line}: several bases have the key {shared[0]}, which MMEngine refuses too; "
                    "write it into one of them"
                )
            self.base.update(found)
            self.base.origins.update(found.origins)

    def _value(self, node: ast.expr) -> Any:
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is None:
            raise _Unreadable(f"{ast.unparse(node)} is not plain data")
        return _bounded(method(node))

    def _constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, str):
            return node.value
        alone = _BASE_PART.fullmatch(node.value)
        if alone:
            return self._of_base(alone[1])
        return _BASE_PART.sub(lambda found: str(self._of_base(found[1])), node.value)

    def _of_base(self, dotted: str) -> Any:
        value: Any = self.base
        for key in dotted.split("."):
            value = value[int(key)] if isinstance(value, (list, tuple)) else value[key]
        return copy.deepcopy(value)

    def _name(self, node: ast.Name) -> Any:
        for names in (self.names, self.imported):
            if node.id in names:
                return names[node.id]
        if node.id == BASE:
            return self.base
        if node.id == "__name__":  # so that `if __name__ == "__main__"` does nothing
            return self.file.stem
        raise _Unreadable(f"{node.id} is not defined here")

    def _attribute(self, node: ast.Attribute) -> Any:
        owner = self._value(node.value)
        if isinstance(owner, _Imported):
            return _Imported(f"{owner}.{node.attr}")
        if not isinstance(owner, dict):
            raise _Unreadable(f"{ast.unparse(node)} is no value of a configuration")
        if node.attr not in owner:
            raise _Unreadable(f"there is no {node.attr} in {ast.unparse(node.value)}")
        return owner[node.attr]

    def _subscript(self, node: ast.Subscript) -> Any:
        return self._value(node.value)[self._value(node.slice)]

    def _slice(self, node: ast.Slice) -> slice:
        return slice(*(None if part is None else self._value(part) for part in (node.lower, node.upper, node.step)))

    def _list(self, node: ast.List) -> list[Any]:
        return [item for one in node.elts for item in self._items(one)]

    def _tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(item for one in node.elts for item in self._items(one))

    def _set(self, node: ast.Set) -> Any:
        inner = node.elts[0]
        if isinstance(inner, ast.Set) and len(node.elts) == len(inner.elts) == 1:  # {{_base_.x}}
            return copy.deepcopy(self._value(inner.elts[0]))
        raise _Unreadable(f"{ast.unparse(node)} is a set, and a configuration has none")

    def _items(self, node: ast.expr) -> Iterator[Any]:
        if isinstance(node, ast.Starred):
            yield from self._value(node.value)
        else:
            yield self._value(node)

    def _dict(self, node: ast.Dict) -> _Located:
        made = _Located()
        for key, value in zip(node.keys, node.values, strict=True):
            found = self._value(value)
            given = found if key is None else {self._value(key): found}
            self._fill(made, given, value.lineno)
        return made

    def _fill(self, made: _Located, given: dict[Any, Any], line: int) -> None:
        made.update(given)
        made.origins.update(dict.fromkeys(given, Origin(str(self.file), line)))
        made.origins.update(getattr(given, "origins", {}))

    def _call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        arguments = [item for one in node.args for item in self._items(one)]
        if name == "dict":
            made = _Located()
            for one in arguments:
                self._fill(made, one if isinstance(one, dict) else dict(one), node.lineno)
            for keyword in node.keywords:
                value = self._value(keyword.value)
                self._fill(made, value if keyword.arg is None else {keyword.arg: value}, keyword.value.lineno)
            return made
        keywords = {keyword.arg or "": self._value(keyword.value) for keyword in node.keywords}
        if name == "range":
            if len(numbers := range(*arguments)) > _LARGEST:
                raise _Unreadable(f"{ast.unparse(node)} is too long")
            return list(numbers)
        if name in _FUNCTIONS and name not in self.names:
            return _FUNCTIONS[name](*arguments, **keywords)
        if isinstance(node.func, ast.Attribute):
            return self._method(node.func, arguments, keywords)
        raise _Unreadable(f"{name}() would have to be run")

    def _method(self, node: ast.Attribute, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        owner = self._value(node.value)
        kind = next((kind for kind in _METHODS if isinstance(owner, kind) and not isinstance(owner, _Imported)), None)
        if kind is str and node.attr == "format" and all(isinstance(one, (str, int, float)) for one in arguments):
            return re.sub(r"\{(\d*)\}", _filler(arguments), owner)
        if kind is None or node.attr not in _METHODS[kind]:
            raise _Unreadable(f"{ast.unparse(node)}() would have to be run")
        if node.attr == "merge":
            return owner.update(_merged(owner, arguments[0], self.file))
        if isinstance(owner, _Located) and node.attr in ("update", "setdefault"):
            given = {**(arguments[0] if node.attr == "update" and arguments else {}), **keywords}
            keys = given if node.attr == "update" else arguments[:1]
            owner.origins.update(dict.fromkeys(keys, Origin(str(self.file), self.line)))
        result = getattr(owner, node.attr)(*arguments, **keywords)
        _bounded(owner)
        return result

    def _binop(self, node: ast.BinOp) -> Any:
        return self._operate(node.op, self._value(node.left), self._value(node.right))

    def _operate(self, op: ast.operator, left: Any, right: Any) -> Any:
        function = _OPERATORS.get(type(op))
        if function is None or (isinstance(op, ast.Mod) and isinstance(left, str)):
            raise _Unreadable(f"{type(op).__name__} is no arithmetic of a configuration")
        for one, other in ((left, right), (right, left)):
            is_repeated = isinstance(op, ast.Mult) and isinstance(one, int) and isinstance(other, (str, list, tuple))
            if is_repeated and one * len(other) > _LARGEST:
                raise _Unreadable(f"{one} times a list of {len(other)} is too long")
        if isinstance(op, ast.Pow) and abs(right) * (abs(left) + 2) > _LARGEST:
            raise _Unreadable(f"{left} ** {right} is too large")
        return _bounded(function(left, right))

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        if type(node.op) not in _UNARY:
            raise _Unreadable(f"{ast.unparse(node)} is no arithmetic of a configuration")
        return _UNARY[type(node.op)](self._value(node.operand))

    def _boolop(self, node: ast.BoolOp) -> Any:
        value = None
        for one in node.values:
            value = self._value(one)
            if bool(value) is isinstance(node.op, ast.Or):
                return value
        return value

    def _compare(self, node: ast.Compare) -> bool:
        left = self._value(node.left)
        for op, one in zip(node.ops, node.comparators, strict=True):
            right = self._value(one)
            if not _OPERATORS[type(op)](left, right):
                return False
            left = right
        return True

    def _ifexp(self, node: ast.IfExp) -> Any:
        return self._value(node.body if self._value(node.test) else node.orelse)

    def _joinedstr(self, node: ast.JoinedStr) -> str:
        return "".join(str(self._value(part)) for part in node.values)

    def _formattedvalue(self, node: ast.FormattedValue) -> str:
        if node.format_spec is not None:
            raise _Unreadable(f"{ast.unparse(node)} has a format")
        return str(self._value(node.value))

    def _listcomp(self, node: ast.ListComp | ast.GeneratorExp) -> list[Any]:
        return [self._value(node.elt) for _ in self._rounds(node.generators)]

    _generatorexp = _listcomp

    def _dictcomp(self, node: ast.DictComp) -> _Located:
        items = {self._value(node.key): self._value(node.value) for _ in self._rounds(node.generators)}
        return _Located(items, Origin(str(self.file), node.lineno))

    def _rounds(self, generators: list[ast.comprehension]) -> Iterator[None]:
        """Yield once for each round of a comprehension, whose variables are names meanwhile."""
        if not generators:
            yield
            return
        first, *rest = generators
        held, origins = dict(self.names), dict(self.names.origins)
        try:
            for item in self._value(first.iter):
                self._assign(first.target, item)
                if all(self._value(test) for test in first.ifs):
                    yield from self._rounds(rest)
        finally:
            self.names.clear()
            self.names.update(held)
            self.names.origins = origins


def _substituted(text: str, file: FilePath) -> str:
    """Return the text with the values of `{{fileDirname}}` and its like, and of `{{$VARIABLE:default}}`."""
    values = {
        "fileDirname": file.parent.as_posix(),
        "fileBasename": file.name,
        "fileBasenameNoExtension": file.stem,
        "fileExtname": file.suffix,
    }
    for name, value in values.items():
        text = re.sub(rf"\{{\{{\s*{name}\s*\}}\}}", lambda _, value=value: value, text)  # type: ignore[misc]

    def variable(found: re.Match[str]) -> str:
        value = os.environ.get(found[1], found[2])
        if value is None:
            raise ConfigError(f"{file}: the environment has no variable {found[1]}, and {found[0]} names no default")
        return value

    return _ENVIRONMENT.sub(variable, text)


def _bounded(value: Any) -> Any:
    """Return `value`; refuse what a line of a file can make of little."""
    if isinstance(value, (str, list, tuple)) and len(value) > _LARGEST:
        raise _Unreadable(f"a {type(value).__name__} of {len(value)} is too large")
    return value


def _filler(arguments: list[Any]) -> Callable[[re.Match[str]], str]:
    rest = iter(arguments)
    return lambda found: str(arguments[int(found[1])] if found[1] else next(rest))


def _loaded(target: ast.expr) -> ast.expr:
    made = copy.deepcopy(target)
    for node in ast.walk(made):
        if hasattr(node, "ctx"):
            node.ctx = ast.Load()
    return made


def _merged(base: dict[Any, Any], child: dict[Any, Any], file: FilePath) -> _Located:
    """Return `child` over `base`, as MMEngine merges them."""
    merged = _Located(base)
    merged.origins = dict(getattr(base, "origins", {}))
    for key, value in child.items():
        if isinstance(value, dict) and key in base and not value.get(DELETE):
            if not isinstance(base[key], dict):
                raise ConfigError(
                    f"{file}: {key} is a dictionary over {base[key]!r}; MMEngine refuses that too: write {DELETE}=True into it"
                )
            merged[key] = _merged(base[key], value, file)
        else:
            merged[key] = value
        if not isinstance(value, dict) or key not in base or value.get(DELETE):
            merged.origins[key] = getattr(child, "origins", {}).get(key) or Origin(str(file))
    return merged


def _plain(value: Any, path: Path, origins: dict[Path, Origin]) -> Any:
    """Return `value` with lists for tuples, names for classes, and without `_delete_`; note where its keys were written."""
    if isinstance(value, dict):
        for key, origin in getattr(value, "origins", {}).items():
            origins[(*path, str(key))] = origin
        return {key: _plain(item, (*path, str(key)), origins) for key, item in value.items() if key != DELETE}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*path, str(k)), origins) for k, item in enumerate(value)]
    return value.written if isinstance(value, _Imported) else value
