"""The record that a forward pass leaves for its backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from widefield.streaming.arena import Arena
from widefield.streaming.job import Job
from widefield.streaming.program import Stage
from widefield.streaming.rules import TileContext

ByMap = dict[int, Tensor]  # by the index of a map
Carry = ByMap  # what is kept of each map for a later step, or its gradient
Windows = dict[int, tuple[list[Tensor], TileContext]]  # what a reduction reads, by the reduction's index


class Made(NamedTuple):
    """Results of a step: new tiles of the maps that leave the stage, new windows that its reductions read, and the carries."""

    outputs: ByMap
    reduced: Windows
    below: Carry
    right: Carry


@dataclass
class Recorded:
    """A recorded step: leaves of autograd (the carries received, the new tiles of the inputs) and where gradients enter."""

    above: Carry
    left: Carry
    raws: list[Tensor | None]
    outputs: dict[int, GradientEdge]
    below: dict[int, GradientEdge]
    right: dict[int, GradientEdge]
    reduced: Windows

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors of this step alone whose gradients may be wanted."""
        return [x for x in (*self.above.values(), *self.left.values(), *self.raws) if x is not None]

    def handed_on(self, grad_below: Carry, grad_right: Carry) -> list[tuple[GradientEdge, Tensor]]:
        """Return the gradients that later steps have left for the carries handed on, and where each enters."""
        both = (self.below, grad_below), (self.right, grad_right)
        return [(edges[v], grad) for edges, grads in both for v, grad in grads.items() if v in edges]


class Tape:
    """The record that a forward pass leaves for its backward pass, apart from tensors that autograd keeps.

    `inputs_needed` and `weights_needed` say of each input and weight whether its gradient is, and `requires_grad` of each map
    whether it depends on one of those. `leaves` sum the tiles' gradients of the weights, in float32 or better: 256 tiles summed
    in bfloat16 are 3% off.
    """

    def __init__(self, job: Job, weights: Sequence[Tensor], needed: Sequence[bool]) -> None:
        n = len(job.readers)
        self.inputs_needed, self.weights_needed = tuple(needed[:n]), tuple(needed[n:])
        names = {name for name, need in zip(job.weight_names, self.weights_needed, strict=True) if need}
        self.stage = job.grid.stage
        self.requires_grad = _requires_grad(self.stage, names, self.inputs_needed)
        self.arena = Arena(job.carry_store, job.carry_sizes)
        self.layout: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.pieces: list[Tensor] = []
        self.steps: dict[int, Recorded] = {}
        self.leaves = self._new_leaves(weights) if job.recorded else []

    def _new_leaves(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [
            weight.detach()
            .to(torch.promote_types(weight.dtype, torch.float32) if need else weight.dtype)
            .requires_grad_(need)
            for weight, need in zip(weights, self.weights_needed, strict=True)
        ]

    def new_carry(self, piece: Tensor) -> Tensor:
        """A carry for the next step, not a view of the buffer that it was cut from; in the arena, if that is on the device.

        What a step hands on as it has received it is there already.
        """
        if self.arena.holds(piece):
            return piece
        return self.arena.put(piece) if self.arena.store.place == "device" else compact(piece)

    def keep_recorded(self, k: int, recorded: Recorded, made: Made) -> Made:
        """Keep step `k` for the backward pass; return what it has made, with carries for the next steps."""
        self.steps[k] = recorded
        below, right = ({v: self.new_carry(x.detach()) for v, x in of.items()} for of in (made.below, made.right))
        return made._replace(below=below, right=right)

    def constant(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Return those of the scan's results that depend on nothing that requires grad, or have no gradient."""
        values = (*self.stage.outputs, *(v for v in self.stage.reductions for _ in self.stage.values[v].parts))
        zipped = zip(results, values, strict=True)
        return [x for x, v in zipped if not (self.requires_grad[v] and (x.is_floating_point() or x.is_complex()))]

    def save_received(self, above: Carry, left: Carry) -> None:
        """Keep what a step has received."""
        self.layout.append((tuple(above), tuple(left)))
        pieces = (*above.values(), *left.values())
        self.pieces += [x if self.arena.holds(x) else self.arena.put(x) for x in pieces]

    def take_pieces(self) -> list[Tensor]:
        """All that was saved, which autograd keeps from now on."""
        pieces, self.pieces = self.pieces, []
        self.arena = Arena(self.arena.store, {})  # the blocks are held by the pieces alone, and go with them
        return pieces

    def arena_blocks(self) -> list[Tensor]:
        """Return the memory in which carries lie."""
        return [block for blocks in self.arena.blocks.values() for block in blocks]

    def carries(self, pieces: Sequence[Tensor]) -> list[tuple[Carry, Carry]]:
        """Return what each step has received, of all that was saved."""
        rest = iter(pieces)
        return [({v: next(rest) for v in above}, {v: next(rest) for v in left}) for above, left in self.layout]

    def start(self, weights: Sequence[Tensor]) -> None:
        """Begin a backward pass: leaves without gradients."""
        self.leaves = self.leaves or self._new_leaves(weights)
        for leaf in self.leaves:
            leaf.grad = None

    def weights(self, job: Job, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """The leaves as a step uses them."""
        zipped = zip(job.weight_names, self.leaves, weights, strict=True)
        return {name: leaf.to(weight.dtype) for name, leaf, weight in zipped}

    def take_gradients(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the weights. A second backward pass begins with new leaves."""
        leaves, self.leaves = self.leaves, []
        zipped = zip(leaves, weights, strict=True)
        return [None if leaf.grad is None else leaf.grad.to(weight.dtype) for leaf, weight in zipped]


def compact(piece: Tensor) -> Tensor:
    """A carry of the forward pass without the buffer that it was cut from, which a view would keep alive."""
    if torch.is_grad_enabled() or piece.untyped_storage().nbytes() <= 1.25 * piece.nbytes:
        return piece
    return piece.clone()


def _requires_grad(stage: Stage, weights: set[str], inputs: Sequence[bool]) -> list[bool]:
    """For each map, True if it depends on something that requires grad."""
    requires_grad: list[bool] = []
    for v, value in enumerate(stage.values):
        own = inputs[v] if value.placed is None else any(name in weights for name in value.weights)
        reached = own or any(requires_grad[source] for source in value.sources)
        discrete = not (value.dtype.is_floating_point or value.dtype.is_complex)
        constant = value.reduction is None and (discrete or value.facts.stops_gradients)
        requires_grad.append(reached and not constant)
    return requires_grad
