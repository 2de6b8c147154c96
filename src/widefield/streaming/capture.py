"""From a module to a list of operations on named weights, by torch.export.

The capture runs on a structural copy of the module whose tensors have shapes but no storage, so it costs no memory and
leaves the user's module alone. Layers that keep running statistics are captured in evaluation mode, whatever their flag.
The image's height and width are symbols if the module allows it: then the trace holds for other sizes too, see `trace`.
"""

import copy
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
from torch.nn.modules import module as everywhere
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CAPTURE_DEVICE, Captured, MapInput, Node, Ref, overwrite
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.fingerprint import NOTHING, Surroundings, before_forward
from widefield.streaming.functional import functional
from widefield.streaming.local import LocalCall
from widefield.streaming.trace import Formula, Trace, formula, lengths_of
from widefield.streaming.watch import PointwiseCall, Watch, mark_computed

_LOG = logging.getLogger(__name__)

_SYMBOLIC_LIMIT = 20.0  # seconds of computing after which a trace with symbols is given up for one without

_ONE_AT_A_TIME = threading.RLock()  # torch.export keeps its state for all threads, and PyTorch that of `full_float32`


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 as such, neither in TensorFloat32 nor in bfloat16, whatever is allowed; in one thread at a time.

    torch.export needs it as well: it asks for one setting of all cuDNN layers, and fails if they have several.
    """
    backends: Any = torch.backends
    layers = (
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.matmul,
    )
    with _ONE_AT_A_TIME:
        precisions = [layer.fp32_precision for layer in layers]
        convolutions, products = (_or_none(ask) for ask in (_allow_tf32, torch.get_float32_matmul_precision))
        try:
            backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
            for layer in layers:
                layer.fp32_precision = "ieee"
            yield
        finally:
            if convolutions is not None:
                backends.cudnn.allow_tf32 = convolutions
            if products is not None:
                torch.set_float32_matmul_precision(products)
            for layer, precision in zip(layers, precisions, strict=True):
                layer.fp32_precision = precision


def _allow_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


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


def trace_module(
    module: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    batch_statistics: bool = False,
    symbolic: bool = True,
    image_requires_grad: bool = False,
    device: torch.device | None = None,
    maps: Sequence[MapInput] = (),
) -> Trace:
    """Trace `module` called on an image of `shape` (N, C, H, W) and `dtype` on `device`, in the current grad mode.

    `device`: None for that of the module. `maps`: what else it is called with.

    `autocast`: the dtype of the autocast that it will run under. `batch_statistics`: batch norm layers in training mode
    normalise by the batch, and not by their running statistics. `symbolic`: with symbols for height and width, if the module
    can be traced so.

    Raises `UnsupportedOpError` when the forward pass cannot be captured: control flow on pixel values, a buffer that is
    updated in forward, calls that leave PyTorch, and what `watch` refuses. Whatever happens, the module and all that its forward
    can reach (caches, globals, objects in attributes) is left as it was.
    """
    _refuse_structure(module, batch_statistics)
    grads, device = torch.is_grad_enabled(), device or device_of(module)
    with full_float32(), torch.inference_mode(False), torch.set_grad_enabled(grads):
        if symbolic:
            try:
                trace = _capture(
                    module, shape, dtype, autocast, batch_statistics, True, image_requires_grad, device, maps
                )
                if trace.at(*lengths_of(shape, maps)) is not None:
                    return trace
            except UnsupportedOpError as error:
                # The model's own doing, or a look at values: the same without symbols.
                if error.__cause__ is None or isinstance(error.__cause__, GuardOnDataDependentSymNode):
                    raise
                _LOG.debug("no trace with symbols: %s", error)
            except Exception as error:  # whatever the symbols are not good for; a fault of the module comes again
                _LOG.debug("no trace with symbols: %s", error)
        return _capture(module, shape, dtype, autocast, batch_statistics, False, image_requires_grad, device, maps)


def _capture(
    module: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    batch_statistics: bool,
    symbolic: bool,
    image_requires_grad: bool,
    device: torch.device,
    maps: Sequence[MapInput],
    sees_reads: bool = False,
) -> Trace:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = _skeleton(module, fake, batch_statistics)
    with fake:
        image = torch.empty(shape, dtype=dtype, device=CAPTURE_DEVICE)
        others = tuple(torch.empty(x.shape, dtype=x.dtype, device=CAPTURE_DEVICE) for x in maps)
    limit = time.thread_time() + _SYMBOLIC_LIMIT if symbolic else float("inf")
    watch = Watch(skeleton, device, autocast, limit, sees_reads)
    sizes = tuple({len(x.shape) - 2: Dim.AUTO, len(x.shape) - 1: Dim.AUTO} for x in (image, *others))
    dynamic = ((sizes[0], sizes[1:]) if maps else sizes) if symbolic else None
    wrapped = _WithAttributes(skeleton, watch, (image_requires_grad, *(x.requires_grad for x in maps)))
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
            program = torch.export.export(wrapped, (image, *others), dynamic_shapes=dynamic, strict=False)
            _refuse_regions(program.graph, autocast is not None)
            program = functional(program)
    except UnsupportedOpError:
        raise
    except Exception as error:
        if isinstance(error.__cause__, UnsupportedOpError):
            raise error.__cause__ from None
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        if "is mutated in the forward method" in first_line:
            raise UnsupportedOpError(
                "",
                "in-place update",
                "changes a tensor in forward that is neither made there nor a buffer of the model",
                "register it as a buffer; keep layers in an nn.ModuleList, and those that update themselves in evaluation mode",
            ) from error
        if not type(error).__module__.startswith("torch."):  # not the capture but the model: a wrong channel count, say
            given = ", ".join(("an image of shape " + str(shape), *(f"a map of shape {x.shape}" for x in maps)))
            raise ValueError(f"the model cannot run on {given}: {first_line:.300}") from error
        raise UnsupportedOpError(
            "",
            "forward",
            f"could not be captured by torch.export ({type(error).__name__}: {first_line:.300})",
            "remove control flow that depends on pixel values (.item(), if x.max() > 0) from forward, "
            "or stream only the part of the model before it",
        ) from error
    finally:
        changes = surroundings.restore()
    _refuse_changes(changes, watch)
    if watch.left and not sees_reads:  # slow, so only where forward sets attributes
        return _capture(
            module,
            shape,
            dtype,
            autocast,
            batch_statistics,
            symbolic,
            image_requires_grad,
            device,
            maps,
            sees_reads=True,
        )
    synchronised = frozenset(path for path, part in module.named_modules() if isinstance(part, nn.SyncBatchNorm))
    captured = _captured(program)
    constants = {name: watch.original(tensor) for name, tensor in captured.constants.items()}
    captured = replace(
        captured, image_shape=shape, constants=constants, synchronised=synchronised, attributes=watch.left
    )
    if batch_statistics:
        _refuse_unknown_norms(module, captured)
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
            watch.left = tuple(found)
            return result, tuple(found.values())

        self._record, self._read, self._derived = record, watch.read, watch.derived

    def forward(self, image: torch.Tensor, *maps: torch.Tensor) -> Any:
        return self._record(image, *maps)

    def _run(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, dict[tuple[str, str, bool], Any]]:
        before = [(path, part, dict(part.__dict__)) for path, part in self._parts]
        registered = {path: (*part._parameters.items(), *part._modules.items()) for path, part, _ in before}
        buffers = {path: tuple(part._buffers.items()) for path, part, _ in before}
        result = self.module(*inputs)
        left: dict[tuple[str, str, bool], Any] = {}
        for path, part, own in before:
            if registered[path] != (*part._parameters.items(), *part._modules.items()):
                raise UnsupportedOpError(
                    path,
                    "forward",
                    "adds or replaces a parameter or a layer",
                    "make all layers in __init__, or call the plain module once",
                )
            for (key, old), (_, new) in zip(buffers[path], part._buffers.items(), strict=False):
                if old is not new:
                    raise _changes_buffer(f"{path}.{key}".lstrip("."))
            for key, value in tuple(part.__dict__.items()):
                if key in own and value is own[key]:
                    continue
                leaves = pytree.tree_leaves(value)
                read = self._read(part, key, own.get(key, NOTHING))
                if read and any(map(self._derived, leaves)):
                    raise UnsupportedOpError(
                        path,
                        f"the attribute '{key}'",
                        "is read in forward before it is set, so a forward pass depends on the one before it",
                        "return the tensor and pass it to the next call from outside, or reset the attribute before it is read",
                    )
                if all(leaf is None or isinstance(leaf, _GIVEN_BACK) for leaf in leaves):
                    left[path, key, read] = value
                elif any(isinstance(leaf, torch.Tensor) for leaf in leaves):
                    raise UnsupportedOpError(
                        path,
                        f"the attribute '{key}'",
                        "is set in forward to a tensor inside of an object",
                        "return the tensor instead",
                    )
            part.__dict__.clear()
            part.__dict__.update(own)
        return result, left


_GIVEN_BACK = (torch.Tensor, bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)


def _changes_buffer(key: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        key.rpartition(".")[0],
        "in-place update",
        f"changes the parameter or buffer '{key}' in forward, which a tile-by-tile pass would repeat",
        "put the layer in evaluation mode, or move the update out of forward",
    )


def _refuse_changes(changes: list[tuple[str, list[Any]]], watch: Watch) -> None:
    """Refuse what forward changes outside of the module, but for entries added to a cache that do not depend on the image."""
    for what, values in changes:
        if any(map(watch.derived, pytree.tree_leaves(values))):
            raise UnsupportedOpError(
                "",
                "forward",
                f"puts a tensor away in {what or 'a dict or set'}, outside of its result",
                "return the tensor, or assign it to an attribute of the module (self.features = ...)",
            )
        if what:
            raise UnsupportedOpError(
                "",
                "forward",
                f"changes {what}, so that the next forward pass may differ",
                "keep such state in an attribute of the module, draw with torch, or change it outside of forward",
            )


def _refuse_unknown_norms(module: nn.Module, captured: Captured) -> None:
    """Refuse norm layers of which torch.export gives a path that is none: no one would find their running statistics."""
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    for node in captured.nodes:
        if "batch_norm" in node.op and node.module_path not in paths:
            raise node.refuse(
                "belongs to a layer with several names, reached through a slice of layers",
                "give the layer one name, or take the layers one by one",
            )


def _refuse_structure(module: nn.Module, batch_statistics: bool) -> None:
    """Refuse modules that hide their operations, and hooks on gradients."""
    for path, part in module.named_modules():
        tracks = isinstance(part, _NormBase) and part.training and part.track_running_stats
        if batch_statistics and tracks and not isinstance(part, _BatchNorm):
            raise UnsupportedOpError(
                    path, type(part).__name__, "in training mode updates running statistics by those of each instance",
                    "put this instance norm layer in evaluation mode, or make it with track_running_stats=False",
                )  # fmt: skip
        kind = type(part).__module__
        if isinstance(part, torch.jit.ScriptModule):
            raise UnsupportedOpError(
                path,
                "TorchScript",
                "hides the operations of a scripted or traced module",
                "stream the module that was scripted",
            )
        if isinstance(part, (torch._dynamo.OptimizedModule, nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inside = "_orig_mod" if isinstance(part, torch._dynamo.OptimizedModule) else "module"
            raise UnsupportedOpError(
                path,
                type(part).__name__,
                "is a wrapper around the module to stream",
                f"stream the module inside: model.{inside}",
            )
        if ".quantized" in kind or ".qat." in kind or kind.startswith("torchao"):
            raise UnsupportedOpError(
                path,
                type(part).__name__,
                "computes with quantised tensors",
                "stream the float model, under autocast for speed",
            )
        if torch.is_grad_enabled() and (part._backward_hooks or part._backward_pre_hooks):
            raise UnsupportedOpError(
                path,
                "a backward hook of the module",
                "would not run on tiles, or once for each",
                "remove it (handle.remove()) and use hooks on the image, outputs and parameters, or stream under torch.no_grad()",
            )
    if torch.is_grad_enabled() and (everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks):
        raise UnsupportedOpError("", "a global backward hook", "would not run on tiles", "remove it (handle.remove())")


def _captured(program: torch.export.ExportedProgram) -> Captured:
    """The program's operations, by names. Numbers that depend on the image's size are `Formula`s."""
    signature = program.graph_signature
    mutated = {**signature.buffers_to_mutate, **getattr(signature, "parameters_to_mutate", {})}
    if mutated:
        raise _changes_buffer(min(mutated.values()).removeprefix("module."))
    if signature.user_inputs_to_mutate:
        raise UnsupportedOpError(
            "",
            "in-place update",
            "changes the image that forward was given",
            "write it as an operation with a result: x = x.clamp(0, 1)",
        )
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
                node = replace(node, target=torch.ops.aten.to.dtype, args=(node.args[0], node.dtype), kwargs={})
            nodes.append(node)
        elif isinstance(fx.meta.get("val"), (tuple, list)):
            tuples[fx.name] = _node(fx)
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    return Captured(inputs[0], (), bound, constants, shapes, tuple(nodes), outputs, out_spec, maps=tuple(inputs[1:]))


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


def _skeleton(module: nn.Module, fake: FakeTensorMode, batch_statistics: bool) -> nn.Module:
    """A copy of the module's structure with tensors that have no storage, norm layers with running statistics in eval mode.

    With `batch_statistics`, batch norm layers in training mode are copied without running statistics.
    """
    memo: dict[int, Any] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CAPTURE_DEVICE)

    for tensor in (*module.parameters(), *module.buffers()):
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty(tensor), tensor.requires_grad) if parameter else empty(tensor)
    for part in module.modules():
        own = list(part.__dict__.values())
        for value in pytree.tree_leaves([*own, *map(before_forward, own)]):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:  # results, pruned weights among them
                memo[id(value)] = mark_computed(empty(value))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # iterators will not always be copied
        skeleton = _copied(module, memo)
    for original, part in zip(module.modules(), skeleton.modules(), strict=True):
        for key, value in original.__dict__.items():
            if (before := before_forward(value)) is NOTHING:
                del part.__dict__[key]
            elif before is not value:
                part.__dict__[key] = copy.deepcopy(before, memo)
        if not isinstance(part, _NormBase) or not part.track_running_stats:
            continue
        if batch_statistics and part.training and isinstance(part, _BatchNorm):
            part.running_mean = part.running_var = part.num_batches_tracked = None
            part.track_running_stats = False
        else:
            part.training = False
        if isinstance(part, nn.SyncBatchNorm):  # it computes the same, and synchronises what is not computed here
            part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return skeleton


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy by way of `memo`, which shares what cannot be copied: locks, files, modules of Python, and what holds them."""
    shared = dict(memo)
    try:
        return copy.deepcopy(module, memo)
    except Exception:
        layers = {id(part): part for part in module.modules()}
        for leaf in pytree.tree_leaves([vars(part) for part in module.modules()]):
            try:
                copy.deepcopy(leaf, {**layers, **shared})
            except Exception:
                shared[id(leaf)] = leaf
    memo.clear()
    memo.update(shared)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UnsupportedOpError(
            "",
            "forward",
            f"cannot be captured, because the model cannot be copied ({type(error).__name__}: {error!s:.200})",
            "let copy.deepcopy(model) work, or stream only a part of the model for which it does",
        ) from error


def _refuse_regions(graph: torch.fx.Graph, autocast: bool) -> None:
    """Parts of forward under another grad mode or autocast state: inlining them would silently drop that state."""
    for fx in graph.nodes:
        if not isinstance(fx.target, torch._ops.HigherOrderOperator):
            continue
        if fx.target is torch.ops.higher_order.wrap_with_autocast and not autocast and not fx.args[2]:
            continue  # autocast switched off where it is off already
        region = next((node for node in graph.nodes if node.args and node.args[0] is fx), fx)
        remedy = "use .detach() on the result instead of no_grad, or move the region out of the streamed part"
        raise UnsupportedOpError(
            _module_path(region), fx.target.__name__, "runs a part of forward in another mode", remedy
        )


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
    return Node(
        fx.name,
        target,
        args,
        kwargs,
        (),
        torch.float32,
        None,
        _module_path(fx),
        _source(fx),
    )


# Out-of-place forms of in-place updates that have no derivative of their own.
_DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.copy.default: overwrite}


_LIKE_ANOTHER = (torch.ops.aten.type_as.default, torch.ops.aten.to.other)


def _named(node: Node, fx: torch.fx.Node) -> Node:
    value = fx.meta["val"]
    return replace(node, name=fx.name, shape=tuple(map(formula, value.shape)), dtype=value.dtype)


def _refs(value: Any) -> Any:
    if not isinstance(value, torch.fx.Node):
        return value
    number = value.meta.get("val")
    return formula(number) if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)) else Ref(value.name)


def _module_path(fx: torch.fx.Node) -> str:
    stack = fx.meta.get("nn_module_stack") or {}
    return next((str(path).removeprefix("module").removeprefix(".") for path, _ in reversed(stack.values())), "")


def _source(fx: torch.fx.Node) -> str:
    """File, line and code of the innermost frame outside of torch, where export recorded it."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', fx.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return "{}:{}: {}".format(*own[-1]) if own else ""
