"""Trust, but verify: a module that is streamed for the first time is run once, streamed and plain, on a small image.

Compared are all outputs and, where gradients are enabled, the gradients of a random weighting of them with respect to every
parameter (and the image, if it requires grad), in the module's own dtype and modes, under the caller's autocast and grad mode.
Random numbers are the same in both: the plain run is given the masks of the streamed one. Differences are Euclidean norms
relative to the plain result. Above a tolerance that fits the dtype they are compared with what the plain result itself changes
by when the image is rounded differently.

The plain run is that of the user's module, so that hooks, caches and whatever else it holds take part. Everything is as before
then: random states, buffers, modes, attributes of the modules, globals and caches. No `.grad` is touched.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from widefield.streaming.captured import Node
from widefield.streaming.errors import VerificationError
from widefield.streaming.fingerprint import Surroundings
from widefield.streaming.rules.random import keep_mask

_LOG = logging.getLogger(__name__)
aten = torch.ops.aten

# Sizes that are tried, in this order: odd ones first, then what networks with a fixed stride or window ask for.
SIZES = ((67, 75), (64, 96), (96, 128), (128, 160), (224, 224), (256, 256), (384, 384), (512, 512))
# Relative differences by the bytes of the dtype: those that rounding alone explains, and those that it never does.
_TOLERANCE = {8: (1e-9, 1e-5), 4: (1e-4, 1e-2), 2: (5e-2, 0.3)}
_OF_ROUNDING = 100  # times what the plain result changes by when the image changes by a few units in the last place
_FLOOR = 1e-3  # gradients are compared with at least this share of the largest one: that of a bias before a norm layer is noise


@dataclass(frozen=True)
class Run:
    """Outputs of a module (all leaves, and their structure) and gradients by name ("" for the image)."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    gradients: dict[str, Tensor]


def verify(
    module: nn.Module,
    streamed: Callable[[Tensor], Any],
    image: Tensor,
    masks: Sequence[Node],
    draws_seed: bool,
    frozen: Sequence[nn.Module],
    digits: int,
) -> None:
    """Compare `streamed(image)` with `module(image)`, outputs and gradients.

    Args:
        module: the plain module.
        streamed: the same, streamed.
        image: what both are called on, (N, C, H, W).
        masks: the operations that draw random masks when streamed, in order.
        draws_seed: `streamed` draws one number for a seed first.
        frozen: norm layers of `module` to be run in evaluation mode.
        digits: bytes of the dtype that numbers are computed in, which says how equal they are to be.

    Raises:
        VerificationError: they differ by more than rounding explains.
        Exception: whatever the plain module raises on this image.
    """
    with _restoring(module, frozen):
        torch.manual_seed(0)
        seed = int(torch.randint(2**63 - 1, ()).item()) if draws_seed else 0

        def plain(at: Tensor) -> Run:
            torch.manual_seed(0)
            if draws_seed:
                torch.randint(2**63 - 1, ())
            with _Masks(masks, seed):
                return _run(module, module, at)

        expected = plain(image)
        torch.manual_seed(0)
        found = _run(streamed, module, image)
        usual, most = _TOLERANCE[digits]
        errors = _errors(found, expected)
        worst = max(errors, key=lambda name: errors[name], default="")
        error = errors.get(worst, 0.0)
        if error <= usual:
            return
        if error <= most:
            shaken = image * (1 + 8 * torch.finfo(image.dtype).eps * torch.sign(torch.randn_like(image)))
            rounding = max(_errors(plain(shaken.detach().requires_grad_(image.requires_grad)), expected).values())
            if error <= min(_OF_ROUNDING * rounding, most):
                return
        again = max(_errors(plain(image), expected).values(), default=0.0)
        if again > usual:
            _LOG.warning(
                "%s could not be verified: two plain runs on the same image differ by %.1e",
                type(module).__name__,
                again,
            )
            return
        raise _difference(module, worst, error, found, expected)


def _run(call: Callable[[Tensor], Any], module: nn.Module, image: Tensor) -> Run:
    """One forward pass; where gradients are enabled, one backward pass."""
    leaves, spec = pytree.tree_flatten(call(image))
    generator = torch.Generator().manual_seed(1)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=generator).to(leaf)).sum()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    named = {"": image, **dict(module.named_parameters())}
    wanted = {name: x for name, x in named.items() if x.requires_grad and torch.is_grad_enabled()}
    gradients: dict[str, Tensor] = {}
    if terms and wanted:
        total = torch.stack([term.double() for term in terms]).sum()
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        gradients = {name: g.detach() for name, g in zip(wanted, found, strict=True) if g is not None}
    return Run(tuple(x.detach() if isinstance(x, Tensor) else x for x in leaves), spec, gradients)


def _errors(found: Run, expected: Run) -> dict[str, float]:
    """Relative differences: of outputs by "output 0", of gradients by "gradient of NAME"."""
    if found.spec != expected.spec:
        return {"structure of the result": torch.inf}
    errors: dict[str, float] = {}
    for k, (f, e) in enumerate(zip(found.leaves, expected.leaves, strict=True)):
        if isinstance(f, Tensor) and isinstance(e, Tensor):
            errors[f"output {k}"] = _error(f, e)
        else:
            errors[f"output {k}"] = 0.0 if isinstance(f, type(e)) and f == e else torch.inf
    largest = max((_norm(g) for name, g in expected.gradients.items() if name), default=0.0)
    for name in {**expected.gradients, **found.gradients}:
        f, e = found.gradients.get(name), expected.gradients.get(name)
        given = f if f is not None else e
        assert given is not None
        f, e = (torch.zeros_like(given) if x is None else x for x in (f, e))  # none and zero mean the same
        errors[f"gradient of {name or 'the image'}"] = _error(f, e, _FLOOR * largest if name else 0.0)
    return errors


def _error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    if found.shape != expected.shape:
        return torch.inf
    if not expected.is_floating_point():
        return (found != expected).double().mean().item() if found.numel() else 0.0
    f, e = found.double(), expected.double()
    if not torch.equal(f.isfinite(), e.isfinite()):
        return torch.inf
    difference = _norm((f - e).nan_to_num(0.0, 0.0, 0.0))
    return difference / max(_norm(e.nan_to_num(0.0, 0.0, 0.0)), floor, 1e-300) if difference else 0.0


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item() if x.numel() else 0.0


def _difference(module: nn.Module, worst: str, error: float, found: Run, expected: Run) -> VerificationError:
    """The error for a difference: in words, with the two numbers that differ most."""
    f: Any
    e: Any
    path = ""
    kind, _, name = worst.partition(" of ")
    if kind == "gradient":
        name = "" if name == "the image" else name
        f, e = found.gradients.get(name), expected.gradients.get(name)
        path = name.rpartition(".")[0]
    elif worst.startswith("output "):
        f, e = (run.leaves[int(worst.split()[1])] for run in (found, expected))
    else:
        f, e = found.spec, expected.spec
    if isinstance(f, Tensor) and isinstance(e, Tensor) and f.shape == e.shape and f.numel():
        at = int((f.double() - e.double()).abs().nan_to_num(torch.inf).argmax())
        numbers = f"{f.reshape(-1)[at].item():.6g} streamed, {e.reshape(-1)[at].item():.6g} plain"
    else:
        numbers = f"{_about(f)} streamed, {_about(e)} plain"
    return VerificationError(
        path,
        type(module).__name__,
        f"gives another result: the {worst} differs by {error:.1e} ({numbers}) on a small image",
        "forward does something that its capture does not see (a hook, a cache, a setting from elsewhere): remove it, or run this "
        "model on whole images. If it does no such thing, please report the model as a bug; verify=False turns this check off",
    )


def _about(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"


class _Masks(TorchDispatchMode):
    """Gives the plain run the masks that the streamed one draws, operation by operation."""

    def __init__(self, nodes: Sequence[Node], seed: int) -> None:
        super().__init__()
        self.nodes, self.seed = iter(nodes), seed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten.bernoulli_.float, aten.bernoulli.p) and (node := next(self.nodes, None)) is not None:
            x, p = args[0], float(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
            mask = keep_mask(p, self.seed, node.name, x.shape, [0] * x.ndim, x.device).to(x.dtype)
            return x.copy_(mask) if func is aten.bernoulli_.float else mask
        if func is aten.native_dropout.default and args[2] and (node := next(self.nodes, None)) is not None:
            x, p = args[0], float(args[1])
            mask = keep_mask(1 - p, self.seed, node.name, x.shape, [0] * x.ndim, x.device)
            return x * (mask.to(x.dtype) / (1.0 - p)), mask
        return func(*args, **kwargs)


def masks_of(nodes: Sequence[Node]) -> list[Node]:
    """The operations among `nodes` that draw a mask when they run."""

    def draws(node: Node) -> bool:
        if node.op in ("aten.dropout", "aten.native_dropout") and node.pick in (None, 0):
            return 0.0 < float(node.args[1]) < 1.0 and (node.args[2] if len(node.args) > 2 else True) is not False
        return node.target is aten.bernoulli.p

    return [node for node in nodes if draws(node)]


@contextmanager
def _restoring(module: nn.Module, frozen: Sequence[nn.Module]) -> Iterator[None]:
    """Run norm layers as the engine defines them, and leave everything as it was."""
    surroundings = Surroundings(module)
    attributes = [(part, dict(part.__dict__)) for part in module.modules()]
    buffers = [
        (buffer, buffer.clone())
        for part in module.modules()
        if isinstance(part, _NormBase)
        for buffer in part.buffers()
    ]
    states = random.getstate(), np.random.get_state()
    norms = [part for part in module.modules() if isinstance(part, _NormBase)]
    devices = list({p.device.index for p in module.parameters() if p.is_cuda})
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
            for part in frozen:
                part.training = False
            for part in norms:
                stack.callback(part.register_forward_hook(_with_plain_gradient).remove)
            yield
    finally:
        for part, own in attributes:
            part.__dict__.clear()
            part.__dict__.update(own)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        surroundings.restore()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.clear_autocast_cache()


def _with_plain_gradient(layer: nn.Module, inputs: Any, output: Any) -> None:
    """On the CPU, PyTorch's batch norm is wrong for a gradient of a single image with a small first stride (torch 2.15)."""
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
