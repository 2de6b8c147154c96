"""Windows of a map through a module of the user's own: one operation with a window, a stride and parameters.

Outside of the engine `Local` is plain PyTorch. A capture sees one operation on the map and on all parameters and buffers of the
module, and what one window needs in memory. On a tile the module itself runs, on the windows that the tile completes, by ordinary
autograd: hooks, `autograd.Function`s and branches within it are exact, as long as no window depends on another.
"""

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from widefield.errors import WidefieldError
from widefield.streaming.skeleton import copied
from widefield.streaming.watch import Watch
from widefield.streaming.window_cost import WindowCost, window_cost

Partial = Literal["drop", "pad", "raise"]
# What calls of `Local` draw outside of the engine, in their order; in the comparison at first use.
GIVEN_DRAWS: ContextVar[Iterator["Draws | None"]] = ContextVar("GIVEN_DRAWS", default=iter(()))  # noqa: B039


class LocalError(WidefieldError, ValueError):
    """`Local` was given arguments, an image or a module that it cannot use."""


@dataclass(frozen=True)
class Windows:
    """The windows of a map: (height, width) of each, their strides, the padding at all borders, what becomes of partial ones."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    partial: Partial
    fill: float

    def counts(self, extent: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of windows of a map of this height and width. Raises LocalError."""
        rows, cols = (self._count(extent[axis], axis) for axis in (0, 1))
        return rows, cols

    def _count(self, length: int, axis: int) -> int:
        size, stride, padding = self.size[axis], self.stride[axis], self.padding[axis]
        length = length + 2 * padding
        if self.partial == "pad":
            if length <= size:
                return 1
            # With gaps, the last window is the last one that begins on the map.
            return -(-length // stride) if stride > size else -(-(length - size) // stride) + 1
        if length < size:
            raise LocalError(
                f"a map of {length - 2 * padding} {('rows', 'columns')[axis]} (padding {padding}) holds no window of {size}: "
                "pass a larger image, or partial='pad'"
            )
        if self.partial == "raise" and (length - size) % stride:
            raise LocalError(
                f"a map of {length - 2 * padding} {('rows', 'columns')[axis]} (padding {padding}) is not covered by windows of "
                f"{size} with stride {stride}: crop or pad it, or choose partial='drop' or 'pad'"
            )
        return (length - size) // stride + 1

    def padded(self, x: Tensor) -> Tensor:
        """Return a whole map (B, C, H, W) with the padding that its windows cover."""
        sides: list[int] = []
        for axis, count in reversed(list(enumerate(self.counts(x.shape[-2:])))):
            padding = self.padding[axis]
            covered = (count - 1) * self.stride[axis] + self.size[axis]
            sides += [padding, max(padding, covered - padding - x.shape[2 + axis])]
        return F.pad(x, sides, value=self.fill) if any(sides) else x

    def of(self, x: Tensor) -> Tensor:
        """Return the windows (B, rows, columns, C, h, w) of a padded map, as a view."""
        views = x.unfold(2, self.size[0], self.stride[0]).unfold(3, self.size[1], self.stride[1])
        return views.permute(0, 2, 3, 1, 4, 5)


@dataclass(frozen=True)
class Draws:
    """Random numbers of windows, each with a seed of its own: a hash of `seed`, the operation's `name` and the window's place.

    So neither the tile size nor a second pass changes them. `first` are the row and the column of the first window.
    """

    seed: int
    name: str
    first: tuple[int, int] = (0, 0)

    def run(self, module: nn.Module, window: Tensor, batch: int, row: int, col: int) -> Any:
        """Return `module(window)` for one window (1, C, h, w); its place is counted from the first one."""
        place = f"{self.seed} {self.name} {batch} {row + self.first[0]} {col + self.first[1]}"
        seed = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest())
        device = window.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                with torch.get_device_module(device).device(device):
                    torch.get_device_module(device).manual_seed(seed)
            return module(window)


def _run(
    module: nn.Module, x: Tensor, windows: Windows, chunk: int, draws: Draws | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """The results of `module` for all windows of a padded map: (B, D, rows, columns), with the shape of one result."""
    views = windows.of(x)
    batch, rows, cols = views.shape[:3]
    if draws is None:
        results = [_checked(module(part), len(part)) for part in views.flatten(0, 2).split(chunk)]
    else:
        places = itertools.product(range(batch), range(rows), range(cols))
        results = [_checked(draws.run(module, views[b, i, j][None], b, i, j), 1) for b, i, j in places]
    made = results[0] if len(results) == 1 else torch.cat(results)
    return made.reshape(batch, rows, cols, -1).permute(0, 3, 1, 2), tuple(made.shape[1:])


def _checked(result: Any, count: int) -> Tensor:
    if not isinstance(result, Tensor) or result.ndim not in (2, 4) or result.shape[0] != count:
        given = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise LocalError(
            f"the module of Local must give a vector (N, D) or a small map (N, D, a, b) for {count} windows, got {given}: "
            "choose one token, pool the tokens or reshape them"
        )
    return result


def _side_by_side(x: Tensor, result: tuple[int, ...]) -> Tensor:
    """Lay small maps (D, a, b), which stand in the channels of `x`, side by side: (B, D, rows * a, columns * b)."""
    if len(result) == 1:
        return x
    channels, a, b = result
    if a == b:
        return F.pixel_shuffle(x, a) if a > 1 else x
    batch, _, rows, cols = x.shape
    if b > 1:
        x = x.reshape(batch, channels * a, b, rows, cols).permute(0, 1, 3, 4, 2).reshape(batch, -1, rows, cols * b)
    if a > 1:
        x = x.reshape(batch, channels, a, rows, cols * b).permute(0, 1, 3, 2, 4).reshape(batch, -1, rows * a, cols * b)
    return x


class Local(nn.Module):
    """A module applied to every window of an image or map, and the map of its results.

    `Local(encoder, 224)` cuts (B, C, H, W) into windows, runs `encoder` on (N, C, 224, 224) and puts its vectors (N, D) at their
    places: (B, D, rows, columns). Small maps (N, D, a, b) are laid side by side: (B, D, rows * a, columns * b). It is plain
    PyTorch; within `stream(...)` it is one operation, of which a step computes the windows of a tile, with the same results
    and gradients. Windows must not depend on each other.

    Args:
        module: takes a batch of windows (N, C, h, w), gives (N, D) or (N, D, a, b).
        window: height and width of a window in pixels, or one number for both.
        stride: distance of two windows; None: that of the window. Smaller ones overlap, larger ones leave gaps.
        padding: rows and columns of `fill` around the map, less than a window.
        partial: what becomes of windows that go beyond the lower and right border: "drop", "pad" them with `fill`, or "raise" an
            error where there are any.
        fill: the value of padding.
        chunk: the most windows that go through the module at a time.

    Raises:
        LocalError: for arguments that cannot be used; when called, for a map that holds no window, and for other results.

    Examples:
        >>> encoder = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> Local(encoder, 64)(torch.rand(1, 3, 200, 300)).shape
        torch.Size([1, 8, 3, 4])
    """

    def __init__(
        self,
        module: nn.Module,
        window: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        *,
        partial: Partial = "drop",
        fill: float = 0.0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise LocalError(f"module must be a torch.nn.Module, got {type(module).__name__}: {module!r:.100}")
        size = _pair("window", window, 1)
        sides = _pair("padding", padding, 0)
        if any(side >= length for side, length in zip(sides, size, strict=True)):
            raise LocalError(f"padding={padding!r} must be smaller than the window, {size}")
        if partial not in ("drop", "pad", "raise"):
            raise LocalError(f"partial={partial!r} must be 'drop', 'pad' or 'raise'")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise LocalError(f"chunk={chunk!r} must be a positive int, a number of windows")
        self.module = module
        self.windows = Windows(
            size, size if stride is None else _pair("stride", stride, 1), sides, partial, float(fill)
        )
        self.chunk = chunk

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in vars(self.windows).items())

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise LocalError(f"expected an image or map (B, C, H, W), got a tensor of shape {tuple(x.shape)}")
        watch = next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, Watch)), None)
        if watch is not None:
            return self._captured(watch, x)
        draws = next(GIVEN_DRAWS.get(), None)
        with _disable_current_modes() if draws else nullcontext():
            return _side_by_side(*_run(self.module, self.windows.padded(x), self.windows, self.chunk, draws))

    def _captured(self, watch: Watch, x: Tensor) -> Tensor:
        """The result in a capture: of one operation."""
        module = vars(self)["_modules"]["module"]  # itself, and not what torch.export may show in its place
        _refuse_batch_statistics(watch, module)
        self.windows.counts(x.shape[-2:])
        tensors = _tensors(module)
        watch.mode_dependent = True
        trains = [x.requires_grad, *(tensor.requires_grad for tensor in tensors)]
        given = (len(tensors) + 1) * [False] if not torch.is_grad_enabled() else trains

        def bind(weights: Sequence[Tensor]) -> nn.Module:
            bound = _bound(module, weights)
            bound.register_forward_hook(lambda part, args, result: _checked(result, len(args[0])))
            return bound

        shape = int(x.shape[1]), *self.windows.size
        cost = window_cost(bind, shape, x.dtype, tensors, given, watch)
        call = LocalCall(module, self.windows, self.chunk, cost, torch.is_grad_enabled() and not any(trains))
        result = torch.ops.widefield.local([x, *tensors], call.record(watch))
        return _side_by_side(result, cost.result)


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in pair)
    ):
        raise LocalError(f"{name}={value!r} must be an int of at least {least}, or two of them: (height, width)")
    return pair[0], pair[1]


def _refuse_batch_statistics(watch: Watch, module: nn.Module) -> None:
    for path, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise watch.refusal(
                f"the batch norm layer '{path}' of a module on windows",
                "normalises by the statistics of a batch of windows, so that windows depend on each other",
                "leave batch_statistics='frozen' and give it running statistics, or use layer or group norm",
            )


_CONTAINERS = (dict, OrderedDict, list, set)
_REGISTERED = ("_parameters", "_buffers", "_modules")


def _tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in named]


def _bound(module: nn.Module, tensors: Sequence[Tensor]) -> nn.Module:
    """A copy of `module` that has `tensors` in the place of its parameters and buffers.

    It holds them as long as it lives: whatever runs again in the backward pass (`torch.utils.checkpoint`) finds them.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if type(value) in _CONTAINERS and not value:  # of hooks, mostly, which take most of the time of a copy
                memo[id(value)] = type(value)()
            elif name not in _REGISTERED:
                memo.update({id(leaf): leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)})
    memo.update({id(own): tensor for own, tensor in zip(_tensors(module), tensors, strict=True)})
    return copied(module, memo)


@dataclass(frozen=True, eq=False)
class LocalCall:
    """One call of a `Local` that was captured: its module, whose tensors are given, the windows, what one needs in memory.

    `frozen`: nothing that it reads requires grad, in a pass with gradients.
    """

    module: nn.Module
    windows: Windows
    chunk: int
    cost: WindowCost
    frozen: bool

    tags: ClassVar = ()
    captured: ClassVar[WeakValueDictionary[int, "LocalCall"]] = WeakValueDictionary()
    numbers: ClassVar = itertools.count()

    @property
    def __name__(self) -> str:
        return "Local"

    def record(self, watch: Watch) -> int:
        """Return the number by which a capture finds this call."""
        number = next(self.numbers)
        self.captured[number] = self
        watch.held.append(self)
        return number

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """The results on a whole map."""
        return self.on_padded(self.windows.padded(x), tensors)

    def on_padded(self, x: Tensor, tensors: Sequence[Tensor], draws: Draws | None = None) -> Tensor:
        """Return the results (B, D, rows, columns) for all windows of a map that is padded."""
        return _run(_bound(self.module, tensors), x, self.windows, self.chunk, draws if self.cost.draws else None)[0]


@torch.library.custom_op("widefield::local", mutates_args=())
def _local(tensors: list[Tensor], call: int) -> Tensor:
    return LocalCall.captured[call](*tensors)


@_local.register_fake
def _(tensors: list[Tensor], call: int) -> Tensor:
    found, x = LocalCall.captured[call], tensors[0]
    channels = 1
    for size in found.cost.result:
        channels *= size
    return x.new_empty((x.shape[0], channels, *found.windows.counts(x.shape[-2:])), dtype=found.cost.dtype)
