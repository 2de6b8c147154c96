"""Results of a scan, put together from its tiles, and the gradients that enter and leave its backward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from widefield.streaming.grid import Grid
from widefield.streaming.job import Job
from widefield.streaming.program import Stage
from widefield.streaming.rules.rolled import straight
from widefield.streaming.tape import Made, Recorded


class Results:
    """The output maps, written tile by tile, and the reductions, gathered over the tiles.

    Of an output map there is the part that is made, of a reduction over nothing an empty tensor for each part.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.maps: dict[int, Tensor] = {}
        self.gathered: dict[int, Any] = {}

    def add(self, made: Made, i: int, j: int) -> None:
        """Take what step (i, j) has made."""
        values = self.job.grid.stage.values
        for v, (windows, context) in made.reduced.items():
            reduction = values[v].reduction
            assert reduction is not None
            state = reduction.gather([x.detach() for x in windows], context)
            self.gathered[v] = self._merge(v, self.gathered[v], state) if v in self.gathered else state
        for v, output in self.job.written.items():
            if v in made.outputs:
                y, x, *_ = self.job.grid.box(v, i, j)
                output.add(made.outputs[v], y, x)
            output.rows_done(self.job.first_row(v, i))
        for v, tile in made.outputs.items():
            if v in self.job.replaced:
                continue
            if v not in self.maps:
                if self._is_all(v, tile, i, j):
                    self.maps[v] = tile.detach()
                    continue
                self.maps[v] = self.job.new(v, tile)
            axes, y = values[v].axes, 0
            for pieces in self.job.tiles_of(self.maps[v], v, i, j):
                height, x = pieces[0].shape[axes.rows], 0
                for piece in pieces:
                    width = piece.shape[axes.cols]
                    self.job.store.write(piece, tile.narrow(axes.rows, y, height).narrow(axes.cols, x, width))
                    x += width
                y += height

    def _is_all(self, v: int, tile: Tensor, i: int, j: int) -> bool:
        """True if a tile can be what is stored of map v: all that is made of it, on the device, in memory of its own."""
        job = self.job
        if v not in job.grid.stage.stored or job.store.place != "device" or job.grid.stage.values[v].target is straight:
            return False
        return job.grid.box(v, i, j) == job.boxes[v] and tile.untyped_storage().nbytes() == tile.nbytes

    def _merge(self, v: int, one: Any, other: Any) -> Any:
        reduction = self.job.grid.stage.values[v].reduction
        assert reduction is not None
        return reduction.merge(one, other)

    def finished(self) -> list[Tensor]:
        """Return the output maps, then the parts of the reductions."""
        results: list[Tensor] = []
        stage = self.job.grid.stage
        if self.job.ranks is not None and stage.reductions:
            self.gathered = self.job.ranks.merge(self.gathered, self._merge, self.job.device)
        for v in (*stage.outputs, *stage.reductions):
            value, empty = stage.values[v], torch.empty(0, dtype=stage.values[v].dtype, device=self.job.device)
            if value.reduction is None:
                results.append(self.maps[v] if v in self.maps else self.job.new(v, empty))
            else:
                done = v in self.gathered
                results += value.reduction.finish(self.gathered[v]) if done else [empty.clone() for _ in value.parts]
        return results


@dataclass(frozen=True)
class ResultGradients:
    """The gradients of output maps by their number, and of reductions: the parts that came out, and the gradient of each."""

    maps: dict[int, Tensor]
    reductions: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]]

    @staticmethod
    def of(stage: Stage, parts: Sequence[Tensor], grads: Sequence[Tensor | None]) -> "ResultGradients":
        """Return `grads`, which are those of the output maps and then of the `parts` of all reductions, by map and by reduction."""
        maps = {v: grad for v, grad in zip(stage.outputs, grads, strict=False) if grad is not None}
        given = iter(zip(parts, grads[len(stage.outputs) :], strict=True))
        reductions = {}
        for v in stage.reductions:
            found = [next(given) for _ in stage.values[v].parts]
            if any(grad is not None for _, grad in found):
                reductions[v] = tuple(part for part, _ in found), tuple(grad for _, grad in found)
        return ResultGradients(maps, reductions)

    def at(self, job: Job, recorded: Recorded, i: int, j: int) -> Iterator[tuple[Tensor | GradientEdge, Tensor]]:
        """Return where a gradient enters step (i, j), and the gradient."""
        for v, grad in self.maps.items():
            if v in recorded.outputs:
                axes, pieces = job.grid.stage.values[v].axes, job.tiles_of(grad, v, i, j)
                rows = [_joined(row, axes.cols) for row in pieces]
                yield recorded.outputs[v], _joined(rows, axes.rows).to(job.device)
        for v, (parts, grads) in self.reductions.items():
            reduction = job.grid.stage.values[v].reduction
            if reduction is not None and v in recorded.reduced:
                pulled = reduction.pull(parts, *recorded.reduced[v], grads)
                yield from ((x, grad) for x, grad in pulled if x.requires_grad)


def _joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim)


class InputGradients:
    """The gradients of the stage inputs, put together tile by tile; None in `wholes` where none is needed.

    Those of maps between stages of which every position is read are `written`, the others summed up.
    """

    def __init__(self, job: Job, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self.job = job
        self.wholes: list[Tensor | None] = []
        self.written: list[bool] = []
        for v, reader, x, need in zip(job.grid.stage.inputs, job.readers, inputs, needed, strict=True):
            written = reader.store is not None and isinstance(job.grid, Grid) and job.grid.covers(v)
            self.written.append(written)
            self.wholes.append(reader.gradient(x, zeros=not written) if need and x is not None else None)

    def add(self, raw_tiles: Sequence[Tensor | None], i: int, j: int) -> None:
        """Add the gradients of the tiles of step (i, j)."""
        for k, (v, raw, whole) in enumerate(zip(self.job.grid.stage.inputs, raw_tiles, self.wholes, strict=True)):
            if raw is None or whole is None:
                continue
            view = self.job.readers[k].view(whole, *self.job.grid.box(v, i, j))
            if not self.written[k]:
                if raw.grad is not None:
                    view.add_(raw.grad.to(whole.device))
            elif raw.grad is None:
                view.zero_()
            else:
                self.job.store.write(view, raw.grad)
