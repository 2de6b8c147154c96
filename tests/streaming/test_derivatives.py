"""Ways to differentiate that a streamed network has not are refused by name: no derivative gets lost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad

from widefield.streaming import StreamingCNN

IMAGE = torch.rand(1, 3, 12, 9, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's forward mode would first compile, for seconds and with a warning, formulas that are not used here."""
    monkeypatch.setenv("PYTORCH_JIT", "0")


def streamed(trainable: bool) -> StreamingCNN:
    return StreamingCNN(nn.Conv2d(3, 4, 3).double().requires_grad_(trainable), 5)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_dual_image_is_refused(trainable: bool) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(IMAGE, torch.ones_like(IMAGE))
        with pytest.raises(ValueError, match="differentiated in forward mode"):
            streamed(trainable)(dual)
        assert streamed(trainable)(IMAGE).shape == (1, 4, 10, 7)  # no tangent: nothing to lose


def test_a_dual_weight_is_refused() -> None:
    network = streamed(False)
    with forward_ad.dual_level():
        weights = {name: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for name, p in network.named_parameters()}
        with pytest.raises(ValueError, match="differentiated in forward mode"):
            func.functional_call(network, weights, (IMAGE,))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: func.jvp(f, (x,), (x,)),
        lambda f, x: func.jacrev(f)(x),
        lambda f, x: func.vmap(f)(x[None]),
        lambda f, x: func.grad(lambda y: f(y).sum())(x),
    ],
)
def test_transforms_are_refused(transformed: Callable[[Callable[[Tensor], Tensor], Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"inside of a transform of torch.func"):
        transformed(streamed(False), IMAGE)
    assert isinstance(streamed(False)(IMAGE), Tensor)
