"""The algorithm: a convolutional network is a recurrent network over the tiles of an image.

One step takes what earlier tiles left behind (the carries) and a new tile, and gives a tile of every output and new carries:

    outputs, below, right  =  step(above, left, tile)

The forward pass scans the tiles in raster order without recording gradients and saves the carries between tiles. The backward
pass scans in reverse: it recomputes one tile from its saved carries with gradients recorded, and calls ordinary autograd from
(output tile, carries handed on) to (carries received, image tile, weights), with the gradients of the carries handed on that the
later tiles have left. This is back-propagation through time with a checkpoint between any two tiles. No overlap is ever
recomputed, and no gradient formula appears here: what autograd can differentiate is exact.

What is needed of the whole image (the mean of a map, say) is a reduction, gathered while the tiles pass. It is a result of the scan
like the output maps, and a later scan uses it; in the backward pass its gradient enters every tile.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from widefield.streaming.buffers import cut_out, empty_like
from widefield.streaming.graph import Stage, Value
from widefield.streaming.grid import Grid
from widefield.streaming.image import Source
from widefield.streaming.rules import Work
from widefield.streaming.store import Store

Carry = dict[int, Tensor]  # what is kept of a map, by the map's index
Windows = dict[int, tuple[list[Tensor], Work]]  # what a reduction reads, by the reduction's index
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One scan: its `grid`, where its inputs are read, the names of its weights, the seed of its random masks.

    `store` is where the stage's `stored` maps are kept. `autocast` gives a context with the autocast state of the forward pass;
    `progress(phase, done, steps)` is told of each step.
    """

    grid: Grid
    sources: Sequence[Source]
    weight_names: Sequence[str]
    seed: int
    store: Store
    autocast: Callable[[], AbstractContextManager[Any]]
    progress: Progress | None

    def new(self, v: int, shape: tuple[int, ...], tile: Tensor) -> Tensor:
        """An empty tensor for the whole of output map `v`, of which `tile` is a part."""
        return self.store.empty(shape, tile) if v in self.grid.stage.stored else empty_like(tile, shape)

    def released(self, maps: Iterable[Tensor]) -> None:
        """The step is done: pages of maps in files need not stay in memory."""
        if self.store.place != "file":
            return
        for x in (*maps, *(source.data for source in self.sources if isinstance(source.data, Tensor))):
            self.store.release(x)


def scan(job: Job, inputs: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run `job`; returns the stage's output maps, then the parts of its reductions. An ordinary differentiable call.

    `inputs` are the tensors behind the job's sources, for autograd (None for an image that is read lazily).
    """
    tensors = (*inputs, *weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Scan.apply(job, *tensors)
    with torch.no_grad():
        return tuple(_forward(job, weights, saved=None))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        saved: list[tuple[Carry, Carry]] = []
        stage = job.grid.stage
        weights = [tensor.detach() for tensor in tensors[len(job.sources) :] if tensor is not None]
        outputs = _forward(job, weights, saved)
        ctx.job = job
        ctx.layout = [(tuple(above), tuple(left)) for above, left in saved]
        parts = outputs[len(stage.outputs) :]
        ctx.parts = len(parts)
        ctx.save_for_backward(
            *tensors, *parts, *(piece for carries in saved for carry in carries for piece in carry.values())
        )
        ctx.set_materialize_grads(False)
        needed, n = ctx.needs_input_grad[1:], len(job.sources)
        weights_needed = {name for name, need in zip(job.weight_names, needed[n:], strict=True) if need}
        moving = _moving(stage, weights_needed, needed[:n])
        from_values = (*stage.outputs, *(v for v in stage.reductions for _ in stage.values[v].parts))
        still = [x for x, v in zip(outputs, from_values, strict=True) if not (moving[v] and x.is_floating_point())]
        ctx.mark_non_differentiable(*still)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a streamed network cannot be differentiated twice: backward() was called with create_graph=True. "
                "Call it without, or run the plain module where second derivatives are needed."
            )
        needed = ctx.needs_input_grad[1:]
        everything = ctx.saved_tensors
        tensors, parts = everything[: len(needed)], everything[len(needed) : len(needed) + ctx.parts]
        pieces = iter(everything[len(needed) + ctx.parts :])
        del everything
        saved = [({v: next(pieces) for v in above}, {v: next(pieces) for v in left}) for above, left in ctx.layout]
        with ctx.job.autocast():
            return None, *_backward(ctx.job, tensors, needed, parts, saved, grads)


def _forward(job: Job, weights: Sequence[Tensor], saved: list[tuple[Carry, Carry]] | None) -> list[Tensor]:
    """Scan the tiles in raster order; the carries that each tile received are appended to `saved`, if it is a list."""
    grid, stage = job.grid, job.grid.stage
    by_name = dict(zip(job.weight_names, weights, strict=True))
    outputs: dict[int, Tensor] = {}
    gathered: dict[int, Any] = {}
    above: list[Carry] = [{} for _ in grid.cols]
    for i in range(len(grid.rows)):
        left: Carry = {}
        for j in range(len(grid.cols)):
            if saved is not None:
                saved.append((above[j], left))
            tiles = [source.prepare(raw) for source, raw in zip(job.sources, _read(job, i, j), strict=True)]
            made, reduced, above[j], left = step(grid, i, j, above[j], left, tiles, by_name, job.seed)
            for v, (windows, work) in reduced.items():
                reduction = stage.values[v].reduction
                assert reduction is not None
                gathered[v] = reduction.fold(gathered.get(v), windows, work)
            for v, tile in made.items():
                if v not in outputs:
                    outputs[v] = job.new(v, stage.values[v].shape, tile)
                _tile_of(outputs[v], grid, v, i, j).copy_(tile)
            del made, reduced, tiles
            job.released(outputs.values())
            if job.progress:
                job.progress("forward", i * len(grid.cols) + j + 1, grid.steps)
    parts = [part for v in stage.reductions for part in stage.values[v].reduction.finish(gathered[v])]  # type: ignore[union-attr]
    return [*(outputs[v] for v in stage.outputs), *parts]


def _backward(
    job: Job,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    parts: Sequence[Tensor],
    saved: list[tuple[Carry, Carry]],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Scan the tiles in reverse; returns the gradients of `tensors` (inputs, then weights) where `needed`, None elsewhere."""
    grid, stage, n = job.grid, job.grid.stage, len(job.sources)
    weights: list[Tensor] = [x for x in tensors[n:] if x is not None]
    # The leaves sum the tiles' gradients, in float32 or better: 256 tiles summed in bfloat16 are 3% off.
    leaves = [
        weight.detach()
        .to(torch.promote_types(weight.dtype, torch.float32) if need else weight.dtype)
        .requires_grad_(need)
        for weight, need in zip(weights, needed[n:], strict=True)
    ]
    moving = _moving(
        stage, {name for name, leaf in zip(job.weight_names, leaves, strict=True) if leaf.requires_grad}, needed[:n]
    )
    input_grads = [
        source.zeros_like(x) if need and x is not None else None
        for source, x, need in zip(job.sources, tensors, needed, strict=False)
    ]
    results, part_grads, k = {}, {}, len(stage.outputs)
    for v in stage.reductions:
        count = len(stage.values[v].parts)
        results[v], part_grads[v] = parts[k - len(stage.outputs) :][:count], grads[k : k + count]
        k += count
    grad_below: list[Carry] = [{} for _ in grid.cols]
    for i in reversed(range(len(grid.rows))):
        grad_right: Carry = {}
        for j in reversed(range(len(grid.cols))):
            above, left = ({v: x.detach().requires_grad_(moving[v]) for v, x in carry.items()} for carry in saved.pop())
            raws = _read(job, i, j, needed)
            with torch.enable_grad():
                tiles = [source.prepare(raw) for source, raw in zip(job.sources, raws, strict=True)]
                by_name = {
                    name: leaf.to(weight.dtype)
                    for name, leaf, weight in zip(job.weight_names, leaves, weights, strict=True)
                }
                made, reduced, below, right = step(grid, i, j, above, left, tiles, by_name, job.seed)
            arriving = [(below[v], g) for v, g in grad_below[j].items()] + [
                (right[v], g) for v, g in grad_right.items()
            ]
            arriving += [
                (made[v], _tile_of(g, grid, v, i, j).to(made[v].device))
                for v, g in zip(stage.outputs, grads, strict=False)
                if g is not None and v in made
            ]
            for v, (windows, work) in reduced.items():
                reduction = stage.values[v].reduction
                if reduction is not None and any(g is not None for g in part_grads[v]):
                    arriving += reduction.pull(tuple(results[v]), windows, work, part_grads[v])
            arriving = [(x, g) for x, g in arriving if x.requires_grad]
            wanted = [x for x in (*above.values(), *left.values(), *raws, *leaves) if x is not None and x.requires_grad]
            del made, reduced, below, right, tiles, by_name
            if arriving:
                torch.autograd.backward([x for x, _ in arriving], [g for _, g in arriving], inputs=wanted)
            del arriving
            grad_below[j] = {v: x.grad for v, x in above.items() if x.grad is not None}
            grad_right = {v: x.grad for v, x in left.items() if x.grad is not None}
            for source, raw, whole, v in zip(job.sources, raws, input_grads, stage.inputs, strict=True):
                if raw is not None and whole is not None and raw.grad is not None:
                    source.region(whole, *_region(grid, v, i, j)).add_(raw.grad)
            job.released(grad for grad in input_grads if grad is not None)
            if job.progress:
                job.progress("backward", grid.steps - (i * len(grid.cols) + j), grid.steps)
    weight_grads = [
        None if leaf.grad is None else leaf.grad.to(weight.dtype) for leaf, weight in zip(leaves, weights, strict=True)
    ]
    return [*input_grads, *weight_grads]


def step(
    grid: Grid,
    i: int,
    j: int,
    above: Carry,
    left: Carry,
    tiles: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    seed: int,
) -> tuple[Carry, Windows, Carry, Carry]:
    """One step of the scan: a pure function of what was kept above and to the left, and of the new tiles of the stage inputs.

    Returns the new tiles of the maps that leave the stage, the new windows that its reductions read, and what is kept for the
    tile below and for the tile to the right.
    """
    stage = grid.stage
    made, reduced, below, right = {}, {}, {}, {}
    reads: dict[tuple[int, int], Tensor] = {}
    for v, (value, row, col) in enumerate(zip(stage.values, grid.rows[i], grid.cols[j], strict=True)):
        new = None
        if row.new and col.new:
            if value.placed is None:
                new = _broadcast(value, tiles[v], row.new, col.new)
            else:
                windows = [reads.pop((v, k)) for k in range(len(value.sources))]
                work = Work(row.spans, col.spans, weights, seed)
                if value.reduction is not None:
                    reduced[v] = windows, work
                    continue
                new = value.placed.run(windows, work)
                del windows
            assert new is not None
            _check(value, new, row.new, col.new)
            if v in stage.outputs:
                made[v] = new = new.relu_() if value.rectified else new
        readers, cuts, keep_below, keep_right = grid.cuts(v, row, col)
        if not cuts:
            continue
        parts = list(cut_out((left.get(v), above.get(v), new), value.axes, cuts, value.rectified and v not in made))
        del new
        if keep_right:
            right[v] = _own(parts.pop())
        if keep_below:
            below[v] = _own(parts.pop())
        reads.update(zip(readers, parts, strict=True))
        del parts
    return made, reduced, below, right


def _check(value: Value, new: Tensor, height: int, width: int) -> None:
    """A rule that makes another shape than planned would give wrong numbers downstream: stop instead."""
    planned = _tile_shape(value, height, width)
    if tuple(new.shape) != planned:
        raise RuntimeError(
            f"{value.op} in layer '{value.module_path}' made a tile of shape {tuple(new.shape)} where {planned} was "
            "planned. This is a fault of Widefield: please report it with the model."
        )


def _broadcast(value: Value, tile: Tensor | None, height: int, width: int) -> Tensor | None:
    """A weight that is as large as the image along one axis only, along both."""
    return None if tile is None else tile.expand(_tile_shape(value, height, width))


def _tile_shape(value: Value, height: int, width: int) -> tuple[int, ...]:
    shape = list(value.shape)
    shape[value.axes.rows], shape[value.axes.cols] = height, width
    return tuple(shape)


def _read(job: Job, i: int, j: int, needed: Sequence[bool] = ()) -> list[Tensor | None]:
    """The new tile of each stage input as its source gives it; a leaf of autograd where its gradient is `needed`."""
    raws: list[Tensor | None] = []
    for k, (v, source) in enumerate(zip(job.grid.stage.inputs, job.sources, strict=True)):
        y, x, height, width = _region(job.grid, v, i, j)
        raw = source.read(y, x, height, width) if height and width else None
        raws.append(raw.detach().requires_grad_() if raw is not None and needed and needed[k] else raw)
    return raws


def _moving(stage: Stage, weights: set[str], inputs: Sequence[bool]) -> list[bool]:
    """Which maps depend on something that requires grad."""
    moving: list[bool] = []
    for v, value in enumerate(stage.values):
        own = inputs[v] if value.placed is None else any(name in weights for name in value.weights)
        reached = own or any(moving[source] for source in value.sources)
        still = value.reduction is None and (not value.dtype.is_floating_point or value.op == "aten.detach")
        moving.append(reached and not still)
    return moving


def _own(piece: Tensor) -> Tensor:
    """A carry of the forward pass without the buffer that it was cut from, which a view would keep alive."""
    if torch.is_grad_enabled() or piece.untyped_storage().nbytes() <= 1.25 * piece.nbytes:
        return piece
    return piece.clone()


def _tile_of(whole: Tensor, grid: Grid, v: int, i: int, j: int) -> Tensor:
    """The part of map v that step (i, j) computes, in a tensor of the whole map's size."""
    axes, (y, x, height, width) = grid.stage.values[v].axes, _region(grid, v, i, j)
    return whole.narrow(axes.rows, y, height).narrow(axes.cols, x, width)


def _region(grid: Grid, v: int, i: int, j: int) -> tuple[int, int, int, int]:
    """Where map v's new tile of step (i, j) lies: y, x, height, width."""
    row, col = grid.rows[i][v], grid.cols[j][v]
    return row.done, col.done, row.new, col.new
