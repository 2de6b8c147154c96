"""The memory that one window needs: the module runs on windows without data, and what lives at a time is counted."""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from widefield.streaming.watch import Watch

_MANY = 64  # windows: of fewer, the gradients of large weights are more than what is saved
_ATTENTION = "_scaled_dot_product"  # of kernels that are marked as random, whether they drop anything or not


@dataclass(frozen=True)
class WindowCost:
    """Bytes of one window: what autograd saves of it, the peak of a pass without gradients, that of a forward and backward pass.

    `result` and `dtype` are those of one result; `draws`: random numbers are drawn.
    """

    saved: int
    forward: int
    training: int
    result: tuple[int, ...]
    dtype: torch.dtype
    draws: bool


def window_cost(
    bind: Callable[[Sequence[Tensor]], nn.Module],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tensors: Sequence[Tensor],
    requires_grad: Sequence[bool],
    watch: Watch,
) -> WindowCost:
    """Measure a module on windows of `shape` (C, h, w), with tensors like `tensors`, in the capture of `watch`.

    `bind` gives a copy of it that has such tensors. `requires_grad` says of the windows, then of each tensor, whether its gradient
    is wanted.

    Raises:
        UnsupportedOpError: the module decides by values, changes a buffer, keeps what it makes of a window, or trains a tensor
            that it does not register.
    """
    autocast, with_gradients = watch.autocast, torch.is_grad_enabled()

    def run(windows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return bind(weights)(windows)  # type: ignore[no-any-return]

    def measured() -> WindowCost | str | tuple[str, str, str]:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with (
            fake,
            torch.autocast(watch.device.type, autocast or torch.bfloat16, autocast is not None),
            _Computed(watch.device) as computed,
        ):
            weights = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=watch.device).requires_grad_(need)
                for x, need in zip(tensors, requires_grad[1:], strict=True)
            ]
            windows = torch.empty((2, *shape), dtype=dtype, device=watch.device).requires_grad_(requires_grad[0])
            if with_gradients and _trains_others(run, windows, weights):
                return "hidden"
            if name := _set_by(bind(weights), windows):
                return (
                    f"attribute {name} within Local",
                    "is set by what forward makes of windows, of which each tile has others",
                    "return what you want to keep beside the result, as further channels; or leave such attributes out",
                )
            if computed.used:
                return "hidden"
            counted = []
            for count in (_MANY, 2 * _MANY):
                windows = torch.empty((count, *shape), dtype=dtype, device=watch.device).requires_grad_(
                    requires_grad[0]
                )
                counted.append((*_training(run, windows, weights), *_inference(run, windows, weights)))
            changed = any(weight._version for weight in weights)
        (saved, training, forward, *_), (saved_2, training_2, forward_2, result, draws) = counted
        if changed:
            return "changed"
        own = windows[0].numel() * dtype.itemsize
        return WindowCost(
            (saved_2 - saved) // _MANY,
            (forward_2 - forward) // _MANY + own,
            (training_2 - training) // _MANY + own,
            tuple(result.shape[1:]),
            result.dtype,
            draws,
        )

    try:
        # In a thread of its own, which no mode of the capture reaches.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(measured).result()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise watch.refusal(
            f"{error.func} within Local",
            "looks at values of a batch of windows, so that windows may depend on each other",
            "remove control flow and sizes that depend on pixels (if x.max() > 0, .item(), x[mask]) from the module",
        ) from error
    except UnsupportedFakeTensorException as error:
        raise watch.refusal(
            "an operation within Local",
            f"runs on no tensors without data ({error!s:.200}), so that the memory of a window is not known",
            "register a fake implementation of it (torch.library.register_fake)",
        ) from error
    if not isinstance(found, WindowCost):
        raise watch.refusal(*(_REFUSED[found] if isinstance(found, str) else found))
    return found


_REFUSED = {
    "changed": (
        "an update in place within Local",
        "changes a parameter or buffer of the module, so that windows depend on each other",
        "put the layer in evaluation mode, or move the update out of forward",
    ),
    "hidden": (
        "a tensor that requires grad or was computed before, within Local,",
        "is no parameter or buffer of its module, and so would have no gradient, or no values",
        "register it: assign it to the module as an nn.Parameter; keep modules in an nn.ModuleList, not in a list",
    ),
}


def _trains_others(run: Any, windows: Tensor, weights: Sequence[Tensor]) -> bool:
    """True if the result has a gradient with respect to other tensors than these."""
    result = run(windows, weights)  # kept: functions written in Python do not live longer than their graph
    todo: list[Any] = [result.grad_fn]
    given, seen = {id(x) for x in (windows, *weights)}, set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in given:
                return True
    return False


def _set_by(module: nn.Module, windows: Tensor) -> str:
    """Return the path of an attribute that a pass sets to what depends on `windows`, or anew at each pass; "" if there is none.

    What a first pass fills and others leave is a cache, and each tile may fill its own.
    """
    with torch.no_grad(), _Derived(windows) as derived:
        module(windows)
        before = _attributes(module)
        module(windows)
    for path, (value, size) in _attributes(module).items():
        old, old_size = before.get(path, (None, None))
        leaves = pytree.tree_leaves(value)
        if any(isinstance(x, Tensor) and x.untyped_storage()._cdata in derived.storages for x in leaves):
            return path
        plain = isinstance(value, (bool, int, float, str, tuple, type(None))) and not any(
            isinstance(x, Tensor) for x in leaves
        )
        if size != old_size or (plain and value != old):
            return path
    return ""


def _attributes(module: nn.Module) -> dict[str, tuple[Any, int | None]]:
    """The attributes of a module and its parts, each with its length if it is a container."""
    found: dict[str, tuple[Any, int | None]] = {}
    for path, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if name not in ("_parameters", "_modules", "_buffers")}
        for name, value in {**own, **part._buffers}.items():
            size = len(value) if isinstance(value, (list, dict, set)) else None
            found[f"{path}.{name}".removeprefix(".")] = value, size
    return found


class _Derived(TorchDispatchMode):
    """Notices the memory of all that is computed from a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.storages = {tensor.untyped_storage()._cdata}
        self._held = [tensor.untyped_storage()]  # as long as they live, no other memory has their place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x.untyped_storage() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(storage._cdata in self.storages for storage in given):
            made = [x.untyped_storage() for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
            made += given[:1] if func._schema.is_mutable else []
            self._held += made
            self.storages.update(storage._cdata for storage in made)
        return result


class _Computed(TorchFunctionMode):
    """Notices the use of what `watch.mark_computed` marked, which is empty on the CPU, and takes it to `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.used = device, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._here, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _here(self, leaf: Any) -> Any:
        if not hasattr(leaf, "_computed_before"):
            return leaf
        self.used = True
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=self.device)


class _Live(TorchDispatchMode):
    """Counts the bytes of what operations make: `now`, and the `most` at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.draws = False
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if torch.Tag.nondeterministic_seeded in func.tags:
            named = {**dict(zip((x.name for x in func._schema.arguments), args, strict=False)), **(kwargs or {})}
            self.draws |= not func._opname.startswith(_ATTENTION) or named.get("dropout_p", 0.0) > 0
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self._known | given:
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _inference(run: Any, windows: Tensor, weights: Sequence[Tensor]) -> tuple[int, Tensor, bool]:
    """Return the peak of a pass without gradients, its result, and whether it draws random numbers."""
    with torch.no_grad(), _Live() as live:
        result = run(windows.detach(), [weight.detach() for weight in weights])
    return live.most, result, live.draws


def _training(run: Any, windows: Tensor, weights: Sequence[Tensor]) -> tuple[int, int]:
    """Return the bytes that autograd saves, and the peak of a forward and backward pass; 0 if no gradient is wanted."""
    wanted = [x for x in (windows, *weights) if x.requires_grad]
    if not wanted:
        return 0, 0
    saved: dict[int, int] = {}
    own = {weight.untyped_storage()._cdata for weight in weights}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return x

    with torch.enable_grad(), _Live() as live:
        with saved_tensors_hooks(pack, lambda x: x):
            result = run(windows, weights)
        size = sum(saved.values())
        if result.requires_grad:
            torch.autograd.grad(result, wanted, torch.ones_like(result), allow_unused=True)
    return size, live.most
