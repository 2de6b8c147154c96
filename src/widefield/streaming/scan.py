"""The algorithm: a convolutional network is a recurrent network over the tiles of an image.

One step takes what earlier tiles left behind (the carries) and a new tile, and gives a tile of every output and new carries:

    outputs, below, right  =  step(above, left, tile)

The forward pass scans the tiles in raster order without recording gradients and saves the carries between tiles. The backward
pass scans in reverse: it recomputes one tile from its saved carries with gradients recorded, and calls ordinary autograd from
(output tile, carries handed on) to (carries received, image tile, weights), with the gradients of the carries handed on that the
later tiles have left. This is back-propagation through time with a checkpoint between any two tiles. No overlap is ever
recomputed, and no gradient formula appears here: what autograd can differentiate is exact.

What memory is left is used to record the last tiles in the forward pass already: they need not be recomputed.

What is needed of the whole image (the mean of a map, say) is a reduction, gathered while the tiles pass. It is a result of the scan
like the output maps, and a later scan uses it; in the backward pass its gradient enters every tile.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from widefield.streaming.buffers import cut_out
from widefield.streaming.graph import Value
from widefield.streaming.grid import Grid
from widefield.streaming.job import Job
from widefield.streaming.rules import TileContext
from widefield.streaming.tape import Carry, Step, Tape, Windows, own

Tiles = Iterator[list[Tensor | None]]  # of the stage inputs, step by step


def scan(job: Job, inputs: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run `job`; returns the stage's output maps, then the parts of its reductions. An ordinary differentiable call.

    `inputs` are the tensors behind the job's sources, for autograd (None for an image that is read lazily).
    """
    tensors = (*inputs, *weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Scan.apply(job, *tensors)
    with torch.no_grad(), closing(job.tiles(job.grid.order)) as reader:
        return tuple(_forward(job, reader, weights, tape=None))


def refuse_transforms(values: Iterable[Any]) -> None:
    """Raise ValueError where derivatives would be lost: in torch.func's transforms, for `values` with forward-mode tangents."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        what = "called inside of a transform of torch.func (jvp, jacrev, grad, vmap, ...)"
    elif any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values):
        what = "differentiated in forward mode: its image or a parameter is a dual tensor"
    else:
        return
    raise ValueError(
        f"a streamed network cannot be {what}. Use backward() or torch.autograd.grad() on its result, which stream; or the plain "
        "module (StreamingCNN.module)."
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        stage, n = job.grid.stage, len(job.sources)
        weights = [tensor.detach() for tensor in tensors[n:] if tensor is not None]
        ctx.job, ctx.tape = job, Tape(job, weights, ctx.needs_input_grad[1:])
        with closing(job.tiles(job.grid.order)) as reader:
            outputs = _forward(job, reader, weights, ctx.tape)
        parts = outputs[len(stage.outputs) :]
        ctx.parts = len(parts)
        ctx.save_for_backward(*tensors, *parts, *ctx.tape.take_pieces())
        ctx.set_materialize_grads(False)
        from_values = (*stage.outputs, *(v for v in stage.reductions for _ in stage.values[v].parts))
        requires_grad = ctx.tape.requires_grad
        constant = [
            x for x, v in zip(outputs, from_values, strict=True) if not (requires_grad[v] and x.is_floating_point())
        ]
        ctx.mark_non_differentiable(*constant)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a streamed network cannot be differentiated twice: backward() was called with create_graph=True. "
                "Call it without, or run the plain module where second derivatives are needed."
            )
        count = len(ctx.needs_input_grad) - 1
        everything = ctx.saved_tensors
        tensors, parts = everything[:count], everything[count : count + ctx.parts]
        saved = ctx.tape.carries(everything[count + ctx.parts :])
        del everything
        order = [at for k, at in enumerate(ctx.job.grid.order) if k not in ctx.tape.steps]
        with ctx.job.autocast(), closing(ctx.job.tiles(order[::-1])) as reader:
            return None, *_backward(ctx.job, reader, ctx.tape, tensors, parts, saved, grads)


def _forward(job: Job, reader: Tiles, weights: Sequence[Tensor], tape: Tape | None) -> list[Tensor]:
    """Scan the tiles that `reader` gives in raster order; `tape` takes what a backward pass needs."""
    grid, stage = job.grid, job.grid.stage
    by_name = dict(zip(job.weight_names, weights, strict=True))
    outputs: dict[int, Tensor] = {}
    gathered: dict[int, Any] = {}
    above: list[Carry] = [{} for _ in grid.cols]
    for i in range(len(grid.rows)):
        left: Carry = {}
        for j in range(len(grid.cols)):
            k = i * len(grid.cols) + j
            if tape is not None:
                tape.save(above[j], left)
            if tape is not None and k >= grid.steps - job.recorded:
                # Hooks of the caller on saved tensors, those of torch.utils.checkpoint say, are not meant for this graph. Nor is
                # the check for updates in place: later carries are written beside those that it has saved, in the same block.
                with saved_tensors_hooks(_unchanged, _unchanged):
                    tape.steps[k], made, below, right = _record(job, tape, i, j, above[j], left, next(reader), weights)
                reduced = tape.steps[k].reduced
                above[j], left = ({v: tape.own(x.detach()) for v, x in of.items()} for of in (below, right))
                del below, right
            else:
                tiles = [source.prepare(raw) for source, raw in zip(job.sources, next(reader), strict=True)]
                keep = own if tape is None else tape.own
                made, reduced, above[j], left = step(grid, i, j, above[j], left, tiles, by_name, job.seed, keep)
                del tiles
            for v, (windows, context) in reduced.items():
                reduction = stage.values[v].reduction
                assert reduction is not None
                gathered[v] = reduction.fold(gathered.get(v), [x.detach() for x in windows], context)
            for v, tile in made.items():
                if v not in outputs:
                    outputs[v] = job.new(v, stage.values[v].shape, tile)
                job.tile_of(outputs[v], v, i, j).copy_(tile)
            del made, reduced
            job.released((*outputs.values(), *(tape.arena.blocks.values() if tape else ())))
            if job.progress:
                job.progress("forward", k + 1, grid.steps)
    parts = [part for v in stage.reductions for part in stage.values[v].reduction.finish(gathered[v])]  # type: ignore[union-attr]
    return [*(outputs[v] for v in stage.outputs), *parts]


def _backward(
    job: Job,
    reader: Tiles,
    tape: Tape,
    tensors: Sequence[Tensor | None],
    parts: Sequence[Tensor],
    saved: list[tuple[Carry, Carry]],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Scan the tiles in reverse, with those that were not recorded from `reader`.

    Returns the gradients of `tensors` (inputs, then weights) where needed, None elsewhere.
    """
    grid, stage, n = job.grid, job.grid.stage, len(job.sources)
    weights = [x for x in tensors[n:] if x is not None]
    input_grads = [
        source.zeros_like(x) if need and x is not None else None
        for source, x, need in zip(job.sources, tensors, tape.needed, strict=False)
    ]
    results, part_grads, k = {}, {}, len(stage.outputs)
    for v in stage.reductions:
        count = len(stage.values[v].parts)
        results[v], part_grads[v] = parts[k - len(stage.outputs) :][:count], grads[k : k + count]
        k += count
    tape.start(weights)
    grad_below: list[Carry] = [{} for _ in grid.cols]
    for i in reversed(range(len(grid.rows))):
        grad_right: Carry = {}
        for j in reversed(range(len(grid.cols))):
            above, left = saved.pop()
            recorded = tape.steps.pop(i * len(grid.cols) + j, None)
            if recorded is None:
                recorded = _record(job, tape, i, j, above, left, next(reader), weights)[0]
            carries = [*above.values(), *left.values()][:1]
            del above, left
            arriving: list[tuple[Tensor | GradientEdge, Tensor]] = [
                (edges[v], g)
                for edges, of in ((recorded.below, grad_below[j]), (recorded.right, grad_right))
                for v, g in of.items()
                if v in edges
            ]
            arriving += [
                (recorded.made[v], job.tile_of(g, v, i, j).to(job.sources[0].device))
                for v, g in zip(stage.outputs, grads, strict=False)
                if g is not None and v in recorded.made
            ]
            for v, (windows, context) in recorded.reduced.items():
                reduction = stage.values[v].reduction
                if reduction is not None and any(g is not None for g in part_grads[v]):
                    pulled = reduction.pull(tuple(results[v]), windows, context, part_grads[v])
                    arriving += [(x, g) for x, g in pulled if x.requires_grad]
            recorded.reduced.clear()
            inputs = (*recorded.above.values(), *recorded.left.values(), *recorded.raws, *tape.leaves)
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            if arriving:
                torch.autograd.backward([x for x, _ in arriving], [g for _, g in arriving], inputs=wanted)  # type: ignore[arg-type]
            del arriving, inputs, wanted
            grad_below[j] = {v: x.grad for v, x in recorded.above.items() if x.grad is not None}
            grad_right = {v: x.grad for v, x in recorded.left.items() if x.grad is not None}
            for source, raw, whole, v in zip(job.sources, recorded.raws, input_grads, stage.inputs, strict=True):
                if raw is not None and whole is not None and raw.grad is not None:
                    source.region(whole, *job.region(v, i, j)).add_(raw.grad)
            del recorded
            job.released((*(grad for grad in input_grads if grad is not None), *carries))
            if job.progress:
                job.progress("backward", grid.steps - (i * len(grid.cols) + j), grid.steps)
    return [*input_grads, *tape.take_gradients(weights)]


def _record(
    job: Job,
    tape: Tape,
    i: int,
    j: int,
    above: Carry,
    left: Carry,
    raws: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> tuple[Step, Carry, Carry, Carry]:
    """Run step (i, j) with gradients recorded; what it leaves for its backward pass, then its outputs and carries."""
    device = job.sources[0].device
    with torch.enable_grad():
        above, left = (
            {
                v: x.detach().to(device, non_blocking=True).requires_grad_(tape.requires_grad[v])
                for v, x in carry.items()
            }
            for carry in (above, left)
        )
        raws = [
            x.detach().requires_grad_() if x is not None and need else x
            for x, need in zip(raws, tape.needed, strict=False)
        ]
        tiles = [source.prepare(raw) for source, raw in zip(job.sources, raws, strict=True)]
        by_name = tape.weights(job, weights)
        made, reduced, below, right = step(job.grid, i, j, above, left, tiles, by_name, job.seed, own)
        roots, down, across = (
            {v: get_gradient_edge(x) for v, x in of.items() if x.requires_grad} for of in (made, below, right)
        )
    return Step(above, left, raws, roots, down, across, reduced), made, below, right


def step(
    grid: Grid,
    i: int,
    j: int,
    above: Carry,
    left: Carry,
    tiles: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    seed: int,
    keep: Callable[[Tensor], Tensor],
) -> tuple[Carry, Windows, Carry, Carry]:
    """One step of the scan: a pure function of what was kept above and to the left, and of the new tiles of the stage inputs.

    Returns the new tiles of the maps that leave the stage, the new windows that its reductions read, and what is kept for the
    tile below and for the tile to the right, each piece as `keep` gives it.
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
                context = TileContext(row.spans, col.spans, weights, seed)
                if value.reduction is not None:
                    reduced[v] = windows, context
                    continue
                new = value.placed.run(windows, context)
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
            right[v] = keep(parts.pop())
        if keep_below:
            below[v] = keep(parts.pop())
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


def _unchanged(x: Tensor) -> Tensor:
    return x
