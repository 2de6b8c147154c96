"""Compare a streamed module with plain PyTorch on the whole image, in float64: outputs and every gradient."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from widefield.streaming import StreamingCNN

TOLERANCE = 1e-10


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / max(expected.double().abs().max().item(), 1e-30) if difference else 0.0


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norm layers non-trivial statistics and affine parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _NormBase):
                if part.running_mean is not None:
                    part.running_mean.normal_(generator=generator)
                    part.running_var.uniform_(0.5, 2.0, generator=generator)
                if part.affine:
                    part.weight.uniform_(0.5, 1.5, generator=generator)
                    part.bias.normal_(generator=generator)
    return module


def plain_reference(module: nn.Module) -> nn.Module:
    """A copy of the module as the engine defines the reference: norm layers with running statistics in evaluation mode."""
    reference = copy.deepcopy(module)
    for part in reference.modules():
        if isinstance(part, _NormBase):
            part.train(part.training and not part.track_running_stats)
            part.register_forward_hook(_guard)
        elif isinstance(part, nn.AvgPool2d):
            part.register_forward_pre_hook(
                lambda layer, args: args[0].contiguous()
            )  # else wrong on CUDA before torch 2.14
    return reference


def _guard(layer: nn.Module, args: Any, out: Tensor) -> None:
    """Plain batch and instance norm on the CPU give wrong gradients where that of a batch of 1 has other strides (torch 2.15)."""
    if out.requires_grad and len(out) == 1:
        out.register_hook(_restrided)


def _restrided(grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    return grad.as_strided(grad.shape, (grad.numel(), *grad.stride()[1:]))


def assert_exact(
    module: nn.Module,
    image: Tensor,
    tile_sizes: Sequence[Any],
    wrap: Callable[..., StreamingCNN] = StreamingCNN,
    tolerance: float = TOLERANCE,
) -> StreamingCNN:
    """Outputs, the image's gradient and all parameter gradients agree with the whole-image result, for every tile size."""
    module = module.double()
    reference = plain_reference(module)
    reference.zero_grad()
    whole = image.detach().double().requires_grad_()
    expected, spec = pytree.tree_flatten(reference(whole))
    _backward(expected)
    streamed = wrap(module)
    streamed.verify = False  # the comparison below is stricter
    for tile_size in tile_sizes:
        streamed.tile_size = tile_size
        module.zero_grad()
        tiled = image.detach().double().requires_grad_()
        found, found_spec = pytree.tree_flatten(streamed(tiled))
        assert found_spec == spec
        for f, e in zip(found, expected, strict=True):
            if isinstance(e, Tensor):
                assert f.requires_grad == e.requires_grad
                assert f.dtype == e.dtype
                error = relative_error(f.detach(), e.detach())
                assert error <= tolerance, f"tile {tile_size}: output differs by {error:.2e}"
            else:
                assert f == e
        _backward(found)
        if whole.grad is not None:
            error = relative_error(tiled.grad, whole.grad)
            assert error <= tolerance, f"tile {tile_size}: the image's gradient differs by {error:.2e}"
        for (name, p), (_, q) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
            if q.grad is None:
                assert p.grad is None or not p.grad.any(), name
            else:
                assert p.grad is not None, f"{name} has no gradient"
                error = relative_error(p.grad, q.grad)
                assert error <= tolerance, f"tile {tile_size}: {name} differs by {error:.2e}"
    module.zero_grad()
    return streamed


def _backward(leaves: Sequence[Any]) -> None:
    """Backward from a random weighting of all outputs, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    terms = [
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=generator.device).to(leaf)).sum()
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if terms:
        torch.stack(terms).sum().backward()
