"""The ways in which `widefield bench` runs a network: plain, with checkpoints, compiled, streamed; and a comparison of them."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from widefield.cli.measuring import measure
from widefield.streaming import StreamingCNN, stream
from widefield.streaming.store import Place

What = Literal["step", "forward"]
Run = Callable[[Any], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """A way to run a network.

    Attributes:
        how: "plain", "checkpoint", "compiled" or "streamed".
        budget: Of a streamed one: its memory budget in bytes. None: that of `widefield.stream`.
        maps: Of a streamed one: where maps between stages live. None: as the plan has it.
    """

    how: str = "plain"
    budget: int | None = None
    maps: Place | None = None


class Ways:
    """One network and its runs: those that are streamed share what was captured.

    The network is used as it is; `torch.utils.checkpoint` runs in a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.streamed = stream(model)
        self._runs: dict[str, Run] = {"plain": model}

    def run(self, way: Way) -> Run:
        """Return what is called with an image."""
        if way.how == "streamed":
            return partial(self._stream, way)
        if way.how not in self._runs:
            self._runs[way.how] = checkpointed(self.model) if way.how == "checkpoint" else torch.compile(self.model)
        return self._runs[way.how]

    def _stream(self, way: Way, image: Any) -> Any:
        return self._with(way)(image)

    def plan(self, way: Way, shape: tuple[int, ...], what: What, dtype: str) -> dict[str, Any]:
        """Return what the plan of a streamed pass says; raises ValueError for a budget that cannot work."""
        with grad_mode(what), autocast(self.model, dtype):
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

    def _with(self, way: Way) -> StreamingCNN:
        self.streamed.memory_budget, self.streamed.maps = way.budget, way.maps
        return self.streamed


def checkpointed(model: nn.Module) -> nn.Module:
    """Return a copy that computes its blocks again in the backward pass: as timm has it, else the blocks of every Sequential."""
    model = copy.deepcopy(model)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
        return model
    for block in list(_blocks(model)):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with layers of their own that a Sequential or a list holds; no Sequential of such."""
    for child in module.children():
        nested = any(True for part in child.children() for _ in part.children())
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and not (isinstance(child, nn.Sequential) and nested):
            if any(True for _ in child.children()):
                yield child
        else:
            yield from _blocks(child)


def grad_mode(what: What) -> Any:
    """Context of a pass: without gradients for a forward pass."""
    return torch.no_grad() if what == "forward" else nullcontext()


def autocast(model: nn.Module, dtype: str) -> Any:
    """Autocast to `dtype`, which float32 needs none for."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, dtype=DTYPES[dtype]) if dtype != "float32" else nullcontext()


def one_pass(run: Run, model: nn.Module, image: Any, what: What, dtype: str) -> None:
    """A forward pass without gradients, or a training step: forward, the mean of all results, backward."""
    with grad_mode(what):
        with autocast(model, dtype):
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
    kinds: Sequence[Way],
    image: Any,
    what: What,
    dtype: str,
    *,
    warm_ups: int = 1,
    repeats: int = 3,
    limit: float = math.inf,
) -> list[dict[str, Any]]:
    """Measure `kinds` in turn on an image; returns a row for each.

    A row has `fits`, `seconds` (the median), `all_seconds`, on CUDA `bytes` at the peak above weights, gradients and image, for a
    streamed way what its plan says, and where it does not fit the `reason`.
    """
    device = next(ways.model.parameters()).device
    rows: dict[Way, dict[str, Any]] = {}
    for way in kinds:
        row = rows[way] = {"way": way.how, "budget": way.budget, "fits": True, "seconds": None, "bytes": None}
        if way.how == "streamed":
            try:
                row |= ways.plan(way, tuple(image.shape), what, dtype)
            except ValueError as error:
                row |= {"fits": False, "reason": str(error)}
    fitting = [way for way in kinds if rows[way]["fits"]]
    passes = {}
    for way in fitting:
        run = ways.run(way)
        of = run if isinstance(run, nn.Module) else ways.model
        if what == "step":
            give_gradients(of)
        passes[str(way)] = partial(one_pass, run, of, image, what, dtype)
    found = measure(passes, device, warm_ups=warm_ups, repeats=repeats, limit=limit)
    for way in fitting:
        of_way = found[str(way)]
        rows[way] |= {"fits": of_way.fits, "seconds": of_way.median, "bytes": max(of_way.peaks, default=None)}
        rows[way]["all_seconds"] = [round(value, 5) for value in of_way.seconds]
        if of_way.cold:
            rows[way]["cold"] = True
        if not of_way.fits:
            rows[way]["reason"] = "out of memory"
    return list(rows.values())
