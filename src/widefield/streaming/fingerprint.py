"""Notice that a module would compute something else than it did when it was captured.

A captured forward pass is used again as long as nothing has changed that `forward` may read: the structure, modes and settings of
the module, the objects in its attributes, the code and class attributes of its classes, and the globals, closures and environment
variables that this code names. `fingerprint` turns all of it into one hashable value. Parameters and buffers count by shape, dtype
and `requires_grad`: their values are bound anew at each call. What cannot be looked into (a lock, an open file) counts by identity,
and objects that are compared so are held, weakly where possible, so that another object at the same address is never taken for
them.
"""

import copy
import functools
import os
import random
import sys
import types
import weakref
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules import module as hooks_of_all
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

# Code, classes and objects of these packages count by identity; so does whatever comes after the first `_MOST` objects.
_LIBRARIES = frozenset(
    (
        *(
            "torch",
            "torchvision",
            "timm",
            "numpy",
            "lightning",
            "pytorch_lightning",
            "einops",
            "widefield",
            "abc",
            "typing",
        ),
        *(
            "builtins",
            "collections",
            "functools",
            "logging",
            "threading",
            "weakref",
            "io",
            "os",
            "re",
            "math",
            "random",
        ),
    )
)
_MOST = 20_000
_DEEPEST = 40  # and whatever lies deeper than this, in code that calls code, say
_PLAIN = (bool, int, str, bytes, complex, type(None), type(...), range, torch.dtype, torch.device, torch.layout)
_READS_ENVIRONMENT = frozenset(("environ", "getenv"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"}  # looked at one by one
_CLASS_STATE = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__annotations__", "__module__", "__abstractmethods__", "_abc_impl")
)


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return a hashable value that differs when `module` would be captured differently.

    Modes of norm layers with running statistics are left out: see `Programs.get`.
    """
    walk = _Walk()
    parts: list[Any] = []
    for name, part in module.named_modules(remove_duplicate=False):
        norm = isinstance(part, _NormBase)
        settings = [
            (key, walk(before))
            for key, value in part.__dict__.items()
            if key not in _MODULE_STATE and not (norm and key == "training")
            if (before := before_forward(value)) is not NOTHING
        ]
        tensors = [
            (key, None if t is None else (tuple(t.shape), t.dtype, t.requires_grad))
            for key, t in (*part._parameters.items(), *part._buffers.items())
        ]
        hooks = [walk(hook) for kind in _HOOKS for hook in getattr(part, kind).values()]
        parts.append((name, walk(type(part)), tuple(settings), tuple(tensors), tuple(hooks)))
    everywhere = (hooks_of_all._global_forward_hooks, hooks_of_all._global_forward_pre_hooks)
    hooks = [walk(hook) for kind in everywhere for hook in kind.values()]
    return (*parts, *hooks, torch.get_default_dtype())


class NOTHING:
    """Stands for an attribute that is not there."""


def mark_left(value: Any, before: Any) -> Any:
    """Return `value`, whose tensors streaming leaves in an attribute of a module, instead of `before`, because forward would."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            leaf._left_by_forward = before_forward(before)  # type: ignore[attr-defined]
    return value


def before_forward(value: Any) -> Any:
    """Return what an attribute held before forward left `value` there: `value` itself, if forward did not."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    before = [vars(tensor).get("_left_by_forward", value) for tensor in tensors]
    return before[0] if before and all(one is before[0] for one in before) else value


class Surroundings:
    """A record of what a module's forward may change outside of its tensors.

    That is: containers, attributes of objects, globals, caches, and the random states of Python and NumPy.
    `restore` puts all back that has changed, and returns what changed in words, with the values that came in. Modules' own
    attributes are left alone. Entries that were added to a dict or a set, as to a cache, are taken out again.
    """

    def __init__(self, module: nn.Module) -> None:
        walk = _Walk()
        for part in module.modules():
            for key, value in part.__dict__.items():
                if key not in _MODULE_STATE:
                    walk(value)
            walk(type(part))
            for kind in _HOOKS:
                for hook in getattr(part, kind).values():
                    walk(hook)
        self._containers = [(of, copy.copy(of)) for of in walk.containers]
        self._names = [(of, name, of[name] if isinstance(of, dict) else vars(of)[name]) for of, name in walk.names]
        self._caches = [(cached, cached.cache_info().misses) for cached in walk.caches]
        self._random: tuple[Any, Any] = random.getstate(), np.random.get_state(legacy=True)

    def restore(self) -> list[tuple[str, list[Any]]]:
        changes: list[tuple[str, list[Any]]] = []
        for of, name, value in self._names:
            now = of.get(name) if isinstance(of, dict) else vars(of).get(name)
            if now is not value and isinstance(of, dict):
                changes.append((f"the global '{name}'", [now]))
                of[name] = value
            elif now is not value:
                changes.append((f"the class attribute '{of.__name__}.{name}'", [now]))
                setattr(of, name, value)
        for container, before in self._containers:
            came = _difference(container, before)
            if came is not None:
                keys = came if isinstance(container, dict) else ()
                what = f"a {type(container).__name__}" + (f" (key {next(iter(keys))!r:.60})" if keys else "")
                only_added = isinstance(container, set) or (
                    isinstance(container, dict)
                    and all(key in container and container[key] is before[key] for key in before)
                )
                changes.append(
                    ("" if only_added else what, list(came.values()) if isinstance(came, dict) else list(came))
                )
                container.clear()
                container.update(before) if isinstance(container, (dict, set)) else container.extend(before)
        for cached, misses in self._caches:
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        of_python, of_numpy = self._random
        if random.getstate() != of_python:
            changes.append(("the random state of Python", []))
            random.setstate(of_python)
        numpys_now: Any = np.random.get_state(legacy=True)
        if numpys_now[2:] != of_numpy[2:] or not np.array_equal(numpys_now[1], of_numpy[1]):
            changes.append(("the random state of NumPy", []))
            np.random.set_state(of_numpy)
        return changes


def _difference(now: Any, before: Any) -> Any:
    """The entries that are new or another object; None if there is no difference."""
    if isinstance(now, dict):
        came = {key: value for key, value in now.items() if key not in before or before[key] is not value}
        return came if came or len(now) != len(before) else None
    if isinstance(now, set):
        return now - before if now != before else None
    same = len(now) == len(before) and all(a is b for a, b in zip(now, before))
    return None if same else [a for a in now if not any(a is b for b in before)]


class _Same:
    """An object that is equal to itself alone, for as long as it lives."""

    __slots__ = ("_hash", "_of")

    def __init__(self, value: object) -> None:
        self._hash = id(value)
        try:
            self._of: Any = weakref.ref(value)
        except TypeError:
            self._of = partial(_itself, value)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Same) and (mine := self._of()) is not None and mine is other._of())

    def __hash__(self) -> int:
        return self._hash


def _itself(value: object) -> object:
    return value


class _Walk:
    """Turn objects into hashable values that change when the objects do. An object met again is a number."""

    def __init__(self) -> None:
        self.containers: list[Any] = []
        self.names: list[tuple[Any, str]] = []  # of a class, or of a dict of globals
        self.caches: list[Any] = []
        self._depth = 0
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []  # so that no address is used twice during the walk

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind is float:
            return float, value.hex()  # nan is equal to itself
        if isinstance(value, Enum):
            return kind, value.name
        if kind in _PLAIN or isinstance(value, PurePath):
            return kind, value
        if id(value) in self._seen:
            return "met before", self._seen[id(value)]
        if len(self._alive) > _MOST or self._depth > _DEEPEST:
            return _Same(value)
        self._seen[id(value)] = len(self._alive)
        self._alive.append(value)
        self._depth += 1
        try:
            return kind, self._contents(value)
        finally:
            self._depth -= 1

    def _contents(self, value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return _of_array(value)
        if isinstance(value, (bytearray, array)):
            return bytes(value)
        if isinstance(value, ContextVar):
            return self(value.get(NOTHING))
        if isinstance(value, (dict, list, set, deque)):
            self.containers.append(value)
        if isinstance(value, (dict, types.MappingProxyType)):
            return tuple((self(key), self(item)) for key, item in tuple(value.items())), self._attributes(value)
        if isinstance(value, (set, frozenset)):
            return frozenset(map(self, value))
        if isinstance(value, (tuple, list, deque)):
            return tuple(map(self, value)), self._attributes(value)
        if isinstance(value, partial):
            return self(value.func), self(value.args), self(value.keywords)
        if isinstance(value, types.MethodType):
            return self(value.__func__), self(value.__self__)
        if isinstance(value, (staticmethod, classmethod)):
            return self(value.__func__)
        if isinstance(value, property):
            return self(value.fget)
        if isinstance(value, functools._lru_cache_wrapper):
            self.caches.append(value)
        wrapped = getattr(value, "__wrapped__", None) if callable(value) and not isinstance(value, type) else None
        if isinstance(value, types.FunctionType) and not _installed(value.__module__):
            return (
                self._code(value, value.__code__),
                self(value.__defaults__),
                self(value.__kwdefaults__),
                self(wrapped),
            )
        if wrapped is not None:
            return self(wrapped)
        if isinstance(value, type):
            return _Same(value) if _installed(value.__module__) else self._class(value)
        if type(value).__module__ == f"{__package__}.module":  # it holds programs, which come and go
            return _Same(value)
        if isinstance(value, nn.Module):  # one that is no part of the module, in a list say
            return tuple((name, self(type(part)), self._attributes(part)) for name, part in value.named_modules())
        if isinstance(value, (UserDict, UserList, ChainMap, Distribution)):
            return self._attributes(value)
        if _in_library(type(value).__module__) or isinstance(value, types.ModuleType):
            return _Same(value)
        attributes = self._attributes(value)
        return (self(type(value)), attributes) if attributes else _Same(value)

    def _attributes(self, value: object) -> tuple[Any, ...]:
        slots = [name for kind in type(value).__mro__ for name in _names(kind.__dict__.get("__slots__", ()))]
        own = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
        attributes = getattr(value, "__dict__", {})
        if isinstance(attributes, dict) and not isinstance(value, nn.Module):
            self.containers.append(attributes)
        own.update(attributes)
        return tuple((key, self(item)) for key, item in own.items() if key not in _MODULE_STATE)

    def _class(self, kind: type) -> tuple[Any, ...]:
        """The attributes and methods of a class and of its bases, those of libraries by identity."""
        kept = [(key, value) for key, value in vars(kind).items() if key not in _CLASS_STATE]
        self.names += [(kind, key) for key, _ in kept]
        own = tuple((key, self(value)) for key, value in kept)
        return own, tuple(self(base) for base in kind.__bases__)

    def _code(self, function: types.FunctionType, code: types.CodeType) -> tuple[Any, ...]:
        """The code, and what the globals and closures hold that it names."""
        known, names = function.__globals__, tuple(_names_in(code))
        self.names += [(known, name) for name in names if name in known]
        found = [self._global(known[name], names) for name in names if name in known]
        if not _READS_ENVIRONMENT.isdisjoint(names):
            found.append(frozenset(os.environ.items()))
        cells = (cell.cell_contents for cell in function.__closure__ or () if _filled(cell))
        return code, tuple(found), tuple(map(self, cells))

    def _global(self, value: Any, names: tuple[str, ...]) -> Any:
        """A global; of a module of the user's own (`config.SCALE`) what the code may read of it."""
        if not isinstance(value, types.ModuleType) or _installed(value.__name__):
            return self(value)
        return tuple(self(vars(value)[name]) for name in names if name in vars(value))


def _of_array(value: Any) -> tuple[Any, ...]:
    """Shape, dtype and content; of a tensor that follows from weights (which a hook computes anew) without the content."""
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes() if value.size < 1024 else hash(value.tobytes())
    about = tuple(value.shape), value.dtype, value.device, value.requires_grad
    if value.grad_fn is not None or isinstance(value, nn.Parameter) or value.layout != torch.strided:
        return about
    if type(value) is not Tensor or value.is_meta:
        return *about, value._version, _Same(value)
    with torch.no_grad():
        return *about, hash(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _in_library(name: str | None) -> bool:
    return name is None or name.partition(".")[0] in _LIBRARIES


@functools.cache
def _installed(name: str | None) -> bool:
    """True for code of installed packages, which counts by identity."""
    file = getattr(sys.modules.get(name or ""), "__file__", None) or ""
    return _in_library(name) or "site-packages" in file


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
