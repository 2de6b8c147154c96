"""Functions with a backward of their own, hooks, computed weights: exact, or refused before any pixel is computed."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.streaming.exactness import relative_error
from tests.streaming.unseen import IMAGE, Net, assert_equal_results
from widefield.streaming import StreamingCNN, UnsupportedOpError, VerificationError, register_op


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -grad


class Round(torch.autograd.Function):
    """A straight-through estimator with a learned scale and a plain argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x)
        return (x * levels / scale).round() * scale / levels

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad, (grad * x.sign()).sum((0, 2, 3)).view(-1, 1, 1), None


class OwnSwish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        s = ctx.saved_tensors[0].sigmoid()
        return grad * s * (1 + ctx.saved_tensors[0] * (1 - s)) * 0.5  # not the true one, so that it is noticed


class Scaled(torch.autograd.Function):
    """A forward pass without the context, and a default."""

    @staticmethod
    def forward(x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -grad * ctx.scale, None


class WholeMaximum(torch.autograd.Function):
    """Not pointwise, whatever is said of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / x.abs().max()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


apply_by_another_name = Reverse.apply

FUNCTIONS: dict[str, Callable[[Net, Tensor], Any]] = {
    "called": lambda net, x: Reverse.apply(x),
    "by another name": lambda net, x: apply_by_another_name(x),
    "between layers": lambda net, x: net.b(OwnSwish.apply(x)),
    "of a weight": lambda net, x: x * Reverse.apply(net.gain),
    "with a scale": lambda net, x: Round.apply(x, net.gain, 4),
    "that sets its context up": lambda net, x: Scaled.apply(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_with_its_own_backward_is_refused_in_training_and_exact_in_inference(name: str) -> None:
    net = Net(FUNCTIONS[name])
    streamed = StreamingCNN(net, 7, verify=False)
    with pytest.raises(UnsupportedOpError, match="has a backward of its own"):
        streamed(IMAGE)
    with torch.no_grad():
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12


@pytest.fixture
def registered() -> Iterator[None]:
    from widefield.streaming.pointwise_functions import PointwiseCall

    for function in (Reverse, Round, OwnSwish, Scaled, WholeMaximum):
        register_op(function)
    yield
    PointwiseCall.known.clear()


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_registered_function_keeps_its_backward(name: str) -> None:
    net = Net(FUNCTIONS[name])
    assert_equal_results(StreamingCNN(net, 7, verify=False), net)


@pytest.mark.usefixtures("registered")
def test_a_function_that_was_registered_wrongly_is_found() -> None:
    with pytest.raises(VerificationError, match="gives another result"):
        StreamingCNN(Net(lambda net, x: WholeMaximum.apply(x)), 7)(IMAGE)


def test_register_op_takes_functions_only() -> None:
    with pytest.raises(ValueError, match=r"torch\.autograd\.Function"):
        register_op(torch.relu)  # type: ignore[arg-type]


# --- hooks --------------------------------------------------------------------------------------------------------------------


def backward_pre_hook(net: Net) -> None:
    net.a.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 10,))


def backward_hook(net: Net) -> None:
    net.b.register_full_backward_hook(lambda module, into, out: (into[0] * 10,))


def backward_hook_of_the_whole(net: Net) -> None:
    net.register_full_backward_hook(lambda module, into, out: None)


@pytest.mark.parametrize("register", [backward_pre_hook, backward_hook, backward_hook_of_the_whole])
def test_backward_hooks_of_modules_are_refused_in_training(register: Callable[[Net], None]) -> None:
    net = Net(lambda net, x: net.b(x))
    register(net)
    streamed = StreamingCNN(net, 7, verify=False)
    with pytest.raises(UnsupportedOpError, match="a backward hook of the module"):
        streamed(IMAGE)
    with torch.no_grad():
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12


def test_a_backward_hook_of_all_modules_is_refused() -> None:
    handle = nn.modules.module.register_module_full_backward_hook(lambda module, into, out: None)
    try:
        with pytest.raises(UnsupportedOpError, match="global backward hook"):
            StreamingCNN(Net(lambda net, x: x), 7)(IMAGE)
    finally:
        handle.remove()


def hooked(net: Net, x: Tensor) -> Tensor:
    x = net.b(x)
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 10)
    return x


def multiplied(net: Net, x: Tensor) -> Tensor:
    y = net.b(x)
    if torch.is_grad_enabled():
        torch.autograd.graph.register_multi_grad_hook([y], lambda grads: None)
    return y


def kept(net: Net, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.retain_grad()
    return net.b(x)


def differentiated(net: Net, x: Tensor) -> Tensor:
    return x * torch.autograd.grad(net.b(x).sum(), x)[0].mean() if torch.is_grad_enabled() else x


@pytest.mark.parametrize("function", [hooked, multiplied, kept, differentiated])
def test_what_forward_does_with_gradients_is_refused_by_name(function: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(function)
    streamed = StreamingCNN(net, 7, verify=False)
    with pytest.raises(
        UnsupportedOpError, match=r"registers a hook|keeps the gradient|computes gradients|graph of autograd"
    ):
        streamed(IMAGE)
    with torch.no_grad():
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12


def test_hooks_on_parameters_and_on_the_image_are_honoured() -> None:
    net = Net(lambda net, x: net.b(x) * net.gain)
    net.gain.register_hook(lambda grad: grad * 10)
    net.b.weight.register_hook(lambda grad: grad.clamp(-1, 1))
    assert_equal_results(StreamingCNN(net, 7, verify=False), net)


def test_forward_hooks_that_change_results_are_honoured() -> None:
    net = Net(lambda net, x: net.b(x))
    net.a.register_forward_hook(lambda module, args, out: out * 3)
    net.b.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    streamed = StreamingCNN(net, 7, verify=False)
    assert_equal_results(streamed, net)
    net.a._forward_hooks.clear()
    net.a.register_forward_hook(lambda module, args, out: out * 5)  # as many hooks as before
    assert_equal_results(streamed, net)


@pytest.mark.parametrize("put", ["dict", "list", "object"])
def test_forward_hooks_that_put_maps_away_are_refused(put: str) -> None:
    net, features, maps, holder = Net(lambda net, x: net.b(x)), {}, [], types.SimpleNamespace()
    store = {
        "dict": lambda module, args, out: features.update(b=out),
        "list": lambda module, args, out: maps.append(out.detach()),
        "object": lambda module, args, out: setattr(holder, "last", out.mean()),
    }
    net.b.register_forward_hook(store[put])
    with pytest.raises(UnsupportedOpError, match="puts a tensor away"):
        StreamingCNN(net, 7, verify=False)(IMAGE)
    assert not features
    assert not maps
    assert not vars(holder)


# --- weights that are computed from others ------------------------------------------------------------------------------------


def weight_norm(net: Net) -> None:
    nn.utils.parametrizations.weight_norm(net.b)


def spectral_norm(net: Net) -> None:
    nn.utils.parametrizations.spectral_norm(net.b)


def orthogonal(net: Net) -> None:
    nn.utils.parametrizations.orthogonal(net.b)


def pruned(net: Net) -> None:
    prune.random_unstructured(net.b, "weight", 0.4)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.rand(1, 36).double()), nn.Parameter(torch.rand(4, 1).double())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def low_rank(net: Net) -> None:
    parametrize.register_parametrization(net.b, "weight", LowRank())


@pytest.mark.parametrize("change", [weight_norm, spectral_norm, orthogonal, pruned, low_rank])
def test_weights_computed_from_others_stay_exact(change: Callable[[Net], None]) -> None:
    net = Net(lambda net, x: net.b(x))
    change(net)
    assert_equal_results(StreamingCNN(net.eval(), 7), net)
