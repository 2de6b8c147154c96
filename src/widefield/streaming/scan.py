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

Around it are policies: what a forward pass leaves for its backward pass, some last steps whole, which are not recomputed then
(`tape`); where tiles are read, where maps and carries are kept, what is done between two steps (`job`); how tiles become results
(`results`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from widefield.streaming.buffers import cut_out
from widefield.streaming.job import Job
from widefield.streaming.program import Value
from widefield.streaming.results import InputGradients, ResultGradients, Results
from widefield.streaming.rules import TileContext
from widefield.streaming.tape import Carry, Made, Recorded, Tape, compact

Tiles = Iterator[list[Tensor | None]]  # the new tiles of the stage inputs, step by step


def scan(job: Job, inputs: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run `job`; returns the stage's output maps, then the parts of its reductions. An ordinary differentiable call.

    `inputs` are the tensors behind the job's sources, for autograd (None for an image that is read lazily).
    """
    tensors = (*inputs, *weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Scan.apply(job, *tensors)
    with torch.no_grad(), closing(job.tiles(job.grid.order)) as tiles:
        return tuple(_forward(job, tiles, weights, tape=None))


class _Scan(torch.autograd.Function):
    """The whole scan as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights = [tensor.detach() for tensor in tensors[len(job.readers) :] if tensor is not None]
        ctx.job, ctx.tape = job, Tape(job, weights, ctx.needs_input_grad[1:])
        with closing(job.tiles(job.grid.order)) as tiles:
            results = _forward(job, tiles, weights, ctx.tape)
        parts = results[len(job.grid.stage.outputs) :]
        ctx.parts = len(parts)
        ctx.save_for_backward(*tensors, *parts, *ctx.tape.take_pieces())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*ctx.tape.constant(results))
        return tuple(results)

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
        carries = ctx.tape.carries(everything[count + ctx.parts :])
        del everything
        again = [at for k, at in enumerate(ctx.job.grid.order) if k not in ctx.tape.steps]
        with ctx.job.settings(), closing(ctx.job.tiles(again[::-1])) as tiles:
            return None, *_backward(
                ctx.job, tiles, ctx.tape, carries, tensors, ResultGradients.of(ctx.job.grid.stage, parts, grads)
            )


def _forward(job: Job, tiles: Tiles, weights: Sequence[Tensor], tape: Tape | None) -> list[Tensor]:
    """Scan the `tiles` in raster order; `tape` takes what a backward pass needs."""
    results = Results(job)
    by_name = dict(zip(job.weight_names, weights, strict=True))
    below: dict[tuple[int, int], Carry] = {}  # what each step has handed down
    right: dict[tuple[int, int], Carry] = {}
    for k, (i, j) in enumerate(job.grid.order):
        above, left = below.pop((i - 1, j), {}), right.pop((i, j - 1), {})
        if tape is not None:
            tape.save_received(above, left)
        if tape is not None and k >= len(job.grid.order) - job.recorded:
            # Hooks of the caller on saved tensors, those of torch.utils.checkpoint say, are not meant for this graph. Nor is
            # the check for updates in place: later carries are written beside those that it has saved, in the same block.
            with saved_tensors_hooks(lambda x: x, lambda x: x):
                made = tape.keep_recorded(k, *_record(job, tape, i, j, above, left, next(tiles), weights))
        else:
            prepared = job.prepare(next(tiles), i, j)
            made = step(job, i, j, above, left, prepared, by_name, tape.new_carry if tape else compact)
            del prepared
        del above, left
        below[i, j], right[i, j] = made.below, made.right
        results.add(made, i, j)
        del made
        job.step_done("forward", k + 1, (*results.maps.values(), *(tape.arena_blocks() if tape else ())))
    return results.finished()


def _backward(
    job: Job,
    tiles: Tiles,
    tape: Tape,
    carries: list[tuple[Carry, Carry]],
    tensors: Sequence[Tensor | None],
    result_grads: ResultGradients,
) -> list[Tensor | None]:
    """Scan in reverse, from the `carries` of each step; `tiles` are those of the steps that were not recorded.

    Returns the gradients of `tensors` (inputs, then weights) where needed, None elsewhere.
    """
    weights = [x for x in tensors[len(job.readers) :] if x is not None]
    input_grads = InputGradients(job, tensors[: len(job.readers)], tape.inputs_needed)
    tape.start(weights)
    grad_below: dict[tuple[int, int], Carry] = {}  # the gradients of what each step has handed down
    grad_right: dict[tuple[int, int], Carry] = {}
    for k, (i, j) in reversed(list(enumerate(job.grid.order))):
        above, left = carries.pop()
        recorded = tape.steps.pop(k, None)
        if recorded is None:
            recorded = _record(job, tape, i, j, above, left, next(tiles), weights)[0]
        received = [*above.values(), *left.values()]
        del above, left
        handed_on = recorded.handed_on(grad_below.pop((i, j), {}), grad_right.pop((i, j), {}))
        arriving = [*handed_on, *result_grads.at(job, recorded, i, j)]
        recorded.reduced.clear()  # what the reductions read is not needed any more
        wanted = [x for x in (*recorded.leaves, *tape.leaves) if x.requires_grad]
        if arriving:
            torch.autograd.backward([x for x, _ in arriving], [g for _, g in arriving], inputs=wanted)  # type: ignore[arg-type]
        del handed_on, arriving, wanted
        grad_below[i - 1, j] = {v: x.grad for v, x in recorded.above.items() if x.grad is not None}
        grad_right[i, j - 1] = {v: x.grad for v, x in recorded.left.items() if x.grad is not None}
        input_grads.add(recorded.raws, i, j)
        del recorded
        job.step_done(
            "backward", len(job.grid.order) - k, (*(g for g in input_grads.wholes if g is not None), *received)
        )
    return job.summed(
        [*input_grads.wholes, *tape.take_gradients(weights)], tensors, (*tape.inputs_needed, *tape.weights_needed)
    )


def _record(
    job: Job,
    tape: Tape,
    i: int,
    j: int,
    above: Carry,
    left: Carry,
    raws: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> tuple[Recorded, Made]:
    """Run step (i, j) with gradients recorded; return what its backward pass needs, and what it makes."""
    with torch.enable_grad():
        above, left = (
            {
                v: x.detach().to(job.device, non_blocking=True).requires_grad_(tape.requires_grad[v])
                for v, x in of.items()
            }
            for of in (above, left)
        )
        zipped = zip(raws, tape.inputs_needed, strict=True)
        raws = [x.detach().requires_grad_() if x is not None and need else x for x, need in zipped]
        made = step(job, i, j, above, left, job.prepare(raws, i, j), tape.weights(job, weights), compact)
        outputs, below, right = (
            {v: get_gradient_edge(x) for v, x in of.items() if x.requires_grad}
            for of in (made.outputs, made.below, made.right)
        )
    return Recorded(
        above=above, left=left, raws=raws, outputs=outputs, below=below, right=right, reduced=made.reduced
    ), made


def step(
    job: Job,
    i: int,
    j: int,
    above: Carry,
    left: Carry,
    tiles: Sequence[Tensor | None],
    weights: Mapping[str, Tensor],
    keep: Callable[[Tensor], Tensor],
) -> Made:
    """One step of the scan: a pure function of what was kept above and to the left, and of the new tiles of the stage inputs.

    What is kept for the tile below and for the tile to the right is as `keep` gives each piece. Of `job` it needs the
    grid, the foreground and the seed of random masks.
    """
    grid, stage = job.grid, job.grid.stage
    made = Made({}, {}, {}, {})
    reads: dict[tuple[int, int], Tensor] = {}
    for v, value in enumerate(stage.values):
        new = None
        *_, height, width = grid.box(v, i, j)
        if height and width:
            if value.placed is None:
                new = _input(value, tiles[v], height, width)
            else:
                windows = [reads.pop((v, k)) for k in range(len(value.sources))]
                context = TileContext(*grid.spans(v, i, j), weights, job.seed, job.masks(v, i, j))
                if value.reduction is not None:
                    made.reduced[v] = windows, context
                    continue
                new = value.placed.run(windows, context)
                del windows
            value.check_tile(new, height, width)
            if v in stage.outputs:
                made.outputs[v] = new = new.relu_() if value.rectified else new
        cuts = grid.cuts(v, i, j)
        if not cuts.windows:
            continue
        if new is None and v not in left and v not in above:  # not begun, and read by what is joined to it
            new = torch.empty(value.tile_shape(*cuts.layout.size), dtype=value.dtype, device=job.device)
        rectify = value.rectified and v not in made.outputs
        parts = list(cut_out((left.get(v), above.get(v), new), value.axes, cuts.layout, cuts.windows, rectify))
        del new
        if cuts.keep_right:
            made.right[v] = keep(parts.pop())
        if cuts.keep_below:
            made.below[v] = keep(parts.pop())
        reads.update(zip(cuts.readers, parts, strict=True))
        del parts
    return made


def _input(value: Value, tile: Tensor | None, height: int, width: int) -> Tensor:
    """A new tile of a stage input; a weight that is as large as the image along one axis only is expanded along both."""
    assert tile is not None
    return tile.expand(value.tile_shape(height, width))
