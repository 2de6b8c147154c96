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
(`results`). `tests/streaming/reference.py` is the algorithm without them, in sixty lines: read it first.

A step is (i, j), its tile row and column, and number k in their order. A map, or a reduction, is v, its index in `Stage.values`; a
carry has a tensor for each map by this index. Raw tiles are tiles of the stage inputs as they were read, not yet normalised.
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

RawTiles = list[Tensor | None]  # those of all stage inputs in one step


def scan(job: Job, inputs: Sequence[Tensor | None], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run `job`; returns the stage's output maps, then the parts of its reductions. An ordinary differentiable call.

    `inputs` are the tensors behind the job's sources, for autograd (None for an image that is read lazily).
    """
    tensors = (*inputs, *weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Scan.apply(job, *tensors)
    with torch.no_grad(), closing(job.tiles(job.grid.order)) as reading:
        return tuple(_forward(job, reading, weights, tape=None))


class _Scan(torch.autograd.Function):
    """The whole scan as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights = [tensor.detach() for tensor in tensors[len(job.readers) :] if tensor is not None]
        ctx.job, ctx.tape = job, Tape(job, weights, ctx.needs_input_grad[1:])
        with closing(job.tiles(job.grid.order)) as reading:
            results = _forward(job, reading, weights, ctx.tape)
        reduced = results[len(job.grid.stage.outputs) :]
        ctx.counts = len(tensors), len(reduced)
        ctx.save_for_backward(*tensors, *reduced, *ctx.tape.take_pieces())
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
        job, (given, reductions) = ctx.job, ctx.counts
        saved = ctx.saved_tensors
        tensors, reduced = saved[:given], saved[given : given + reductions]
        carries = ctx.tape.carries(saved[given + reductions :])
        del saved
        result_grads = ResultGradients.of(job.grid.stage, reduced, grads)
        again = [at for k, at in enumerate(job.grid.order) if k not in ctx.tape.steps]
        with job.settings(), closing(job.tiles(again[::-1])) as reading:
            # One for each argument of `forward`, in its order: the job has none, then come inputs, then weights. Autograd passes
            # each on to what has computed that tensor: an earlier scan, plain operations, and at last the parameters.
            return None, *_backward(job, reading, ctx.tape, carries, tensors, result_grads)


def _forward(job: Job, reading: Iterator[RawTiles], weights: Sequence[Tensor], tape: Tape | None) -> list[Tensor]:
    """Scan the tiles that `reading` gives, in raster order; `tape` takes what a backward pass needs."""
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
                made = tape.keep_recorded(k, *_record(job, tape, i, j, above, left, next(reading), weights))
        else:
            tiles = job.normalised(next(reading), i, j)
            made = step(job, i, j, above, left, tiles, by_name, tape.new_carry if tape else compact)
            del tiles
        del above, left
        below[i, j], right[i, j] = made.below, made.right
        results.add(made, i, j)
        del made
        job.step_done("forward", k + 1, (*results.maps.values(), *(tape.arena_blocks() if tape else ())))
    return results.finished()


def _backward(
    job: Job,
    reading: Iterator[RawTiles],
    tape: Tape,
    carries: list[tuple[Carry, Carry]],
    tensors: Sequence[Tensor | None],
    result_grads: ResultGradients,
) -> list[Tensor | None]:
    """Scan in reverse, from the `carries` of each step; `reading` gives the tiles of the steps that were not recorded.

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
            recorded = _record(job, tape, i, j, above, left, next(reading), weights)[0]
        received = [*above.values(), *left.values()]
        del above, left
        handed_on = recorded.handed_on(grad_below.pop((i, j), {}), grad_right.pop((i, j), {}))
        arriving = [*handed_on, *result_grads.at(job, recorded, i, j)]
        recorded.reduced.clear()  # what the reductions read is not needed any more
        leaves = [x for x in (*recorded.leaves, *tape.leaves) if x.requires_grad]
        if arriving:
            torch.autograd.backward([x for x, _ in arriving], [g for _, g in arriving], inputs=leaves)  # type: ignore[arg-type]
        del handed_on, arriving, leaves
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
    job: Job, tape: Tape, i: int, j: int, above: Carry, left: Carry, raw_tiles: RawTiles, weights: Sequence[Tensor]
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
        zipped = zip(raw_tiles, tape.inputs_needed, strict=True)
        raws = [x.detach().requires_grad_() if x is not None and need else x for x, need in zipped]
        made = step(job, i, j, above, left, job.normalised(raws, i, j), tape.weights(job, weights), compact)
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
    as_carry: Callable[[Tensor], Tensor],
) -> Made:
    """One step of the scan: a pure function of the carries received, and of the new tiles of the stage inputs.

    What is cut out for the step below and for the one to the right is handed on as `as_carry` gives it. Of `job` it needs the
    grid, the foreground and the seed of random masks.
    """
    grid, stage = job.grid, job.grid.stage
    made = Made({}, {}, {}, {})
    # Maps are in topological order: all that a map reads has been cut out of its sources' buffers when its turn comes.
    cut_for: dict[tuple[int, int], Tensor] = {}  # by its reader, and which of the reader's sources it is
    for v, value in enumerate(stage.values):
        new = None
        *_, height, width = grid.box(v, i, j)
        if height and width:
            if value.placed is None:
                new = _input(value, tiles[v], height, width)
            else:
                read = [cut_for.pop((v, source)) for source in range(len(value.sources))]
                context = TileContext(*grid.spans(v, i, j), weights, job.seed, job.masks(v, i, j))
                if value.reduction is not None:
                    made.reduced[v] = read, context
                    continue
                new = value.placed.run(read, context)
                del read
            value.check_tile(new, height, width)
            if v in stage.outputs:
                made.outputs[v] = new = new.relu_() if value.rectified else new
        buffer = grid.buffer(v, i, j)
        if not buffer.cuts:
            continue
        if new is None and v not in left and v not in above:  # not begun, and read by what is joined to it
            new = torch.empty(value.tile_shape(*buffer.layout.size), dtype=value.dtype, device=job.device)
        rectify = value.rectified and v not in made.outputs
        cuts = list(cut_out((left.get(v), above.get(v), new), value.axes, buffer.layout, buffer.cuts, rectify))
        del new
        if buffer.carries_right:
            made.right[v] = as_carry(cuts.pop())
        if buffer.carries_below:
            made.below[v] = as_carry(cuts.pop())
        cut_for.update(zip(buffer.readers, cuts, strict=True))
        del cuts
    return made


def _input(value: Value, tile: Tensor | None, height: int, width: int) -> Tensor:
    """A new tile of a stage input; a weight that is as large as the image along one axis only is expanded along both."""
    assert tile is not None
    return tile.expand(value.tile_shape(height, width))
