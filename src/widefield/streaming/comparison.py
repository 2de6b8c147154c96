"""Two passes of a module, compared: all outputs, and the gradients of a random weighting of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PIECE = 1 << 20  # numbers that are compared at a time


@dataclass(frozen=True)
class Outcome:
    """Outputs of a module (all leaves, and their structure) and gradients by name ("" for the image)."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    gradients: dict[str, Tensor]


def outcome(
    result: Any,
    module: nn.Module,
    image: Tensor,
    maps: Sequence[Tensor] = (),
    outputs_only: bool = False,
    wanted: dict[str, Tensor] | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> Outcome:
    """Return the outputs of a forward pass, and the gradients of its backward pass where gradients are enabled.

    Args:
        result: what `module` gives for `image`.
        module: whose parameters' gradients are taken, of a weighting of all outputs that is drawn by `seed`.
        image: whose gradient is taken, if it requires one.
        maps: other inputs, likewise; they are called "map 1" and so on.
        outputs_only: take no gradients.
        wanted: tensors by name whose gradients are taken in place of those.
        seed: another seed gives other weights.
        scale: what the weights are multiplied by.
    """
    leaves, spec = pytree.tree_flatten(result)
    generator = torch.Generator("cpu").manual_seed(seed + 1)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)).sum()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    inputs = {"": image, **{f"map {k}": x for k, x in enumerate(maps, 1)}}
    named = {**inputs, **dict(module.named_parameters())} if wanted is None else wanted
    wanted = {name: x for name, x in named.items() if x.requires_grad and torch.is_grad_enabled() and not outputs_only}
    gradients: dict[str, Tensor] = {}
    if terms and wanted:
        total = torch.stack([term.double() for term in terms]).sum() * scale
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        gradients = {name: g.detach() for name, g in zip(wanted, found, strict=True) if g is not None}
    return Outcome(tuple(x.detach() if isinstance(x, Tensor) else x for x in leaves), spec, gradients)


class Difference(NamedTuple):
    """A difference between two passes: of the "structure" of the result, an "output" by number or a "gradient" by name."""

    kind: Literal["structure", "output", "gradient"]
    name: str
    error: float  # relative
    found: Any = None
    expected: Any = None

    def __str__(self) -> str:
        if self.kind == "structure":
            return "structure of the result"
        return f"{self.kind} {self.name}" if self.kind == "output" else f"gradient of {self.name or 'the image'}"


def differences(found: Outcome, expected: Outcome, order: float = 2, floor: float = 1e-3) -> list[Difference]:
    """Return how much each output and each gradient differs.

    Args:
        found: what is compared.
        expected: what it should be.
        order: of the norm, 2 or infinity.
        floor: gradients are compared with at least this share of the largest one: that of a bias before a norm layer is noise.
    """
    if found.spec != expected.spec:
        return [Difference("structure", "", torch.inf, found.spec, expected.spec)]
    result = []
    for k, (f, e) in enumerate(zip(found.leaves, expected.leaves, strict=True)):
        if isinstance(f, Tensor) and isinstance(e, Tensor):
            error = relative_error(f, e, order)
        else:
            error = 0.0 if isinstance(f, type(e)) and f == e else torch.inf
        result.append(Difference("output", str(k), error, f, e))
    largest = max((_norm(g, order) for name, g in expected.gradients.items() if name), default=0.0)
    for name in {**expected.gradients, **found.gradients}:
        f, e = found.gradients.get(name), expected.gradients.get(name)
        given = f if f is not None else e
        assert given is not None
        f, e = (torch.zeros_like(given) if x is None else x for x in (f, e))  # none and zero mean the same
        error = relative_error(f, e, order, floor * largest if name else 0.0)
        result.append(Difference("gradient", name, error, f, e))
    return result


def largest_difference(found: Outcome, expected: Outcome) -> Difference:
    """Return the largest of the `differences`."""
    return max(differences(found, expected), key=lambda one: one.error, default=Difference("output", "", 0.0))


def relative_error(found: Tensor, expected: Tensor, order: float = 2, floor: float = 0.0) -> float:
    """Return the norm of a difference relative to that of `expected`, but at least to `floor`; infinite for another shape.

    Of numbers that are not floating it is the share that differs.
    """
    if found.shape != expected.shape:
        return torch.inf
    if found.is_complex() and expected.is_complex():
        found, expected = torch.view_as_real(found.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    if not expected.is_floating_point():
        return (found != expected).double().mean().item() if found.numel() else 0.0
    both = list(zip(_pieces(found), _pieces(expected), strict=True))
    if not all(torch.equal(f.isfinite(), e.isfinite()) for f, e in both):
        return torch.inf
    difference = _norm_of((f.double() - e.double() for f, e in both), order)
    return difference / max(_norm(expected, order), floor, 1e-300) if difference else 0.0


def _norm(x: Tensor, order: float) -> float:
    return _norm_of((piece.double() for piece in _pieces(x)), order)


def _norm_of(pieces: Iterable[Tensor], order: float) -> float:
    """Return the norm of all numbers together, those that are not finite left out."""
    norms = [torch.linalg.vector_norm(x.nan_to_num(0.0, 0.0, 0.0), order).item() for x in pieces if x.numel()]
    return float(np.linalg.norm(norms, order)) if norms else 0.0


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Return pieces of the numbers, in their order: the gradient of a large layer has no room four times in float64."""
    return x.detach().reshape(-1).split(_PIECE)


def contiguous_gradient(layer: nn.Module, inputs: Any, output: Any) -> None:
    """On the CPU, PyTorch's batch norm is wrong for a gradient of a single image with a small first stride (torch 2.15)."""
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
