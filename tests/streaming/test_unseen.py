"""What torch.export does not see: exact, or refused before any pixel is computed, and nothing is left behind."""

import dataclasses
import functools
import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.streaming.exactness import relative_error
from widefield.streaming import StreamingCNN, UnsupportedOpError, VerificationError, capture, register_op
from widefield.streaming.watch import Watch

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


# --- autograd.Function --------------------------------------------------------------------------------------------------------


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
    from widefield.streaming.watch import PointwiseCall

    for function in (Reverse, Round, OwnSwish, WholeMaximum):
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


# --- what the trace depends on ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    scale: float = 2.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 2.0


class Configured(Net):
    of_class: ClassVar[float] = 2.0


SCALE, OUTER = 2.0, types.SimpleNamespace(scale=2.0)


def scaled_by_a_global(x: Tensor) -> Tensor:
    return x * SCALE * OUTER.scale


def _closure() -> tuple[Callable[[Net, Tensor], Tensor], Callable[[], None]]:
    scale = 2.0

    def change() -> None:
        nonlocal scale
        scale = 5.0

    return lambda net, x: x * scale, change


def _set(holder: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch, Net], None]:
    return lambda patch, net: patch.setattr(holder, name, value)


CLOSED, CHANGE_CLOSED = _closure()
ARRAY = np.full((4, 1, 1), 2.0)


def _attribute(make: Callable[[], Any]) -> Callable[[Net], None]:
    return lambda net: setattr(net, "cfg", make())


# what forward does, how the module is prepared, what changes
CHANGES: dict[str, tuple[Any, Any, Callable[[pytest.MonkeyPatch, Net], Any]]] = {
    "namespace": (
        lambda net, x: x * net.cfg.scale,
        _attribute(lambda: types.SimpleNamespace(scale=2.0)),
        lambda patch, net: setattr(net.cfg, "scale", 5.0),
    ),
    "dataclass": (
        lambda net, x: x * net.cfg.scale,
        _attribute(Settings),
        lambda patch, net: setattr(net.cfg, "scale", 5.0),
    ),
    "slots": (lambda net, x: x * net.cfg.scale, _attribute(Slotted), lambda patch, net: setattr(net.cfg, "scale", 5.0)),
    "deep": (
        lambda net, x: x * net.cfg["a"][0].scale,
        _attribute(lambda: {"a": [Settings()]}),
        lambda patch, net: setattr(net.cfg["a"][0], "scale", 5.0),
    ),
    "array": (
        lambda net, x: x * torch.from_numpy(net.cfg),
        _attribute(lambda: np.full((4, 1, 1), 2.0)),
        lambda patch, net: net.cfg.fill(5.0),
    ),
    "tensor past its version": (
        lambda net, x: x * net.cfg,
        _attribute(lambda: torch.full((4, 1, 1), 2.0).double()),
        lambda patch, net: net.cfg.numpy().fill(5.0),
    ),
    "class attribute": (
        lambda net, x: x * net.of_class,
        lambda net: None,
        _set(Configured, "of_class", 5.0),
    ),
    "global": (
        lambda net, x: scaled_by_a_global(x),
        lambda net: None,
        lambda patch, net: patch.setitem(globals(), "SCALE", 5.0),
    ),
    "object in a global": (lambda net, x: scaled_by_a_global(x), lambda net: None, _set(OUTER, "scale", 5.0)),
    "closure": (CLOSED, lambda net: None, lambda patch, net: CHANGE_CLOSED()),
    "partial": (
        lambda net, x: net.cfg(x),
        _attribute(lambda: functools.partial(torch.mul, other=2.0)),
        lambda patch, net: setattr(net, "cfg", functools.partial(torch.mul, other=5.0)),
    ),
    "method": (
        lambda net, x: x * net.cfg.value(),
        _attribute(lambda: types.SimpleNamespace(value=lambda: 2.0)),
        lambda patch, net: setattr(net.cfg, "value", lambda: 5.0),
    ),
    "forward": (
        lambda net, x: x,
        lambda net: None,
        lambda patch, net: setattr(net, "forward", types.MethodType(lambda self, x: self.a(x) * 5.0, net)),
    ),
    "not a number": (
        lambda net, x: x * (2.0 if net.cfg != net.cfg else 5.0),
        _attribute(lambda: float("nan")),
        lambda patch, net: setattr(net, "cfg", 1.0),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_forward_reads_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, prepare, change = CHANGES[name]
    net = Configured(function)
    prepare(net)
    streamed = StreamingCNN(net, 7, verify=False)
    with torch.no_grad():
        before = net(IMAGE)
        assert relative_error(streamed(IMAGE), before) < 1e-12
        change(monkeypatch, net)
        assert relative_error(before, net(IMAGE)) > 0.1
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12


def test_nothing_changed_is_not_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(lambda net, x: x * net.cfg.scale)
    net.cfg = types.SimpleNamespace(scale=float("nan"), other=[np.ones(3), {1, 2}, torch.ones(3), object(), print])
    streamed = StreamingCNN(net, 7, verify=False)
    streamed(IMAGE)
    monkeypatch.setattr("widefield.streaming.programs.capture", None)
    streamed(IMAGE)


# --- branches -----------------------------------------------------------------------------------------------------------------

BRANCHES: dict[str, Callable[[Net, Tensor], Any]] = {
    "grad mode": lambda net, x: x * (1 if torch.is_grad_enabled() else 2),
    "requires_grad of a map": lambda net, x: x * (1 if x.requires_grad else 2),
    "requires_grad of a weight": lambda net, x: x * (1 if net.gain.requires_grad else 2),
    "is_leaf": lambda net, x: x * (1 if x.is_leaf else 2),
    "training": lambda net, x: x * (1 if net.training else 2),
    "dtype": lambda net, x: x * (1 if x.dtype == torch.float64 else 2),
    "device": lambda net, x: x * (1 if x.device.type == "cpu" else 2),
    "size as text": lambda net, x: x * (1 if str(x.shape[2]) == "21" else 2) * (1 if f"{x.shape[3]}" == "17" else 2),
    "shape as text": lambda net, x: x * (1 if "21, 17" in str(tuple(x.shape)) else 2),
    "size as an int": lambda net, x: x * (1 if int(x.shape[2]) == 21 else 2),
    "autocast": lambda net, x: x * (2 if torch.is_autocast_enabled("cpu") else 1),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_are_those_of_the_pass_that_runs(name: str) -> None:
    net = Net(BRANCHES[name])
    streamed = StreamingCNN(net, 7, verify=False)
    assert_equal_results(streamed, net)
    net.eval().gain.requires_grad_(False)
    assert_equal_results(streamed, net)
    with torch.inference_mode():
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12


def test_a_branch_on_the_image_requiring_grad_is_that_of_the_image() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * (1 if x.requires_grad else 2)

    net = First()
    streamed = StreamingCNN(net, 7, verify=False)
    for image in (IMAGE, IMAGE.clone().requires_grad_(), IMAGE):
        assert relative_error(streamed(image).detach(), net(image).detach()) < 1e-12


def test_a_branch_on_autocast_is_taken_under_autocast() -> None:
    net = Net(lambda net, x: x * (2 if torch.is_autocast_enabled("cpu") else 1)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert relative_error(StreamingCNN(net, 7, verify=False)(IMAGE.float()), net(IMAGE.float())) < 0.02


# --- effects ------------------------------------------------------------------------------------------------------------------

MEMO: dict[Any, Tensor] = {}
LOG: list[Any] = []
COUNT = 0


@functools.lru_cache
def grid(height: int, width: int) -> Tensor:
    return torch.linspace(0, 1, width, dtype=torch.float64).expand(height, -1)


def memoised(net: Net, x: Tensor) -> Tensor:
    key = int(x.shape[2]), int(x.shape[3])
    if key not in MEMO:
        MEMO[key] = torch.linspace(0, 1, key[1], dtype=torch.float64).expand(key[0], -1)
    return x * MEMO[key]


class Cache:
    known: ClassVar[dict[Any, Tensor]] = {}


def in_a_class(net: Net, x: Tensor) -> Tensor:
    key = tuple(map(int, x.shape[2:]))
    return x * Cache.known.setdefault(key, torch.ones(key, dtype=torch.float64) * 3)


def in_an_attribute(net: Net, x: Tensor) -> Tensor:
    if not hasattr(net, "grid") or net.grid.shape != x.shape[2:]:
        net.grid = torch.ones(tuple(map(int, x.shape[2:])), dtype=torch.float64) * 3
    return x * net.grid


@pytest.mark.parametrize(
    "function", [lambda net, x: x * grid(int(x.shape[2]), int(x.shape[3])), memoised, in_a_class, in_an_attribute]
)
@pytest.mark.parametrize("plain_first", [False, True])
def test_caches_stay_clean(function: Callable[[Net, Tensor], Tensor], plain_first: bool) -> None:
    grid.cache_clear(), MEMO.clear(), Cache.known.clear()
    net = Net(function)
    streamed = StreamingCNN(net, 7, verify=False)
    if plain_first:
        net(IMAGE)
    streamed(IMAGE)
    assert type(net(IMAGE)) is Tensor
    assert all(type(kept) is Tensor for kept in (*MEMO.values(), *Cache.known.values()))
    assert_equal_results(streamed, net)


def logs(net: Net, x: Tensor) -> Tensor:
    LOG.append(1)
    return x


def logs_maps(net: Net, x: Tensor) -> Tensor:
    LOG.append(x)
    return x


def counts(net: Net, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return x * COUNT


def counts_in_a_dict(net: Net, x: Tensor) -> Tensor:
    MEMO["count"] = MEMO.get("count", 0) + 1
    MEMO["count"] += 1
    return x * MEMO["count"]


class Counter:
    calls = 0


def counts_in_a_class(net: Net, x: Tensor) -> Tensor:
    Counter.calls += 1
    return x * Counter.calls


def clamps_data(net: Net, x: Tensor) -> Tensor:
    net.b.weight.data.clamp_(-0.1, 0.1)
    return net.b(x)


def clamps_without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.b.weight.clamp_(-0.1, 0.1)
    return net.b(x)


def sets_data(net: Net, x: Tensor) -> Tensor:
    net.b.weight.data = net.b.weight.data * 0.5
    return net.b(x)


def updates_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.offset.mul_(0.9)
    return x + net.offset


def replaces_a_buffer(net: Net, x: Tensor) -> Tensor:
    net.offset = net.offset * 0.9
    return x + net.offset


def adds_a_layer(net: Net, x: Tensor) -> Tensor:
    net.late = nn.Conv2d(4, 4, 1).double()
    return net.late(x)


def clamps_a_map_past_autograd(net: Net, x: Tensor) -> Tensor:
    y = net.b(x)
    y.data.clamp_(0, 0.1)
    return y * 2


def looks_at_values(net: Net, x: Tensor) -> Tensor:
    return x * 2 if x.mean() > 0 else x


def reads_a_number(net: Net, x: Tensor) -> Tensor:
    return x * net.gain.sum().item()


def draws_from_a_generator(net: Net, x: Tensor) -> Tensor:
    return x + torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


REFUSED = [
    *(logs, logs_maps, counts, counts_in_a_dict, counts_in_a_class, clamps_data, clamps_without_gradients, sets_data),
    *(updates_a_buffer, replaces_a_buffer, adds_a_layer, clamps_a_map_past_autograd, looks_at_values, reads_a_number),
    draws_from_a_generator,
]


@pytest.mark.parametrize("function", REFUSED)
def test_effects_are_refused_and_leave_nothing_behind(function: Callable[[Net, Tensor], Tensor]) -> None:
    MEMO.clear(), LOG.clear()
    net = Net(function)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count, calls = COUNT, Counter.calls
    with pytest.raises(UnsupportedOpError) as caught:
        StreamingCNN(net, 7)(IMAGE)
    assert isinstance(caught.value, VerificationError) == (function is counts_in_a_dict)
    assert len(str(caught.value)) < 1000
    assert (COUNT, Counter.calls, MEMO, LOG) == (count, calls, {}, [])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert set(before) == set(net.state_dict())


def test_detached_values_are_exact() -> None:
    net = Net(lambda net, x: net.b(x) * net.gain.data + x.data * x.detach() * net.offset)
    assert_equal_results(StreamingCNN(net, 7, verify=False), net)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_exact(reentrant: bool) -> None:
    net = Net(lambda net, x: checkpoint(net.b, x, use_reentrant=reentrant).relu())
    assert_equal_results(StreamingCNN(net, 7, verify=False), net)


def recurrent(net: Net, x: Tensor) -> Tensor:
    net.last = x.mean((2, 3), keepdim=True) + getattr(net, "last", 0.0)
    return net.b(x) * net.last


def recurrent_by_dict(net: Net, x: Tensor) -> Tensor:
    earlier = vars(net).get("last", 0.0)
    net.last = x.mean((2, 3), keepdim=True) + earlier
    return net.b(x) * net.last


def recurrent_once_set(net: Net, x: Tensor) -> Tensor:
    if not hasattr(net, "last"):
        net.last = x.mean((2, 3), keepdim=True)
    return net.b(x) * net.last


def recurrent_from_init(net: Net, x: Tensor) -> Tensor:
    earlier = net.moving
    net.moving = net.moving + x.mean((2, 3), keepdim=True)
    return net.b(x) * earlier


@pytest.mark.parametrize("function", [recurrent, recurrent_by_dict, recurrent_once_set, recurrent_from_init])
def test_a_result_that_the_next_forward_pass_reads_is_refused(function: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(function)
    net.moving = torch.zeros((), dtype=torch.float64)
    with pytest.raises(UnsupportedOpError, match="is read in forward before it is set"):
        StreamingCNN(net, 7, unsupported="run_whole", verify=False)(IMAGE)


def test_the_check_at_first_use_alone_finds_a_result_that_the_next_forward_pass_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undefended(monkeypatch)
    with pytest.raises(VerificationError, match="in the second forward pass"):
        StreamingCNN(Net(recurrent), 7, unsupported="run_whole")(IMAGE)


def kept_for_a_width(net: Net, x: Tensor) -> Tensor:
    if net.kept is None or net.kept.shape[-1] != x.shape[-1]:
        net.kept = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
    return net.b(x * net.kept)


def kept_from_the_first(net: Net, x: Tensor) -> Tensor:
    if net.kept is None:
        net.kept = torch.full((), 1 / x.shape[-1], dtype=x.dtype)
    return net.b(x * net.kept)


@pytest.mark.parametrize("function", [kept_for_a_width, kept_from_the_first])
def test_constants_that_forward_keeps_for_the_next_pass_are_those_of_the_plain_module(
    function: Callable[[Net, Tensor], Tensor],
) -> None:
    net, plain = Net(function), Net(function)
    net.kept = plain.kept = None
    streamed = StreamingCNN(net, 7, verify=False)
    for image in (IMAGE, IMAGE[..., 3:], IMAGE[..., :5, :], IMAGE):
        for _ in range(2):
            assert relative_error(streamed(image).detach(), plain(image).detach()) < 1e-12
            assert torch.equal(net.kept, plain.kept)


def test_what_forward_leaves_without_gradients_does_not_count_as_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(net: Net, x: Tensor) -> Tensor:
        net.last = net.first = {"map": x.relu()}
        return net.b(x)

    net = Net(leaves)
    net.first = None
    streamed = StreamingCNN(net, 7)
    with torch.no_grad():
        streamed(IMAGE)
        monkeypatch.setattr("widefield.streaming.programs.capture", None)
        streamed(IMAGE + 1)


def test_what_forward_leaves_on_the_module_is_given_back() -> None:
    def leaves(net: Net, x: Tensor) -> Tensor:
        net.features, net.sizes, net.calls = x.relu(), x.shape[2:], getattr(net, "calls", 0) + 1
        net.a.last = [x.mean((2, 3))]
        return net.b(x) * net.calls

    net, plain = Net(leaves), Net(leaves)
    streamed = StreamingCNN(net, 7, verify=False)
    for _ in range(2):
        assert relative_error(streamed(IMAGE).detach(), plain(IMAGE).detach()) < 1e-12
    assert relative_error(net.features.detach(), plain.features.detach()) < 1e-12
    assert relative_error(net.a.last[0].detach(), plain.a.last[0].detach()) < 1e-12
    assert (tuple(net.sizes), net.calls) == (tuple(plain.sizes), plain.calls) == ((21, 17), 2)
    net.features.sum().backward()
    plain.features.sum().backward()
    assert relative_error(net.a.weight.grad, plain.a.weight.grad) < 1e-12


# --- modules that are wrapped -------------------------------------------------------------------------------------------------


def test_modules_that_hide_their_operations_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(net)
    wrapped = {
        "TorchScript": scripted,
        "is a wrapper around": nn.DataParallel(net),
        "model._orig_mod": torch.compile(net),
        "already streams": StreamingCNN(net, 7, verify=False),
    }
    for reason, module in wrapped.items():
        with pytest.raises((UnsupportedOpError, ValueError), match=reason):
            StreamingCNN(nn.Sequential(module), 7)(torch.rand(1, 3, 23, 19))


def test_instance_norm_with_running_statistics_is_refused_under_exact_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.raises(UnsupportedOpError, match="instance"):
        StreamingCNN(net, 7, batch_statistics="exact")(torch.rand(1, 3, 23, 19))
    StreamingCNN(net.eval(), 7, batch_statistics="exact")(torch.rand(1, 3, 23, 19))


# --- the check at first use ---------------------------------------------------------------------------------------------------


def undefended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out whatever looks for such faults, but the check at first use."""
    monkeypatch.setattr(capture, "_refuse_structure", lambda *args: None)
    monkeypatch.setattr(capture, "_refuse_changes", lambda changes, watch: None)
    monkeypatch.setattr(Watch, "_refuse_lost", lambda *args: None)
    monkeypatch.setattr(Watch, "_patched", lambda watch: iter(()))
    monkeypatch.setattr("widefield.streaming.module._VERIFIED", {})


CAUGHT: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Net(FUNCTIONS["called"]),
    "function of a weight": lambda: Net(FUNCTIONS["of a weight"]),
    "straight-through": lambda: Net(FUNCTIONS["with a scale"]),
    "tensor hook": lambda: Net(hooked),
    "clamped map": lambda: Net(clamps_a_map_past_autograd),
    "counter": lambda: Net(counts_in_a_class),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_the_check_at_first_use_alone_finds_wrong_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    net = CAUGHT[name]()
    with pytest.raises(VerificationError, match=r"streamed, .* plain|differ from each other"):
        StreamingCNN(net, 7)(IMAGE)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("register", [backward_pre_hook, backward_hook])
def test_the_check_at_first_use_alone_finds_backward_hooks(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    net = Net(lambda net, x: net.b(x))
    register(net)
    with pytest.raises(VerificationError, match="gradient of"):
        StreamingCNN(net, 7)(IMAGE)


def test_the_check_at_first_use_alone_finds_a_branch_on_the_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    streamed = StreamingCNN(Net(BRANCHES["grad mode"]), 7)
    streamed(IMAGE)
    with torch.no_grad(), pytest.raises(VerificationError, match="output 0 differs by 5"):
        streamed(IMAGE)


def test_the_check_names_the_layer_where_a_difference_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    with pytest.raises(VerificationError, match="between the result of layer 'a' and the output"):
        StreamingCNN(Net(lambda net, x: net.b(Reverse.apply(x))), 7)(IMAGE)
    net = Net(lambda net, x: net.b(x).relu())
    net.b.register_forward_hook(lambda module, args, out: out * (1 if torch.is_grad_enabled() else 2))
    streamed = StreamingCNN(net, 7)
    streamed(IMAGE)
    with torch.no_grad(), pytest.raises(VerificationError, match="begins at the result of layer 'b'"):
        streamed(IMAGE)


def test_the_check_restores_everything() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 2, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(5)
    plain = StreamingCNN(net, 7, verify=False)(IMAGE.float())
    torch.manual_seed(5)
    checked = StreamingCNN(net, 7)(IMAGE.float())
    assert torch.equal(plain, checked)
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(part.training for part in net.modules())
    assert not any(part._forward_hooks for part in net.modules())
    assert np.array_equal(drawn, np.random.get_state()[1])
    assert state.shape == torch.get_rng_state().shape


def test_the_check_runs_once_for_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    net, runs = Net(lambda net, x: x.relu()), []
    monkeypatch.setattr("widefield.streaming.module._VERIFIED", {})
    monkeypatch.setattr("widefield.streaming.module.verify", lambda *args: runs.append(torch.is_grad_enabled()))
    streamed = StreamingCNN(net, 7)
    streamed(IMAGE), streamed(IMAGE), StreamingCNN(net, 5)(IMAGE[..., :15])
    with torch.no_grad():
        streamed(IMAGE), streamed(IMAGE)
    assert runs == [True, False]
    StreamingCNN(Net(lambda net, x: x.sigmoid()), 7, verify=False)(IMAGE)
    assert len(runs) == 2


def test_dropout_is_compared_under_the_same_masks() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1)
    )
    net = nn.Sequential(net, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 2))
    StreamingCNN(net, 7, unsupported="run_whole")(IMAGE.float())


def test_a_forward_pass_that_is_never_the_same_is_refused() -> None:
    net, seen = Net(lambda net, x: x), iter(range(1, 1000))
    net.a.register_forward_hook(lambda module, args, out: out * next(seen))
    with pytest.raises(VerificationError, match="differ from each other"):
        StreamingCNN(net, 7)(IMAGE)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_and_numpy_are_refused_and_not_drawn(draw: Callable[[], float]) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(UnsupportedOpError, match="changes the random state of"):
        StreamingCNN(Net(lambda net, x: x * draw()), 7, verify=False)(IMAGE)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
