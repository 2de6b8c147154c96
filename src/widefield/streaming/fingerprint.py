"""Notice that a module would compute something else than it did when it was captured.

A captured forward pass is used again as long as nothing has changed that `forward` may read: the structure, modes and settings of
the module, the objects in its attributes, the code and class attributes of its classes, and the globals, closures, imports and
environment variables that this code names. `fingerprint` turns all of it into one hashable value. Parameters and buffers count by
shape, dtype and `requires_grad`: their values are bound anew at each call; those of modules that are no part of the module (in a
list, a global) count by their values. What cannot be looked into (a lock, an open file) counts by identity,
and objects that are compared so are held, weakly where possible, so that another object at the same address is never taken for
them.
"""

import functools
import os
import pickle
import random
import sys
import types
import warnings
import weakref
from array import array
from collections import ChainMap, OrderedDict, UserDict, UserList, deque
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from functools import partial
from itertools import accumulate
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
_NO_TENSOR = frozenset((*_PLAIN, float))
_MAY_HOLD = (Tensor, list, tuple, dict)  # attributes of modules in which forward leaves results
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())), type(iter(range(0))))
_READS_ENVIRONMENT = frozenset(("environ", "getenv"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"}  # looked at one by one
_CLASS_STATE = frozenset(
    ("__dict__", "__weakref__", "__doc__", "__annotations__", "__module__", "__abstractmethods__", "_abc_impl")
)


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Return a hashable value that differs when `module` would be captured differently.

    Modes of norm layers with running statistics are left out: see `ProgramCache.get`.
    """
    walk = _Walk(module)
    parts: list[Any] = []
    shared: dict[int, int] = {}  # number of each tensor: the same under several names where they are tied
    for name, part in module.named_modules(remove_duplicate=False):
        norm = isinstance(part, _NormBase)
        settings = [
            (key, walk(before))
            for key, value in part.__dict__.items()
            if key not in _MODULE_STATE and not (norm and key == "training")
            if (before := before_forward(value)) is not NOTHING
        ]
        tensors = [
            (key, t if t is None else (tuple(t.shape), t.dtype, t.requires_grad), shared.setdefault(id(t), len(shared)))
            for key, t in (*part._parameters.items(), *part._buffers.items())
        ]
        parts.append((name, walk(type(part)), tuple(settings), tuple(tensors), walk.hooks(part)))
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
    if _is_plain(value):
        return value
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    before = [vars(tensor).get("_left_by_forward", value) for tensor in tensors]
    return before[0] if before and all(one is before[0] for one in before) else value


def _is_plain(value: Any) -> bool:
    """True for numbers, words and lists of them, nearly all that modules hold: without looking for tensors in them."""
    kind = type(value)
    return kind in _NO_TENSOR or (kind in (tuple, list) and all(type(item) in _NO_TENSOR for item in value))


class Surroundings:
    """A record of what a module's forward may change outside of its tensors.

    That is: containers, attributes of objects, globals, caches, random generators, iterators, and the random states of Python and
    NumPy. `restore` puts all back that has changed, and returns what changed in words, with the values that came in. Modules' own
    attributes are left alone. Entries that were added to a dict or a set, as to a cache, are taken out again.
    `looks_at_mode`: code holds a function that tells the grad mode, which nobody sees it call.
    """

    def __init__(self, module: nn.Module) -> None:
        walk = _Walk(module)
        for part in module.modules():
            for key, value in part.__dict__.items():
                if key not in _MODULE_STATE:
                    walk(value)
            walk(type(part))
            walk.hooks(part)
        self._containers = [(of, _items(of)) for of in walk.containers]
        self._names = [(of, name, of[name] if isinstance(of, dict) else vars(of)[name]) for of, name in walk.names]
        self._caches = [(cached, cached.cache_info().misses) for cached in walk.caches]
        self._advancing = [(of, state) for of in walk.advancing if (state := _state(of)) is not None]
        self.looks_at_mode = walk.met(torch.is_grad_enabled) or walk.met(torch.is_inference_mode_enabled)
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
                now = _items(container)
                only_added = isinstance(container, set) or (
                    isinstance(container, dict) and all(now.get(key, NOTHING) is before[key] for key in before)
                )
                changes.append(
                    ("" if only_added else what, list(came.values()) if isinstance(came, dict) else list(came))
                )
                _fill(container, before)
        for cached, misses in self._caches:
            if cached.cache_info().misses != misses:
                cached.cache_clear()
        for of, state in self._advancing:
            if _state(of) != state:
                kind = "random state" if isinstance(of, _GENERATORS) else "state"
                changes.append((f"the {kind} of a {type(of).__name__}", []))
                _set_state(of, pickle.loads(state))
        of_python, of_numpy = self._random
        if random.getstate() != of_python:
            changes.append(("the random state of Python", []))
            random.setstate(of_python)
        numpys_now: Any = np.random.get_state(legacy=True)
        if numpys_now[2:] != of_numpy[2:] or not np.array_equal(numpys_now[1], of_numpy[1]):
            changes.append(("the random state of NumPy", []))
            np.random.set_state(of_numpy)
        return changes


def _items(container: Any) -> Any:
    """Copy what a container holds, past the methods of its class: some make a new object each time a key is looked up."""
    if isinstance(container, dict):
        return dict(dict.items(container))
    kind: Any = next(kind for kind in (list, set, deque) if isinstance(container, kind))
    return (set if kind is set else list)(kind.__iter__(container))


def _fill(container: Any, contents: Any) -> None:
    """Let a container hold `contents` and nothing else."""
    kind: Any = next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(container, kind))
    kind.clear(container)
    if isinstance(container, dict):
        for key, value in contents.items():
            kind.__setitem__(container, key, value)
    else:
        (kind.update if kind is set else kind.extend)(container, contents)


def _difference(container: Any, before: Any) -> Any:
    """The entries that are new or another object; None if there is no difference."""
    now = _items(container)
    if isinstance(now, dict):
        came = {key: value for key, value in now.items() if key not in before or before[key] is not value}
        return came if came or len(now) != len(before) else None
    if isinstance(now, set):
        return now - before if now != before else None
    same = len(now) == len(before) and all(a is b for a, b in zip(now, before))
    return None if same else [a for a in now if not any(a is b for b in before)]


def _state(of: Any) -> bytes | None:
    """Return the state of a random generator or an iterator; None where it has none that can be told."""
    try:
        with warnings.catch_warnings(action="ignore"):  # iterators will not always be pickled
            return pickle.dumps(of)
    except Exception:
        return None


def _set_state(of: Any, other: Any) -> None:
    """Let a random generator go on as `other` does. Most iterators cannot go back."""
    if isinstance(of, random.Random):
        of.setstate(other.getstate())
    elif isinstance(of, np.random.RandomState):
        of.set_state(other.get_state())
    elif isinstance(of, np.random.Generator):
        of.bit_generator.state = other.bit_generator.state


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

    def __init__(self, module: nn.Module) -> None:
        self._bound = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        own = [item for part in module.modules() for item in vars(part).items()]
        held = [
            value
            for key, value in own
            if isinstance(value, _MAY_HOLD) and key not in _MODULE_STATE and not _is_plain(value)
        ]
        self._left = {id(leaf) for leaf in pytree.tree_leaves(held)}
        self.advancing: list[Any] = []  # random generators, iterators
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

    def met(self, value: object) -> bool:
        return id(value) in self._seen

    def hooks(self, part: nn.Module) -> tuple[Any, ...]:
        """The forward hooks of a module, and the backward hooks."""
        return tuple(self(hook) for kind in _HOOKS for hook in getattr(part, kind).values())

    def _contents(self, value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            other = isinstance(value, Tensor) and value.grad_fn is not None and id(value) not in self._left
            return _Same(value) if other or id(value) in self._bound else _of_array(value)
        if isinstance(value, (bytearray, array)):
            return bytes(value)
        if isinstance(value, ContextVar):
            return self(value.get(NOTHING))
        if isinstance(value, (dict, list, set, deque)):
            self.containers.append(value)
        if isinstance(value, (dict, types.MappingProxyType)):
            held = _items(value) if isinstance(value, dict) else value
            return tuple((self(key), self(item)) for key, item in tuple(held.items())), self._attributes(value)
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
        if isinstance(value, nn.Module):  # in a list say, or in a closure; it need not be part of the module
            return tuple(
                (name, self(type(part)), self._attributes(part), self._tensors(part), self.hooks(part))
                for name, part in value.named_modules()
            )
        if isinstance(value, (*_GENERATORS, *_ITERATORS)) or type(value).__module__ == "itertools":
            self.advancing.append(value)
            return _Same(value)
        if isinstance(value, types.ModuleType) and not _installed(value.__name__):
            return self._of_module(value, tuple(name for name in vars(value) if not name.startswith("__")))
        if isinstance(value, (UserDict, UserList, ChainMap, Distribution)):
            return self._attributes(value)
        if _in_library(type(value).__module__) or isinstance(value, types.ModuleType):
            return _Same(value)
        attributes = self._attributes(value)
        return (self(type(value)), attributes) if attributes else _Same(value)

    def _tensors(self, part: nn.Module) -> tuple[Any, ...]:
        return tuple((key, self(tensor)) for key, tensor in (*part._parameters.items(), *part._buffers.items()))

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
        """The code, and what the globals, closures and modules hold that it names."""
        known, names = function.__globals__, tuple(_names_in(code))
        self.names += [(known, name) for name in names if name in known]
        found = [(name, self._global(known[name], names)) for name in names if name in known]
        found += [(of.__name__, self._of_module(of, names)) for of in _imported(names, known.get("__package__"))]
        environment = None if _READS_ENVIRONMENT.isdisjoint(names) else frozenset(os.environ.items())
        return code, tuple(found), environment, tuple(self(_held(cell)) for cell in function.__closure__ or ())

    def _global(self, value: Any, names: tuple[str, ...], inside: tuple[Any, ...] = ()) -> Any:
        """A global; of a module of the user's own (`config.SCALE`) what the code may read of it."""
        if not isinstance(value, types.ModuleType) or _installed(value.__name__):
            return self(value)
        return _Same(value) if value in inside else self._of_module(value, names, inside)

    def _of_module(
        self, module: types.ModuleType, names: tuple[str, ...], inside: tuple[Any, ...] = ()
    ) -> tuple[Any, ...]:
        """Return what the code that has these names may read of `module`, which it has reached through the modules `inside`."""
        held = {name: vars(module)[name] for name in names if name in vars(module)}
        self.names += [(vars(module), name) for name in held]
        return tuple((name, self._global(value, names, (*inside, module))) for name, value in held.items())


def _of_array(value: Any) -> tuple[Any, ...]:
    """Shape, dtype and content; of a tensor that requires grad (weights, what a hook computes of them) without the content."""
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes() if value.size < 1024 else hash(value.tobytes())
    about = tuple(value.shape), value.dtype, value.device, value.requires_grad
    if value.grad_fn is not None or value.layout != torch.strided:
        return about
    if isinstance(value, nn.Parameter):
        if value.requires_grad:
            return about
    elif type(value) is not Tensor or value.is_meta:
        return *about, value._version, _Same(value)
    with torch.no_grad():
        return *about, hash(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _in_library(name: str | None) -> bool:
    return name is None or name.partition(".")[0] in _LIBRARIES


@functools.cache
def _installed(name: str | None) -> bool:
    """True for code of installed packages, which counts by identity."""
    file = getattr(sys.modules.get(name or ""), "__file__", None) or ""
    return _in_library(name) or "site-packages" in file or str(name).partition(".")[0] in sys.stdlib_module_names


def _names(slots: str | Iterable[str]) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return NOTHING


def _imported(names: Iterable[str], package: str | None) -> Iterator[types.ModuleType]:
    """Yield the user's own modules among those that code in `package` may import by these names."""
    parents = tuple(accumulate((package or "").split("."), "{}.{}".format)) if package else ()
    for name in names:
        for full in (name, *(f"{parent}.{name}" for parent in parents)):
            if isinstance(found := sys.modules.get(full), types.ModuleType) and not _installed(full):
                yield found
