"""See what a capture would lose.

torch.export records ATen operations. What `forward` does besides (a gradient of its own, a hook on a tensor, a look at the grad
mode, a tensor put away) it runs once, on tensors without data, and forgets. `Watch` is on while a module is captured, and
either answers such a question truly, or refuses by name, or notes what the capture depends on:

    refused         custom `autograd.Function`s, hooks on gradients, `backward` and `grad`, updates of detached tensors in
                    place, `.item()` of what depends on the image, generators, weights that are not the module's
    answered        the autocast state; the device, whatever the capture pretends to run on; a size as text
    noted           whether `forward` looks at the grad mode: then the capture holds for one mode only (`mode_dependent`);
                    which attributes of modules it reads, and what it finds there (`read`)

Only what the model does counts: PyTorch's own tracing asks for all of this too.
"""

import functools
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.autograd import Function
from torch.autograd.function import FunctionMeta
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.functions import Max

from widefield.streaming.captured import CAPTURE_DEVICE
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.fingerprint import NOTHING
from widefield.streaming.frames import OURS, TORCH, asks, by_model
from widefield.streaming.pointwise_functions import PointwiseCall

_GETTERS = {name: getattr(Tensor, name).__get__ for name in ("data", "requires_grad", "is_leaf", "grad_fn", "grad")}
_LOOKS_AT_MODE = frozenset((_GETTERS["requires_grad"], _GETTERS["is_leaf"], Tensor.is_inference, torch.is_inference))
_GRADIENT_CALLS: dict[Any, str] = {
    Tensor.register_hook: "registers a hook on a gradient",
    Tensor.register_post_accumulate_grad_hook: "registers a hook on a gradient",
    Tensor.retain_grad: "keeps the gradient of a map",
    Tensor.backward: "runs a backward pass",
    torch.autograd.backward: "runs a backward pass",
    torch.autograd.grad: "computes gradients",
    _GETTERS["grad_fn"]: "looks at the graph of autograd",
    _GETTERS["grad"]: "looks at a gradient",
}
_DEVICE_GETTERS: dict[Any, Callable[[torch.device], Any]] = {
    Tensor.device.__get__: lambda device: device,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    Tensor.get_device: lambda device: -1 if device.index is None else device.index,
}
_VALUE_CALLS = frozenset(
    (
        *(getattr(Tensor, name) for name in ("item", "tolist", "numpy", "__array__", "__dlpack__", "data_ptr")),
        *(getattr(Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "__complex__")),
        *(getattr(Tensor, name) for name in ("untyped_storage", "storage", "equal", "allclose")),
        *(torch.equal, torch.allclose),
    )
)
_UPDATES = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "idiv", "itruediv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
_DETACH = frozenset((_GETTERS["data"], Tensor.detach, torch.detach))


class Watch(TorchFunctionMode):
    """A context for one capture of `module`, see its docstring. Afterwards `mode_dependent` is known, and `derived` answers.

    `attributes` is filled in by the capture, see `Captured.attributes`.

    Args:
        module: the module that is captured; errors name its layers.
        device: where the module is. Tensors there that forward finds elsewhere are copied to `CAPTURE_DEVICE`.
        autocast: the dtype of the autocast that the module is to run under, None without. `x.float()` is then kept as an
            operation, even though it changes nothing in the capture, which is in float32.
        limit: the time (`time.thread_time`, seconds) at which the capture is given up with `TimeoutError`.
        sees_reads: note which attributes of modules forward reads; every look at an attribute of any module is slower then.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, autocast: torch.dtype | None, limit: float, sees_reads: bool
    ) -> None:
        super().__init__()
        self.device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the original's identity: it and its copy, both held
        self._sees_reads = sees_reads
        self.autocast = autocast
        self.limit = limit
        self.mode_dependent = False
        # Modules go by their __dict__, which stand-ins of torch.export share with them.
        self._paths = {id(vars(part)): path for path, part in module.named_modules()}
        self._grads = torch.is_grad_enabled()
        self._thread = threading.get_ident()
        # by identity, and held: tensors that follow from no tensor of the module
        self._constants: dict[int, Tensor] = {}
        self._detached: dict[int, Tensor] = {}  # by their memory, and held: what lost its gradient
        self.attributes: tuple[tuple[str, str, bool], ...] = ()
        self._read: dict[tuple[int, str], Any] = {}
        self._patches = ExitStack()
        self.held: list[Any] = []  # calls that the captured graph knows by number

    def __enter__(self) -> "Watch":
        for patched in self._patched():
            self._patches.enter_context(patched)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def derived(self, value: Any) -> bool:
        """True for a tensor that depends on the image, on parameters or on buffers."""
        return isinstance(value, Tensor) and is_fake(value) and id(value) not in self._constants

    def read(self, part: nn.Module, name: str, value: Any) -> bool:
        """True if `value` (`NOTHING` for none) is what forward found when it first looked at the attribute `name` of `part`."""
        own = id(vars(part))
        reads = [self._read[own, name]] if (own, name) in self._read else []
        if (own, "__dict__") in self._read:
            reads.append(self._read[own, "__dict__"].get(name, NOTHING))
        return any(found is value for found in reads)

    def refusal(self, op: str, reason: str, remedy: str) -> UnsupportedOpError:
        """Return the error for what the module does that is running now."""
        path, source = "", ""
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            running, code = frame.f_locals.get("self"), frame.f_code
            if not source and asks(code.co_filename) and not code.co_filename.startswith(TORCH):
                source = f"{code.co_filename}:{frame.f_lineno}"
            if code.co_name == "forward" and isinstance(running, nn.Module) and id(vars(running)) in self._paths:
                path = self._paths[id(vars(running))]
                break
            frame = frame.f_back
        return UnsupportedOpError(path, op, reason, remedy, source)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not by_model(sys._getframe(1)):
            return func(*args, **kwargs)
        if time.thread_time() > self.limit:
            raise TimeoutError
        leaves = [*_leaves(args), *_leaves(kwargs)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        name = getattr(func, "__name__", str(func))
        self._refuse_foreign(name, leaves)
        self._refuse_lost(func, name, args, kwargs, tensors)
        if self.device != CAPTURE_DEVICE:
            if func in _DEVICE_GETTERS and is_fake(args[0]):
                return _DEVICE_GETTERS[func](self.device)
            if func is Tensor.cuda and is_fake(args[0]):
                return args[0]
            args, kwargs = pytree.tree_map(self._here, (args, kwargs))
        if self.autocast is not None and func is Tensor.float and args[0].dtype == torch.float32:
            return torch.ops.aten._to_copy.default(args[0], dtype=torch.float32)
        if func is nn.functional.pad:
            args, kwargs = pytree.tree_map(_decided, (args, kwargs))
        result = args[0].detach() if func == _GETTERS["data"] else func(*args, **kwargs)
        self._follow(func, name, tensors, result)
        return result

    def _here(self, leaf: Any) -> Any:
        """An argument of a call as it is on `CAPTURE_DEVICE`: tensors of the module's device are copied, once."""
        if isinstance(leaf, str | torch.device) and str(leaf).partition(":")[0] == self.device.type:
            return CAPTURE_DEVICE
        if not isinstance(leaf, Tensor) or is_fake(leaf) or leaf.device == CAPTURE_DEVICE:
            return leaf
        if id(leaf) not in self._copies:
            with _disable_current_modes(), torch.no_grad():
                self._copies[id(leaf)] = leaf, leaf.to(CAPTURE_DEVICE)
        return self._copies[id(leaf)][1]

    def original(self, constant: Tensor) -> Tensor:
        """The tensor that `constant` was copied from, or `constant` itself."""
        return next((tensor for tensor, copied in self._copies.values() if copied is constant), constant)

    def _refuse_foreign(self, name: str, leaves: list[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and hasattr(leaf, "_computed_before"):
                raise self.refusal(
                    name,
                    f"uses a tensor of shape {tuple(leaf.shape)} that was computed from weights before forward",
                    "compute it in forward, or keep its values: .detach(), or a buffer",
                )
            if isinstance(leaf, Tensor) and not is_fake(leaf) and leaf.requires_grad and leaf.is_leaf:
                raise self.refusal(
                    name,
                    f"uses a tensor of shape {tuple(leaf.shape)} that requires grad but is no parameter of the model",
                    "register it: assign it to the module as an nn.Parameter; keep modules in an nn.ModuleList, not in a list",
                )
            if isinstance(leaf, torch.Generator):
                raise self.refusal(
                    name,
                    "draws from a torch.Generator of its own, whose state a tile-by-tile pass does not advance",
                    "draw from the default generator, or draw before forward and keep the result in a buffer",
                )

    def _refuse_lost(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        if func in _LOOKS_AT_MODE:
            self.mode_dependent = True
        elif func in _GRADIENT_CALLS:
            if self._grads:
                raise self.refusal(
                    name,
                    f"{_GRADIENT_CALLS[func]}, which tiles do not have",
                    "move it out of forward, to the image, the outputs or the parameters; or run that part on whole images",
                )
            self.mode_dependent = True
        elif func == Tensor.requires_grad_ or name == "__set__":
            raise self.refusal(
                "an assignment to .data, .grad or .requires_grad",
                "changes a tensor of the model in forward",
                "change it between forward passes",
            )
        elif func in _VALUE_CALLS and any(map(self.derived, tensors)):
            raise self.refusal(
                name,
                "looks at values that are not known before the image is read",
                "remove control flow and numbers that depend on pixels or weights (if x.max() > 0, .item()) from forward, or "
                "stream only the part of the model before it",
            )
        # The first argument of torch._foreach_mul_ is a list.
        written = [kwargs.get("out"), *(_leaves(args[:1]) if _in_place(func, name) else ())]
        if any(isinstance(x, Tensor) and not x.requires_grad and _memory(x) in self._detached for x in written):
            raise self.refusal(
                name,
                "changes in place, past autograd, what .data or .detach() gave of a map or a weight",
                "write it as an operation with a result (x = x.clamp(0, 1)); change weights between forward passes",
            )

    def _follow(self, func: Any, name: str, tensors: list[Tensor], result: Any) -> None:
        constant = not any(map(self.derived, tensors))
        for x in _leaves(result):
            if not isinstance(x, Tensor):
                continue
            if constant:
                self._constants[id(x)] = x
            else:
                self._constants.pop(id(x), None)
            if func in _DETACH and any(tensor.requires_grad for tensor in tensors):
                self._detached[_memory(x)] = x

    def _patched(self) -> Iterator[Any]:
        """Yield patches of the functions by which a model asks PyTorch for something without an operation on tensors."""
        for name in ("is_grad_enabled", "is_inference_mode_enabled"):
            yield patch.object(torch, name, self._noting(getattr(torch, name)))
        cpu = self._answering(torch.is_autocast_enabled, CAPTURE_DEVICE.type)
        yield patch.object(torch, "is_autocast_cpu_enabled", functools.partial(cpu, CAPTURE_DEVICE.type))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            yield patch.object(torch, name, self._answering(getattr(torch, name), CAPTURE_DEVICE.type))
        if self.device != CAPTURE_DEVICE:
            yield patch.object(FakeTensor, "device", property(self._device_of))
        yield patch.object(torch.SymInt, "__repr__", _as_number(torch.SymInt.__repr__))
        yield patch.object(FunctionMeta, "__getattribute__", self._function_attribute, create=True)
        if self._sees_reads:
            yield patch.object(nn.Module, "__getattribute__", self._module_attribute, create=True)
        yield patch.object(checkpoint, "CheckpointFunction", Inlined)
        remedy = "enter it around the whole forward pass"
        yield self._entering(saved_tensors_hooks, "changes what autograd saves of a map", remedy)
        remedy = "use .detach() on the result instead, or move the region out of the streamed part"
        yield self._entering(torch.inference_mode, "runs a part of forward in another mode", remedy)

    def _is_mine(self, frame: types.FrameType) -> bool:
        return threading.get_ident() == self._thread and by_model(frame)

    def _noting(self, function: Callable[[], bool]) -> Callable[[], bool]:
        def asked() -> bool:
            if self._is_mine(sys._getframe(1)):
                self.mode_dependent = True
            return function()

        return asked

    def _answering(self, function: Callable[..., Any], *asked: Any) -> Callable[..., Any]:
        """Return a function that answers as `function(*asked)` did before the capture, which switches autocast off."""
        answer = function(*asked)
        return lambda *args: answer if args == asked and self._is_mine(sys._getframe(1)) else function(*args)

    def _device_of(self, x: FakeTensor, answer: Callable[..., Any] = FakeTensor.device.fget) -> torch.device:  # type: ignore[attr-defined]
        return self.device if self._is_mine(sys._getframe(1)) else answer(x)

    @property
    def _function_attribute(self) -> Callable[[type, str], Any]:
        """`Function.apply` looks `forward` up on its class. Noticed there, whoever holds `apply`."""

        def attribute(kind: Any, name: str) -> Any:
            found = type.__getattribute__(kind, name)
            if name != "forward" or kind.__module__.startswith("torch.") or not self._is_mine(sys._getframe(1)):
                return found
            if kind in PointwiseCall.known:
                takes_context = kind.setup_context is Function.setup_context

                @functools.wraps(found)  # `apply` may ask for its signature
                def recorded(*args: Any) -> Tensor:
                    return PointwiseCall.record(kind, args[1:] if takes_context else args)

                return recorded
            if self._grads:
                raise self.refusal(
                    f"the autograd.Function '{kind.__qualname__}'",
                    "has a backward of its own, which a capture drops",
                    "write it with differentiable operations; or, if it computes every element from the same element of its "
                    "inputs, say so with widefield.streaming.register_op",
                )
            self.mode_dependent = True
            return found

        return attribute

    @property
    def _module_attribute(self) -> Callable[[nn.Module, str], Any]:
        """Note what code that is not PyTorch's finds in attributes of modules, a look at all of them too."""

        def attribute(part: nn.Module, name: str) -> Any:
            if not sys._getframe(1).f_code.co_filename.startswith((TORCH, OURS)):
                own = object.__getattribute__(part, "__dict__")
                self._read.setdefault((id(own), name), dict(own) if name == "__dict__" else own.get(name, NOTHING))
            return object.__getattribute__(part, name)

        return attribute

    def _entering(self, context: Any, reason: str, remedy: str) -> Any:
        """Return a patch that refuses to enter a context where gradients are enabled, but for those of torch.utils."""
        enter = context.__enter__

        def entered(instance: Any) -> Any:
            if self._is_mine(sys._getframe(1)) and not type(instance).__module__.startswith("torch.utils"):
                if self._grads:
                    raise self.refusal(context.__name__, reason, remedy)
                self.mode_dependent = True
            return enter(instance)

        return patch.object(context, "__enter__", entered)


def mark_computed(tensor: Tensor) -> Tensor:
    """Return `tensor`, which stands for a result that an attribute held before forward: forward may replace it, and not use it."""
    tensor._computed_before = True  # type: ignore[attr-defined]
    return tensor


class Inlined:
    """torch.utils.checkpoint in a capture: the function itself. What is recomputed is decided by the plan."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


def _decided(amount: Any) -> Any:
    """Return an amount of padding that is the larger of two formulas as a number, for which the trace gets a guard.

    "Same" padding is max(0, ...) of the size before it. Left as a formula it would be part of all later sizes, and of the amount
    at each later layer, until nothing can be decided about them in reasonable time.
    """
    return int(amount) if isinstance(amount, torch.SymInt) and amount.node.expr.has(Max) else amount


def _as_number(original: Callable[[Any], str]) -> Callable[[Any], str]:
    """A size as text is that of the number: the capture then holds for this size only."""
    return lambda size: str(int(size)) if by_model(sys._getframe(1)) else original(size)


def _in_place(func: Any, name: str) -> bool:
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.is_mutable
    return (name.endswith("_") and not name.endswith("__")) or name in _UPDATES


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(tuple(value.values()))
    else:
        yield value
