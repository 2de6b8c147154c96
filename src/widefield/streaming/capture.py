"""From a module to a list of operations on named weights, by torch.export.

The capture runs on a copy of the module without values (`skeleton.py`), so it costs no memory and leaves the user's module alone.
The image's height and width are symbols if the module allows it: then the trace holds for other sizes too, see `trace`.
"""

import logging
import operator
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, _trace
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CAPTURE_DEVICE, CallKind, Captured, Node, Ref, overwrite
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.fingerprint import NOTHING, Surroundings
from widefield.streaming.functional import functional
from widefield.streaming.local import LocalCall
from widefield.streaming.pointwise_functions import PointwiseCall
from widefield.streaming.refusals import (
    changes_buffer,
    failed_capture,
    module_path,
    refuse_changes,
    refuse_other_modes,
    refuse_structure,
    refuse_unknown_norms,
)
from widefield.streaming.skeleton import skeleton_of
from widefield.streaming.trace import Formula, Trace, formula
from widefield.streaming.watch import Watch

_LOG = logging.getLogger(__name__)

_SYMBOLIC_LIMIT = 20.0  # seconds of computing after which a trace with symbols is given up for one without

# Out-of-place forms of in-place updates that have no derivative of their own.
_DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.copy.default: overwrite}
_LIKE_ANOTHER = (torch.ops.aten.type_as.default, torch.ops.aten.to.other)
_GIVEN_BACK = (torch.Tensor, bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)

_ONE_AT_A_TIME = threading.RLock()  # torch.export keeps its state for all threads, and PyTorch that of `full_float32`


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 as such, neither in TensorFloat32 nor in bfloat16, whatever is allowed; in one thread at a time.

    torch.export needs it as well: it asks for one setting of all cuDNN layers, and fails if they have several.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    layers = cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.matmul
    with _ONE_AT_A_TIME:
        precisions = [layer.fp32_precision for layer in layers]
        convolutions, products = (
            _or_none(ask) for ask in (lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision)
        )
        try:
            cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
            for layer in layers:
                layer.fp32_precision = "ieee"
            yield
        finally:
            if convolutions is not None:
                cudnn.allow_tf32 = convolutions
            if products is not None:
                torch.set_float32_matmul_precision(products)
            for layer, precision in zip(layers, precisions, strict=True):
                layer.fp32_precision = precision


def _or_none(ask: Callable[[], Any]) -> Any:
    """The answer of `ask`, None if PyTorch has several."""
    with warnings.catch_warnings():
        # PyTorch 2.9 warns of these settings, which it has itself; here they are only looked at.
        warnings.filterwarnings("ignore", "Please use the new API")
        try:
            return ask()
        except RuntimeError:
            return None


# Hooks of the caller (torch.utils.checkpoint has some) must not see the tensors that a capture saves.
_UNHOOKED = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


# torch.export prints the whole graph, thousands of lines, when it fails.
_QUIET = patch.object(_trace, "print", lambda *args, **kwargs: None, create=True)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer; the CPU for a module that has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def trace_module(module: nn.Module, call: CallKind, batch_statistics: bool = False, symbolic: bool = True) -> Trace:
    """Trace `module` for such a call, in the current grad mode and under the autocast that is on.

    Args:
        module: It is left as it was, whatever happens, and so is all that its forward can reach (caches, globals, objects in
            attributes).
        call: What it is called with.
        batch_statistics: Batch norm layers in training mode normalise by the batch, and not by their running statistics.
        symbolic: Trace with symbols for height and width, if the module can be traced so.

    Raises:
        UnsupportedOpError: The forward pass cannot be captured: control flow on pixel values, a buffer that is updated in forward,
            calls that leave PyTorch, and what `watch` refuses.
        ValueError: The module does not run on such an image.
    """
    refuse_structure(module, batch_statistics)
    grads = torch.is_grad_enabled()
    with full_float32(), torch.inference_mode(False), torch.set_grad_enabled(grads):
        if symbolic:
            try:
                trace = _capture(module, call, batch_statistics, symbolic=True)
                if trace.at(*call.lengths) is not None:
                    return trace
            except UnsupportedOpError as error:
                # The model's own doing, or a look at values: the same without symbols.
                if error.__cause__ is None or isinstance(error.__cause__, GuardOnDataDependentSymNode):
                    raise
                _LOG.debug("no trace with symbols: %s", error)
            except Exception as error:  # whatever the symbols are not good for; a fault of the module comes again
                _LOG.debug("no trace with symbols: %s", error)
        return _capture(module, call, batch_statistics, symbolic=False)


def _capture(
    module: nn.Module, call: CallKind, batch_statistics: bool, symbolic: bool, sees_reads: bool = False
) -> Trace:
    fake, autocast = FakeTensorMode(allow_non_fake_inputs=True), call.autocast
    skeleton = skeleton_of(module, fake, batch_statistics)
    with fake:
        image = torch.empty(call.shape, dtype=call.dtype, device=CAPTURE_DEVICE)
        maps = [torch.empty(x.shape, dtype=x.dtype, device=CAPTURE_DEVICE) for x in call.map_inputs]
    limit = time.thread_time() + _SYMBOLIC_LIMIT if symbolic else float("inf")
    watch = Watch(skeleton, call.device, autocast, limit, sees_reads)
    sizes = tuple({x.ndim - 2: Dim.AUTO, x.ndim - 1: Dim.AUTO} for x in (image, *maps))
    dynamic = ((sizes[0], sizes[1:]) if maps else sizes) if symbolic else None
    wrapped = _WithAttributes(skeleton, watch, call.requires_grad)
    surroundings = Surroundings(skeleton)
    watch.mode_dependent = surroundings.looks_at_mode
    here = nullcontext() if torch.get_default_device() == CAPTURE_DEVICE else CAPTURE_DEVICE
    try:
        with (
            here,
            _UNHOOKED,
            watch,
            _QUIET,
            torch.autocast(CAPTURE_DEVICE.type, enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "The tensor attribute")  # they are put back
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # of results that forward reads
            program = torch.export.export(wrapped, (image, *maps), dynamic_shapes=dynamic, strict=False)
            refuse_other_modes(program.graph, autocast is not None)
            program = functional(program)
    except UnsupportedOpError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, UnsupportedOpError):
            raise error.__cause__ from None
        raise failed_capture(error, call) from error
    finally:
        changes = surroundings.restore()
    refuse_changes(changes, watch)
    if watch.attributes and not sees_reads:  # slow, so only where forward sets attributes
        return _capture(module, call, batch_statistics, symbolic, sees_reads=True)
    synchronised = frozenset(path for path, part in module.named_modules() if isinstance(part, nn.SyncBatchNorm))
    captured = _operations(program)
    constants = {name: watch.original(tensor) for name, tensor in captured.constants.items()}
    captured = replace(
        captured, image_shape=call.shape, constants=constants, synchronised=synchronised, attributes=watch.attributes
    )
    if batch_statistics:
        refuse_unknown_norms(module, captured)
    return replace(_with_guards(program, captured), mode_dependent=watch.mode_dependent)


class _WithAttributes(nn.Module):
    """`module`, whose result is followed by the tensors and plain values that its forward has left in attributes of modules."""

    def __init__(self, module: nn.Module, watch: Watch, requires_grad: Sequence[bool]) -> None:
        super().__init__()
        self.module = module
        # Later torch.export gives out stand-ins for layers with two names: new ones at each look, with the same __dict__.
        self._parts = tuple(module.named_modules())

        def record(*inputs: torch.Tensor) -> Any:
            for x, needed in zip(inputs, requires_grad, strict=True):
                x.requires_grad_(needed)
            result, found = self._run(inputs)
            watch.attributes = tuple(found)
            return result, tuple(found.values())

        self._record, self._read, self._derived = record, watch.read, watch.derived

    def forward(self, image: torch.Tensor, *maps: torch.Tensor) -> Any:
        return self._record(image, *maps)

    def _run(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, dict[tuple[str, str, bool], Any]]:
        before = [(path, part, dict(part.__dict__)) for path, part in self._parts]
        registered = {path: (*part._parameters.items(), *part._modules.items()) for path, part, _ in before}
        buffers = {path: tuple(part._buffers.items()) for path, part, _ in before}
        result = self.module(*inputs)
        found: dict[tuple[str, str, bool], Any] = {}
        for path, part, own in before:
            if registered[path] != (*part._parameters.items(), *part._modules.items()):
                remedy = "make all layers in __init__, or call the plain module once"
                raise UnsupportedOpError(path, "forward", "adds or replaces a parameter or a layer", remedy)
            for (key, old), (_, new) in zip(buffers[path], part._buffers.items(), strict=False):
                if old is not new:
                    raise changes_buffer(f"{path}.{key}".lstrip("."))
            for key, value in tuple(part.__dict__.items()):
                if key in own and value is own[key]:
                    continue
                leaves = pytree.tree_leaves(value)
                read = self._read(part, key, own.get(key, NOTHING))
                if read and any(map(self._derived, leaves)):
                    reason = "is read in forward before it is set, so a forward pass depends on the one before it"
                    remedy = "return the tensor and pass it to the next call from outside, or reset the attribute before it is read"
                    raise UnsupportedOpError(path, f"the attribute '{key}'", reason, remedy)
                if all(leaf is None or isinstance(leaf, _GIVEN_BACK) for leaf in leaves):
                    found[path, key, read] = value
                elif any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                    reason = "is set in forward to a tensor inside of an object"
                    remedy = "return the tensor instead"
                    raise UnsupportedOpError(path, f"the attribute '{key}'", reason, remedy)
            part.__dict__.clear()
            part.__dict__.update(own)
        return result, found


def _operations(program: torch.export.ExportedProgram) -> Captured:
    """The program's operations, by names. Numbers that depend on the image's size are `Formula`s."""
    signature = program.graph_signature
    mutated = {**signature.buffers_to_mutate, **getattr(signature, "parameters_to_mutate", {})}
    if mutated:
        raise changes_buffer(min(mutated.values()).removeprefix("module."))
    if signature.user_inputs_to_mutate:
        remedy = "write it as an operation with a result: x = x.clamp(0, 1)"
        raise UnsupportedOpError("", "in-place update", "changes the image that forward was given", remedy)
    bound = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    bound = {name: key.removeprefix("module.") for name, key in bound.items()}
    constants = {name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()}
    inputs, nodes, outputs, shapes = [], [], (), {}
    tuples: dict[str, Node] = {}
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            value = fx.meta["val"]
            if isinstance(value, torch.Tensor):
                shapes[fx.name] = (tuple(map(formula, value.shape)), value.dtype)
            if fx.name in signature.user_inputs:
                inputs.append(fx.name)
        elif fx.op == "output":
            outputs = tuple(_refs(value) for value in fx.args[0])
        elif fx.target is operator.getitem and fx.args[0].name in tuples:
            nodes.append(_named(replace(tuples[fx.args[0].name], pick=fx.args[1]), fx))
        elif isinstance(fx.meta.get("val"), torch.Tensor):
            node = _named(_node(fx), fx)
            if node.target in _LIKE_ANOTHER:  # of the other tensor only the dtype matters
                node = node.derived(torch.ops.aten.to.dtype, node.args[0], node.dtype)
            nodes.append(node)
        elif isinstance(fx.meta.get("val"), (tuple, list)):
            tuples[fx.name] = _node(fx)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Captured(
        inputs[0], (), bound, constants, shapes, tuple(nodes), outputs, out_spec, map_inputs=tuple(inputs[1:])
    )


def _with_guards(program: torch.export.ExportedProgram, captured: Captured) -> Trace:
    """The trace with the conditions under which it holds."""
    lengths = (n for name in captured.spatial_inputs for n in captured.shapes[name][0][-2:])
    dims = tuple(n.expression if isinstance(n, Formula) else sympy.Integer(n) for n in lengths)
    symbols = {symbol for dim in dims for symbol in dim.free_symbols}
    if not symbols:
        return Trace(captured, dims)
    image = next(fx for fx in program.graph.nodes if fx.name == captured.image).meta["val"]
    environment = image.fake_mode.shape_env
    guards = {environment.replace(guard.expr) for guard in environment.guards} - {sympy.true}
    ranges = {
        symbol: (limits.lower, limits.upper) for symbol, limits in environment.var_to_range.items() if symbol in symbols
    }
    return Trace(captured, dims, tuple(guards), ranges)


def _node(fx: torch.fx.Node) -> Node:
    args = pytree.tree_map(_refs, fx.args, is_leaf=lambda a: isinstance(a, torch.fx.Node))
    kwargs = pytree.tree_map(_refs, dict(fx.kwargs), is_leaf=lambda a: isinstance(a, torch.fx.Node))
    target: Any = _DIFFERENTIABLE.get(fx.target, fx.target)
    if target is torch.ops.widefield.pointwise_function.default:
        tensors, call = args
        target, args = PointwiseCall.recorded[call], tuple(tensors)
    elif target is torch.ops.widefield.local.default:
        tensors, call = args
        target, args = LocalCall.captured[call], tuple(tensors)
    return Node(fx.name, target, args, kwargs, (), torch.float32, None, module_path(fx), _source(fx))


def _named(node: Node, fx: torch.fx.Node) -> Node:
    value = fx.meta["val"]
    return replace(node, name=fx.name, shape=tuple(map(formula, value.shape)), dtype=value.dtype)


def _refs(value: Any) -> Any:
    if not isinstance(value, torch.fx.Node):
        return value
    number = value.meta.get("val")
    return formula(number) if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) else Ref(value.name)


def _source(fx: torch.fx.Node) -> str:
    """File, line and code of the innermost frame outside of torch, where export recorded it."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', fx.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return "{}:{}: {}".format(*own[-1]) if own else ""
