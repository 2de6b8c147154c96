"""The ways in which `widefield bench` runs a network, plain, streamed and as peers do it, and a comparison of them."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from widefield.cli.measuring import Timed, measure, timed
from widefield.errors import WidefieldError
from widefield.streaming import StreamingCNN, stream
from widefield.streaming.store import Place

What = Literal["step", "forward"]
Run = Callable[[Any], Any]
_WINDOW = 512  # pixels, of MONAI's sliding window
_SWITCH = "set_grad_checkpointing"  # as models of timm have it
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """A way to run a network.

    Attributes:
        how: "plain", "checkpoint" (`torch.utils.checkpoint`), "compiled" (`torch.compile`), "streamed", "lightstream",
            "sliding window" (of MONAI) or "tiling" (of diffusers).
        budget: Of a streamed one: its memory budget in bytes. None: that of `widefield.stream`.
        maps: Of a streamed one: where maps between stages live. None: as the plan has it.
        window: Pixels of a tile along each side, of lightstream and of the sliding window.
    """

    how: str = "plain"
    budget: int | None = None
    maps: Place | None = None
    window: int | None = None


class Ways:
    """One network and its runs: those that are streamed share what was captured, peers have copies."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.streamed = stream(model)
        self._runs: dict[Way, Run] = {Way(): model}

    def run(self, way: Way) -> Run:
        """Return what is called with an image."""
        if way.how == "streamed":
            return lambda image: self._with(way)(image)
        if way not in self._runs:
            self._runs[way] = _MAKERS[way.how](self.model, way.window)
        return self._runs[way]

    def plan(self, way: Way, shape: tuple[int, ...], what: What, dtype: str) -> dict[str, Any]:
        """Return what the plan of a streamed pass says; raises ValueError for a budget that cannot work."""
        with _grad_mode(what), _autocast(self.model, dtype):
            plan = self._with(way).plan(shape)
        return {
            "predicted_bytes": plan.total_bytes,
            "predicted_overhead": round(plan.predicted_overhead, 4),
            "tile": list(plan.tile_size),
            "steps": plan.steps,
            "stages": plan.stages,
            "maps": plan.map_place if plan.map_bytes else None,
            "carries": plan.carry_place,
            "streamed_fraction": round(plan.streamed_fraction, 4),
        }

    def here(self, image: Any, what: What, dtype: str) -> Callable[[Way], Callable[[], Timed]]:
        """Return a function of a way that returns its passes over `image` in this process, as `measure` takes them."""

        device = next(self.model.parameters()).device

        def passes(way: Way) -> Callable[[], Timed]:
            run = self.run(way)
            model = run if isinstance(run, nn.Module) else self.model
            if what == "step":
                give_gradients(model)
            return partial(timed, partial(one_pass, run, model, image, what, dtype), device)

        return passes

    def _with(self, way: Way) -> StreamingCNN:
        self.streamed.memory_budget, self.streamed.maps = way.budget, way.maps
        return self.streamed


def peers(model: nn.Module, shape: tuple[int, int, int, int], what: What) -> list[Way]:
    """Return the peers that can run `model` as it is on an image of `shape`, of those that are installed."""
    if what == "step":
        return [Way("checkpoint")] if hasattr(model, _SWITCH) or any(True for _ in _blocks(model)) else []
    found = [Way("tiling")] if hasattr(model, "enable_tiling") else []
    if min(shape[2:]) > _WINDOW and find_spec("monai") is not None and _is_dense(model, shape[1]):
        found.append(Way("sliding window", window=_WINDOW))
    return found


def lightstream_tiles(model: nn.Module, size: int) -> list[int]:
    """Return tiles with which lightstream, if it is installed, is right on a ResNet: multiples of its stride above 1024."""
    if find_spec("lightstream") is None or type(model).__module__ != "torchvision.models.resnet" or size % 32:
        return []
    return [tile for tile in (1280, 1600) if tile < size]


def _is_dense(model: nn.Module, channels: int) -> bool:
    """True if the result for an image is a map of its size."""
    weight = next(model.parameters())
    with torch.no_grad():
        result = model(torch.rand(1, channels, 64, 96, device=weight.device, dtype=weight.dtype))
    return any(isinstance(leaf, Tensor) and leaf.shape[2:] == (64, 96) for leaf in pytree.tree_leaves(result))


def _checkpointed(model: nn.Module, window: int | None) -> Run:
    """Return a copy that computes its blocks again in the backward pass: as timm has it, else the blocks of every Sequential."""
    model = copy.deepcopy(model)
    switch: Any = getattr(model, _SWITCH, None)
    if switch is not None:
        with suppress(AssertionError):  # timm: "gradient checkpointing not supported"
            switch()
            return model
    for block in list(_blocks(model)):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with layers of their own that a Sequential or a list holds, and that are no Sequential of such."""
    for child in module.children():
        nested = any(True for part in child.children() for _ in part.children())
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and not (isinstance(child, nn.Sequential) and nested):
            if any(True for _ in child.children()):
                yield child
        else:
            yield from _blocks(child)


class _Lightstream(nn.Module):
    """A torchvision ResNet of which lightstream runs all before the pooling."""

    def __init__(self, model: nn.Module, window: int | None) -> None:
        from lightstream.core.scnn.scnn import StreamingCNN as Lightstream

        super().__init__()
        *trunk, self.pooling, self.head = copy.deepcopy(model).children()
        self.trunk = nn.Sequential(*trunk)
        with redirect_stdout(StringIO()):
            self.net = Lightstream(self.trunk, (1, 3, window, window), copy_to_gpu=False)
        self.trunk.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.pooling(_LightstreamPass.apply(image, self.head.weight, self.net)).flatten(1))


class _LightstreamPass(torch.autograd.Function):
    """Its two passes; `anchor` is a tensor that requires grad, without which autograd would ask for no gradients."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, anchor: Tensor, net: Any) -> Tensor:
        ctx.image, ctx.net = image, net
        return net.forward(image).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        with torch.enable_grad():
            ctx.net.backward(ctx.image, grads[0])
        return None, None, None


def _sliding_window(model: nn.Module, window: int | None) -> Run:
    from monai.inferers.utils import sliding_window_inference

    return lambda image: sliding_window_inference(image, window, 1, model, overlap=0.25)


def _tiling(model: nn.Module, window: int | None) -> Run:
    copied: Any = copy.deepcopy(model)
    copied.enable_tiling()
    return copied


_MAKERS: dict[str, Callable[[nn.Module, int | None], Run]] = {
    "checkpoint": _checkpointed,
    "compiled": lambda model, window: torch.compile(model),
    "lightstream": _Lightstream,
    "sliding window": _sliding_window,
    "tiling": _tiling,
}


def _grad_mode(what: What) -> Any:
    return torch.no_grad() if what == "forward" else nullcontext()


def _autocast(model: nn.Module, dtype: str) -> Any:
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, dtype=DTYPES[dtype]) if dtype != "float32" else nullcontext()


def one_pass(run: Run, model: nn.Module, image: Any, what: What, dtype: str) -> None:
    """A forward pass without gradients, or a training step: forward, the mean of all results, backward; autocast to `dtype`."""
    with _grad_mode(what):
        with _autocast(model, dtype):
            result = run(image)
        if what == "step":
            tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            torch.stack([tensor.float().mean() for tensor in tensors]).sum().backward()


def give_gradients(model: nn.Module) -> None:
    """Make every gradient, so that the passes which are measured only add to it."""
    for weight in model.parameters():
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.empty_like(weight).zero_()  # zeros_like has no pages yet


def compare(
    ways: Ways,
    passes: Mapping[Way, Callable[[], Timed]],
    shape: tuple[int, ...],
    what: What,
    dtype: str,
    *,
    warm_ups: int = 1,
    repeats: int = 3,
    limit: float = math.inf,
) -> list[dict[str, Any]]:
    """Measure the passes of each way over an image of `shape` in turn, see `measure`; returns a row for each.

    A row has what `Way` has, `fits`, `seconds` (their median, and `all_seconds`), `bytes` at the peak where they are known; for a
    streamed way what its plan says; where it does not fit the `reason`.
    """
    rows: dict[Way, dict[str, Any]] = {}
    planned = dict(passes)
    for way in passes:
        row = rows[way] = {"way": way.how, "budget": way.budget, "window": way.window, "fits": True}
        row |= {"seconds": None, "bytes": None}
        if way.how == "streamed":
            try:
                row |= ways.plan(way, shape, what, dtype)
            except (WidefieldError, ValueError) as error:  # it cannot be streamed, or not within the budget
                row |= {"fits": False, "reason": str(error)}
                del planned[way]
    for way, found in measure(planned, warm_ups=warm_ups, repeats=repeats, limit=limit).items():
        rows[way] |= {"fits": found.fits, "cold": found.cold, "seconds": found.median}
        rows[way] |= {"bytes": max(found.peaks, default=None), "all_seconds": [round(x, 5) for x in found.seconds]}
        if not found.fits:
            rows[way]["reason"] = found.reason
    return list(rows.values())
