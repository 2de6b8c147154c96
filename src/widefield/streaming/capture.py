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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.export import Dim
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CAPTURE_DEVICE, Captured, Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.trace import Formula, Trace, formula

_LOG = logging.getLogger(__name__)

_SYMBOLIC_LIMIT = 10.0  # seconds of computing after which a trace with symbols is given up for one without

_ONE_AT_A_TIME = threading.RLock()  # torch.export keeps its state for all threads

# Hooks of the caller (torch.utils.checkpoint has some) must not see the tensors that a capture saves.
_UNHOOKED = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@torch.inference_mode(False)
def capture(
    module: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    autocast: bool = False,
    batch_statistics: bool = False,
    symbolic: bool = True,
) -> Trace:
    """Trace `module` called on an image of `shape` (N, C, H, W) and `dtype`, to be run under autocast or not.

    `batch_statistics`: batch norm layers in training mode normalise by the batch, and not by their running statistics.
    `symbolic`: with symbols for height and width, if the module can be traced so.

    Raises `UnsupportedOpError` when the forward pass cannot be captured: control flow on pixel values, a buffer that is
    updated in forward, calls that leave PyTorch.
    """
    with _ONE_AT_A_TIME:
        if symbolic:
            try:
                trace = _capture(module, shape, dtype, autocast, batch_statistics, symbolic=True)
                if trace.at(*shape[2:]) is not None:
                    return trace
            except Exception as error:  # whatever the symbols are not good for; a fault of the module comes again
                _LOG.debug("no trace with symbols: %s", error)
        return _capture(module, shape, dtype, autocast, batch_statistics, symbolic=False)


def _capture(
    module: nn.Module,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    autocast: bool,
    batch_statistics: bool,
    symbolic: bool,
) -> Trace:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = _skeleton(module, fake, batch_statistics)
    with fake:
        image = torch.empty(shape, dtype=dtype, device=CAPTURE_DEVICE)
    watch = _Watch(autocast, time.thread_time() + _SYMBOLIC_LIMIT if symbolic else float("inf"))
    dynamic = ({2: Dim.AUTO, 3: Dim.AUTO},) if symbolic else None
    try:
        with torch.enable_grad(), _UNHOOKED, watch, torch.autocast(CAPTURE_DEVICE.type, enabled=False):
            program = torch.export.export(skeleton, (image,), dynamic_shapes=dynamic, strict=False)
            _refuse_regions(program.graph, autocast)
            program = program.run_decompositions({})  # removes in-place updates, decomposes nothing
    except UnsupportedOpError:
        raise
    except Exception as error:
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
        if not type(error).__module__.startswith("torch."):  # not the capture but the model: a wrong channel count, say
            raise ValueError(f"the model cannot run on an image of shape {shape}: {first_line}") from error
        raise UnsupportedOpError(
            "",
            "forward",
            f"could not be captured by torch.export ({type(error).__name__}: {first_line})",
            "remove control flow that depends on pixel values (.item(), if x.max() > 0) from forward, "
            "or stream only the part of the model before it",
        ) from error
    synchronised = frozenset(path for path, part in module.named_modules() if isinstance(part, nn.SyncBatchNorm))
    return _with_guards(program, replace(_captured(program), image_shape=shape, synchronised=synchronised))


def _captured(program: torch.export.ExportedProgram) -> Captured:
    """The program's operations, by names. Numbers that depend on the image's size are `Formula`s."""
    signature = program.graph_signature
    if signature.buffers_to_mutate:
        keys = sorted(set(signature.buffers_to_mutate.values()))
        raise UnsupportedOpError(
            keys[0].rpartition(".")[0],
            "in-place update",
            f"changes the buffer '{keys[0]}' in forward, which a tile-by-tile pass would repeat",
            "put the layer in evaluation mode, or move the update out of forward",
        )
    bound = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()}
    image_name, nodes, outputs, shapes = "", [], (), {}
    tuples: dict[str, Node] = {}
    skipped = len(signature.buffers_to_mutate) + len(signature.user_inputs_to_mutate)
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            value = fx.meta["val"]
            if isinstance(value, torch.Tensor):
                shapes[fx.name] = (tuple(map(formula, value.shape)), value.dtype)
            if fx.name in signature.user_inputs:
                image_name = fx.name
        elif fx.op == "output":
            outputs = tuple(_refs(value) for value in fx.args[0])[skipped:]
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
    return Captured(image_name, (), bound, constants, shapes, tuple(nodes), outputs, out_spec)


def _with_guards(program: torch.export.ExportedProgram, captured: Captured) -> Trace:
    """The trace with the conditions under which it holds."""
    size = captured.shapes[captured.image][0][2:]
    height, width = (n.expression if isinstance(n, Formula) else sympy.Integer(n) for n in size)
    if not (height.free_symbols or width.free_symbols):
        return Trace(captured, (height, width))
    image = next(fx for fx in program.graph.nodes if fx.name == captured.image).meta["val"]
    environment = image.fake_mode.shape_env
    guards = {environment.replace(guard.expr) for guard in environment.guards} - {sympy.true}
    ranges = {
        symbol: (limits.lower, limits.upper)
        for symbol, limits in environment.var_to_range.items()
        if symbol in height.free_symbols | width.free_symbols
    }
    return Trace(captured, (height, width), tuple(guards), ranges)


class _Watch(TorchFunctionMode):
    """Sees what a capture would lose.

    Weights that the model uses without owning them are refused: they would be frozen, and their gradients dropped. For a run
    under autocast, `x.float()` is kept as an operation even though it changes nothing in the capture, which is in float32. A
    capture that is not done at time `limit` is given up.
    """

    def __init__(self, autocast: bool, limit: float) -> None:
        super().__init__()
        self.autocast = autocast
        self.limit = limit

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.thread_time() > self.limit:
            raise TimeoutError
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not is_fake(leaf) and leaf.requires_grad and leaf.is_leaf:
                raise UnsupportedOpError(
                    "",
                    getattr(func, "__name__", str(func)),
                    f"uses a tensor of shape {tuple(leaf.shape)} that requires grad but is no parameter of the model",
                    "register it: assign it to the module as an nn.Parameter; keep modules in an nn.ModuleList, not in a list",
                )
        if self.autocast and func is torch.Tensor.float and args[0].dtype == torch.float32:
            return torch.ops.aten._to_copy.default(args[0], dtype=torch.float32)
        return func(*args, **(kwargs or {}))


def _skeleton(module: nn.Module, fake: FakeTensorMode, batch_statistics: bool) -> nn.Module:
    """A copy of the module's structure with tensors that have no storage, norm layers with running statistics in eval mode.

    With `batch_statistics`, batch norm layers in training mode are copied without running statistics.
    """
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        with fake:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CAPTURE_DEVICE)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for part in module.modules():
        for value in part.__dict__.values():  # weights that hooks recompute before each forward pass
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                with fake:
                    memo[id(value)] = torch.empty_like(value.detach(), device=CAPTURE_DEVICE)
    skeleton = copy.deepcopy(module, memo)
    for part in skeleton.modules():
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
    assert callable(fx.target)
    return Node(
        fx.name,
        _DIFFERENTIABLE.get(fx.target, fx.target),
        args,
        kwargs,
        (),
        torch.float32,
        None,
        _module_path(fx),
        _source(fx),
    )


def overwrite(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What `x` holds after `x.copy_(source)`."""
    return source.to(x.dtype).expand_as(x)


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
    return next((str(path) for path, _ in reversed(stack.values())), "")


def _source(fx: torch.fx.Node) -> str:
    """File, line and code of the innermost frame outside of torch, where export recorded it."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', fx.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return "{}:{}: {}".format(*own[-1]) if own else ""
