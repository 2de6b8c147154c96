"""Trust, but verify: a module that is streamed for the first time is run, streamed and plain, on a small image.

Compared are all outputs and, where gradients are enabled, the gradients of a random weighting of them with respect to every
parameter (and the image, if it requires grad), in the module's own dtype and modes, under the caller's autocast and grad mode, but
without TensorFloat32, which rounds too coarsely to tell a fault.
Random numbers are the same in both: the plain run is given the masks of the streamed one. Differences are Euclidean norms
relative to the plain result. Above a tolerance that fits the dtype they are compared with what the plain result itself changes
by when the image is rounded differently.

The plain runs (two forward passes, and one with its backward pass) are of the user's module, so that hooks, caches and whatever
else it holds take part. Everything is as before then: random states, buffers, modes, attributes of the modules, globals and
caches. No `.grad` is touched.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from widefield.errors import WidefieldError
from widefield.streaming.capture import full_float32
from widefield.streaming.captured import CallKind, MapInput, Node
from widefield.streaming.comparison import (
    Difference,
    Outcome,
    contiguous_gradient,
    largest_difference,
    outcome,
    relative_error,
)
from widefield.streaming.errors import UnsupportedOpError, VerificationError
from widefield.streaming.execution import on_whole_maps
from widefield.streaming.fingerprint import Surroundings
from widefield.streaming.local import GIVEN_DRAWS, Draws, LocalCall
from widefield.streaming.program import Program
from widefield.streaming.program_cache import forget
from widefield.streaming.rules.random import dropped, drops, keep_mask
from widefield.streaming.running import bind
from widefield.streaming.watch import Inlined

if TYPE_CHECKING:
    from widefield.streaming.module import StreamingCNN

_LOG = logging.getLogger(__name__)
aten = torch.ops.aten

# Sizes that are tried, those with a program first: odd ones, then what networks with a fixed stride or window ask for.
SIZES = ((67, 75), (64, 96), (96, 128), (128, 160), (224, 224), (256, 256), (384, 384), (512, 512))
# Relative differences by the bytes of the dtype: those that rounding alone explains, and those that it never does.
TOLERANCES = {8: (1e-9, 1e-5), 4: (1e-3, 3e-2), 2: (5e-2, 0.3)}
# By how many units in the last place the image and the weighting of the outputs change, and how many times what the plain result
# then changes by is still rounding: no more for large changes than for small ones where the result follows smoothly. But large ones
# also turn a ReLU on or off whose input is nearly 0. In 16 bits they would be as large as the image.
_SHAKEN = {8: ((8, 100), (64, 10), (512, 1.5)), 4: ((8, 100), (64, 10), (512, 1.5)), 2: ((8, 100),)}


# Kinds of programs that were compared with the plain module, those used last at the end.
_VERIFIED: dict[Any, None] = {}
_MOST_VERIFIED = 32


class PlainFailsError(WidefieldError):
    """The plain module does not run on an image of this size."""


def verify_at_first_use(network: "StreamingCNN", program: Program, call: CallKind) -> None:
    """Compare `network` with its plain module on a small image, once for each batch size, dtype, structure and grad mode.

    Args:
        network: the streamed module.
        program: what it executes.
        call: how it is called. The small image has as many channels, small maps have the same share of its height and width, and
            whole numbers in them are 0 or 1, which are labels to every loss.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    key = program.kind, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), call.requires_grad
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if program.captured.synchronised and distributed:  # processes would wait for each other
        return
    if key in _VERIFIED:
        _VERIFIED[key] = _VERIFIED.pop(key)
        return
    started = time.perf_counter()
    height, width = call.size
    alike = (height % 64 + 64, width % 64 + 64)  # what decides by the remainder of a size decides here as there
    sizes = sorted((*SIZES, alike), key=lambda size: not network._programs.holds(program, call.at(size)))
    if height * width <= 512**2:
        sizes.append((height, width))
    reasons = []
    postponed = set[tuple[int, int]]()  # sizes at which a `Local` has one window, so that windows meet no others
    for size in sizes:
        small, its_call = network._alike((-(-size[0] // 2), -(-size[1] // 2))), call.at(size)
        generator = torch.Generator("cpu").manual_seed(0)
        pixels = torch.rand(its_call.shape, generator=generator, device="cpu").to(call.device, call.dtype)
        image = network.normalisation.unchecked(pixels, call.dtype).requires_grad_(call.image_requires_grad)
        try:
            own = small._program(its_call)
        except (UnsupportedOpError, ValueError) as error:  # at this size only
            reasons.append(f"{size}: {error}")
            continue
        if size not in postponed and any(_has_one_window(node) for node in own.captured.nodes):
            postponed.add(size)
            sizes.append(size)
            continue
        try:
            maps = [_drawn(x, generator, call.device) for x in its_call.map_inputs]
            verify(small, image, own, (call.autocast or call.dtype).itemsize, maps)
        except PlainFailsError as error:
            reasons.append(f"{size}: {error}")
            continue
        _LOG.info("streamed results verified on %s pixels in %.1f s", size, time.perf_counter() - started)
        break
    else:
        _LOG.warning("could not be verified on a small image: %.500s", "; ".join(reasons))
    _VERIFIED[key] = None
    forget(_VERIFIED, _MOST_VERIFIED)


def _has_one_window(node: Node) -> bool:
    return isinstance(node.target, LocalCall) and node.shape[2] * node.shape[3] == 1


def _drawn(given: MapInput, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return a random map: numbers from 0 to 1."""
    numbers = torch.rand(given.shape, generator=generator, device="cpu")
    numbers = numbers if given.dtype.is_floating_point else numbers.round()
    return numbers.to(device, given.dtype).requires_grad_(given.requires_grad)


def verify(
    streamed: "StreamingCNN", image: Tensor, program: Program, itemsize: int, maps: Sequence[Tensor] = ()
) -> None:
    """Compare `streamed(image, *maps)` with `streamed.module(image, *maps)`, outputs and gradients.

    Args:
        streamed: the streamed module.
        image: what both are called on, (N, C, H, W).
        program: what `streamed` executes on it.
        itemsize: bytes of the dtype that numbers are computed in, which says how equal they are to be.
        maps: what else both are called on.

    Raises:
        VerificationError: they differ by more than rounding explains.
        PlainFailsError: the plain module raises on this image.
    """
    passes, (usual, most) = _Passes(streamed, image, program, maps), TOLERANCES[itemsize]
    module = streamed.module
    try:
        first, second = passes.two(module, again=True)
    except Exception as failure:
        raise PlainFailsError(f"{type(failure).__name__}: {failure}") from failure
    if (worst := largest_difference(second, first)).error > usual:
        raise _error(module, worst, "forward passes on the same image differ from each other", _STATE)
    if program.captured.attributes:
        plain, tiled = passes.two(module, again=False)[1], passes.two(streamed, again=False)[1]
        if (worst := largest_difference(tiled, plain)).error > usual:
            raise _error(module, worst, "gives another result in the second forward pass", _UNSEEN)
    expected = passes.one(module, image)
    worst = largest_difference(passes.one(streamed, image), expected)
    if usual < worst.error <= most:
        shaken = _SHAKEN[image.dtype.itemsize]
        usual = min(max(times * passes.of_rounding(expected, units) for units, times in shaken), most)
    if worst.error > usual:
        raise _error(module, worst, "gives another result", _UNSEEN, passes.where_it_begins(usual))


_STATE = (
    "forward depends on something that changes (a counter, random numbers of Python or NumPy): keep such state in an "
    "attribute of the module, draw with torch, or run this model on whole images"
)
_UNSEEN = (
    "forward does something that its capture does not see (a hook, a cache, a setting from elsewhere): remove it, or run "
    "this model on whole images. If it does no such thing, please report it as a bug; verify=False turns this check off"
)


def _error(module: nn.Module, worst: Difference, what: str, remedy: str, where: str = "") -> VerificationError:
    """The error for a difference, with the two numbers that differ most."""
    f, e = worst.found, worst.expected
    if isinstance(f, Tensor) and isinstance(e, Tensor) and f.shape == e.shape and f.numel():
        at = int((f.double() - e.double()).abs().nan_to_num(torch.inf).argmax())
        f, e = (f"{x.reshape(-1)[at].item():.6g}" for x in (f, e))
    f, e = (f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"{x!s:.60}" for x in (f, e))
    numbers = f"{f} streamed, {e} plain" if remedy is _UNSEEN else f"{e}, then {f}"
    return VerificationError(
        worst.name.rpartition(".")[0] if worst.kind == "gradient" else "",
        type(module).__name__,
        f"{what}: the {worst} differs by {worst.error:.1e} ({numbers}) on a small image{where}",
        remedy,
    )


class _Passes:
    """Passes of a streamed module and of its plain one, with the same random numbers, that leave everything as it was."""

    def __init__(self, streamed: "StreamingCNN", image: Tensor, program: Program, maps: Sequence[Tensor]) -> None:
        self.streamed, self.image, self.program, self.maps = streamed, image, program, maps
        self.module, self._frozen, self._masks = streamed.module, streamed.frozen_norms, _masks_of(program)

    def one(self, network: nn.Module, at: Tensor, scale: float = 1.0) -> Outcome:
        """Run a forward pass at the image `at`, and its backward pass where gradients are enabled, from weights times `scale`."""
        with _restoring(self.module, self._frozen):
            return outcome(self._call(network, at), self.module, at, self.maps, scale=scale)

    def of_rounding(self, expected: Outcome, units: int) -> float:
        """Return how much the plain result differs from what is `expected` where the image changes by `units` in the last place,
        and lies in channels_last, and all gradients are scaled by as much.
        """
        generator, change = torch.Generator("cpu").manual_seed(units), units * torch.finfo(self.image.dtype).eps
        signs = torch.randint(0, 2, self.image.shape, generator=generator, device="cpu").to(self.image) * 2 - 1
        shaken = (self.image.detach() * (1 + change * signs)).contiguous(memory_format=torch.channels_last)
        shaken.requires_grad_(self.image.requires_grad)
        return largest_difference(self.one(self.module, shaken, 1 + change), expected).error

    def two(self, network: nn.Module, again: bool) -> tuple[Outcome, Outcome]:
        """Run two forward passes, the second with the modules' attributes as they were (`again`) or as the first left them."""
        with _restoring(self.module, self._frozen):
            attributes = _attributes(self.module)
            first = outcome(self._call(network, self.image), self.module, self.image, outputs_only=True)
            if again:
                _put_back(attributes)
            return first, outcome(self._call(network, self.image), self.module, self.image, outputs_only=True)

    def where_it_begins(self, tolerance: float) -> str:
        """In words, the first layer whose result is another in the capture, or the last whose gradient is; "" if none is.

        If the capture agrees on whole maps, the fault is in the streaming, and the answer is "".
        """
        made: dict[str, Tensor] = {}
        versions: dict[str, int] = {}

        def keep(path: str, part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[path], versions[path] = output, output._version

        with _restoring(self.module, self._frozen), ExitStack() as stack:
            for path, part in self.module.named_modules():
                if path:
                    stack.callback(part.register_forward_hook(partial(keep, path)).remove)
            result = self._call(self.module, self.image)
            stack.close()
            try:
                values = bind(self.module, self.program, self.image.device)
                found = on_whole_maps(self.program, [self.image, *self.maps], values)
                both = [
                    path
                    for path, output in made.items()  # less those that were changed in place
                    if path in found and found[path].shape == output.shape and output._version == versions[path]
                ]
                for path in both:
                    if relative_error(found[path].detach(), made[path].detach()) > tolerance:
                        return f"; it begins at the result of layer '{path}'"
                ours, theirs = (
                    outcome(outputs, self.module, self.image, wanted={path: maps[path] for path in both}).gradients
                    for outputs, maps in ((found[""], found), (result, made))
                )
            except Exception as error:  # no more than an explanation is lost
                _LOG.debug("where it begins is not known: %s", error)
                return ""
        for path in reversed(both):
            if path in theirs and (path not in ours or relative_error(ours[path], theirs[path]) > tolerance):
                return f"; it begins between the result of layer '{path}' and the output, in the gradient"
        return ""

    def _call(self, network: nn.Module, at: Tensor) -> Any:
        torch.manual_seed(0)
        if network is self.streamed:
            return network(at, *self.maps)
        seed = int(torch.randint(2**63 - 1, (), device="cpu").item()) if self.program.random else 0
        with _Masks(self._masks, seed), _drawing(self.program, seed), ExitStack() as stack:
            for part in self.module.modules():
                if isinstance(part, _NormBase):
                    stack.callback(part.register_forward_hook(contiguous_gradient).remove)
            return network(at, *self.maps)


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
            return dropped(args[0], node, self.seed, [0] * args[0].ndim)
        return func(*args, **kwargs)


def _masks_of(program: Program) -> list[Node]:
    """Return the operations of `program` that draw a mask, in order."""
    return [
        node
        for node in program.captured.nodes
        if node.target is aten.bernoulli.p or (drops(node) and node.pick != 1 and float(node.args[1]) < 1.0)
    ]


@contextmanager
def _drawing(program: Program, seed: int) -> Iterator[None]:
    """Give the windows of each `Local` of the plain run the random numbers of the streamed one."""
    in_stages = {value.name for stage in program.stages for value in stage.values}
    calls = [(node.name, node.target) for node in program.captured.nodes if isinstance(node.target, LocalCall)]
    draws = [Draws(seed, name) if name in in_stages and call.cost.draws else None for name, call in calls]
    token = GIVEN_DRAWS.set(iter(draws))
    try:
        yield
    finally:
        GIVEN_DRAWS.reset(token)


@contextmanager
def _restoring(module: nn.Module, frozen: Sequence[nn.Module]) -> Iterator[None]:
    """Run norm layers as the engine defines them, and leave everything as it was."""
    surroundings = Surroundings(module)
    attributes = _attributes(module)
    buffers = [
        (buffer, buffer.clone())
        for part in module.modules()
        if isinstance(part, _NormBase)
        for buffer in part.buffers()
    ]
    devices = list({p.device.index for p in module.parameters() if p.is_cuda})
    try:
        with full_float32(), ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            # it cannot be differentiated by grad()
            stack.enter_context(patch.object(checkpoint, "CheckpointFunction", Inlined))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x))
            for part in frozen:
                part.training = False
            yield
    finally:
        _put_back(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        surroundings.restore()
        torch.clear_autocast_cache()


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(part, dict(part.__dict__)) for part in module.modules()]


def _put_back(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for part, own in attributes:
        part.__dict__.clear()
        part.__dict__.update(own)
