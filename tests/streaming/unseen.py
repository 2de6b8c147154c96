"""A small network around a function, to show what a capture does not see, and its comparison with the plain one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.streaming.exactness import relative_error

SCALE = 2.0  # of a module that forward may read
IMAGE = torch.rand(1, 3, 23, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, then `function(net, x)`."""

    def __init__(self, function: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.function = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), function
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("offset", torch.rand(4, 1, 1))
        self.double()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.a(x))


def results(call: Callable[[Tensor], Any], module: nn.Module) -> dict[str, Tensor]:
    """Outputs and all gradients, with gradients enabled and without."""
    module.zero_grad()
    image = IMAGE.clone().requires_grad_()
    found = call(image)
    leaves = [found] if isinstance(found, Tensor) else list(found)
    sum(
        (leaf * torch.arange(leaf.numel()).reshape(leaf.shape).cos()).sum() for leaf in leaves if leaf.requires_grad
    ).backward()
    named = {f"output {k}": leaf.detach() for k, leaf in enumerate(leaves)}
    named.update(
        {name: p.grad.clone() for name, p in [("image", image), *module.named_parameters()] if p.grad is not None}
    )
    module.zero_grad()
    with torch.no_grad():
        named["without gradients"] = torch.cat([leaf.reshape(-1) for leaf in pytree_list(call(IMAGE))])
    return named


def pytree_list(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def assert_equal_results(streamed: Callable[[Tensor], Any], module: nn.Module) -> None:
    expected, found = results(module, module), results(streamed, module)
    for name in expected:
        other = found.get(name, torch.zeros_like(expected[name]))
        assert relative_error(other, expected[name]) < 1e-10, name
