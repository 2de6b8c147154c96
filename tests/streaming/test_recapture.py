"""Whatever forward reads counts: a change of it is noticed, and each branch is that of the pass that runs."""

import array
import collections
import contextvars
import dataclasses
import functools
import os
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tests.streaming.unseen
from tests.streaming import unseen
from tests.streaming.exactness import relative_error
from tests.streaming.unseen import IMAGE, Net, assert_equal_results
from widefield.streaming import StreamingCNN, UnsupportedOpError
from widefield.streaming.capture import trace_module
from widefield.streaming.captured import CallKind


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
CONTEXT = contextvars.ContextVar("scale", default=2.0)


def scaled_by_a_global(x: Tensor) -> Tensor:
    return x * SCALE * OUTER.scale


def _closure() -> tuple[Callable[[Net, Tensor], Tensor], Callable[[], None]]:
    scale = 2.0

    def change() -> None:
        nonlocal scale
        scale = 5.0

    return lambda net, x: x * scale, change


def scaled_by_an_import(net: Net, x: Tensor) -> Tensor:
    from tests.streaming.unseen import SCALE as scale

    return x * scale


def _either() -> tuple[Callable[[Net, Tensor], Tensor], Callable[[], None]]:
    first, second = None, 2.0

    def change() -> None:
        nonlocal first, second
        first, second = 2.0, None

    return lambda net, x: x * 5.0 if first else x * second, change


def _hidden(layer: Callable[[], nn.Module]) -> Callable[[Net], None]:
    return _attribute(lambda: [layer().double().requires_grad_(False).eval()])


def _compute(scale: float) -> Callable[[Net], None]:
    """Leave a result that requires grad in an object."""

    def leave(net: Net) -> None:
        with torch.enable_grad():
            vars(net).setdefault("cfg", types.SimpleNamespace()).result = net.gain * scale

    return leave


def _set(holder: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch, Net], None]:
    return lambda patch, net: patch.setattr(holder, name, value)


CLOSED, CHANGE_CLOSED = _closure()
EITHER, CHANGE_EITHER = _either()
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
        lambda net, x: x * torch.from_numpy(net.cfg).to(x.device),
        _attribute(lambda: np.full((4, 1, 1), 2.0)),
        lambda patch, net: net.cfg.fill(5.0),
    ),
    "tensor past its version": (
        lambda net, x: x * net.cfg,
        _attribute(lambda: torch.full((4, 1, 1), 2.0).double()),
        lambda patch, net: net.cfg.data.fill_(5.0),
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
    "dict of another kind": (
        lambda net, x: x * net.cfg["scale"],
        _attribute(lambda: collections.UserDict(scale=2.0)),
        lambda patch, net: net.cfg.update(scale=5.0),
    ),
    "chained dicts": (
        lambda net, x: x * net.cfg["scale"],
        _attribute(lambda: collections.ChainMap({}, {"scale": 2.0})),
        lambda patch, net: net.cfg.maps[1].update(scale=5.0),
    ),
    "numbers in an array": (
        lambda net, x: x * net.cfg[0],
        _attribute(lambda: array.array("d", [2.0])),
        lambda patch, net: net.cfg.__setitem__(0, 5.0),
    ),
    "context variable": (
        lambda net, x: x * CONTEXT.get(),
        lambda net: None,
        lambda patch, net: CONTEXT.set(5.0),
    ),
    "environment variable": (
        lambda net, x: x * float(os.environ.get("WIDEFIELD_TEST_SCALE", "2")),
        lambda net: None,
        lambda patch, net: patch.setenv("WIDEFIELD_TEST_SCALE", "5"),
    ),
    "distribution": (
        lambda net, x: x * net.cfg.mean,
        _attribute(lambda: torch.distributions.Normal(torch.full((4, 1, 1), 2.0).double(), 1.0)),
        lambda patch, net: net.cfg.loc.fill_(5.0),
    ),
    "import": (scaled_by_an_import, lambda net: None, _set(unseen, "SCALE", 5.0)),
    "module in a module": (
        lambda net, x: x * tests.streaming.unseen.SCALE,
        lambda net: None,
        _set(unseen, "SCALE", 5.0),
    ),
    "module in an attribute": (
        lambda net, x: x * net.cfg.SCALE,
        _attribute(lambda: unseen),
        _set(unseen, "SCALE", 5.0),
    ),
    "closure of nothing": (EITHER, lambda net: None, lambda patch, net: CHANGE_EITHER()),
    "buffer behind a closure": (
        lambda net, x: net.cfg(x),
        lambda net: setattr(net, "cfg", lambda x: x * net.offset),
        lambda patch, net: setattr(net, "offset", net.offset * 5),
    ),
    "frozen layer in a list": (
        lambda net, x: net.cfg[0](x),
        _hidden(lambda: nn.Conv2d(4, 4, 1)),
        lambda patch, net: net.cfg[0].weight.data.mul_(5),
    ),
    "statistics of a layer in a list": (
        lambda net, x: net.cfg[0](x),
        _hidden(lambda: nn.BatchNorm2d(4)),
        lambda patch, net: net.cfg[0].running_mean.add_(5),
    ),
    "hook on a layer in a list": (
        lambda net, x: net.cfg[0](x),
        _hidden(lambda: nn.Conv2d(4, 4, 1)),
        lambda patch, net: net.cfg[0].register_forward_hook(lambda module, args, out: out * 5),
    ),
    "frozen parameter in an object": (
        lambda net, x: x * net.cfg.scale,
        _attribute(lambda: types.SimpleNamespace(scale=nn.Parameter(torch.ones(4, 1, 1).double(), False))),
        lambda patch, net: net.cfg.scale.data.mul_(5),
    ),
    "result in an object": (lambda net, x: x * net.cfg.result, _compute(2.0), lambda patch, net: _compute(5.0)(net)),
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
    monkeypatch.setattr("widefield.streaming.program_cache.trace_module", None)
    streamed(IMAGE)


# --- branches -----------------------------------------------------------------------------------------------------------------

asks = torch.is_grad_enabled

BRANCHES: dict[str, Callable[[Net, Tensor], Any]] = {
    "grad mode by another name": lambda net, x: x * (1 if asks() else 2),
    "grad mode": lambda net, x: x * (1 if torch.is_grad_enabled() else 2),
    "requires_grad of a map": lambda net, x: x * (1 if x.requires_grad else 2),
    "requires_grad of a weight": lambda net, x: x * (1 if net.gain.requires_grad else 2),
    "is_leaf": lambda net, x: x * (1 if x.is_leaf else 2),
    "training": lambda net, x: x * (1 if net.training else 2),
    "dtype": lambda net, x: x * (1 if x.dtype == torch.float64 else 2),
    "device": lambda net, x: x * (1 if x.device.type == "cpu" else 2) * torch.ones(1, device=x.device),
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


def switched_off(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = net.b(x)
    return x * scale


def inference(net: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = net.b(x)
    return x * scale.clone()


def hooked(net: Net, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved * 2, lambda saved: saved):
        return net.b(x)


@pytest.mark.parametrize(
    "function",
    [
        switched_off,
        inference,
        hooked,
        torch.no_grad()(lambda net, x: net.b(x)),
        torch.inference_mode()(lambda net, x: net.b(x)),
    ],
    ids=["no_grad", "inference_mode", "saved_tensors_hooks", "@no_grad", "@inference_mode"],
)
def test_a_part_without_gradients_is_exact_without_and_refused_with_them(function: Any) -> None:
    net = Net(function)
    streamed = StreamingCNN(net, 7, verify=False)
    with torch.no_grad():
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12
    with pytest.raises(UnsupportedOpError, match=r"in another mode|what autograd saves"):
        streamed(IMAGE)


def test_a_layer_whose_forward_is_without_gradients_is_refused_with_them() -> None:
    class Still(nn.Conv2d):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = Net(lambda net, x: net.b(x))
    net.b = Still(4, 4, 1).double()
    streamed = StreamingCNN(net, 7, verify=False)
    with torch.no_grad():
        assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12
    with pytest.raises(UnsupportedOpError, match="runs a part of forward in another mode"):
        streamed(IMAGE)


def test_a_part_with_gradients_is_refused_where_they_are_off() -> None:
    def switched_on(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return net.b(x)

    net = Net(switched_on)
    streamed = StreamingCNN(net, 7, verify=False)
    assert relative_error(streamed(IMAGE).detach(), net(IMAGE).detach()) < 1e-12
    with torch.no_grad(), pytest.raises(UnsupportedOpError, match="runs a part of forward in another mode"):
        streamed(IMAGE)


def test_a_forward_pass_on_another_device_is_told_of_it_and_captured() -> None:
    """Whether there is such a device does not matter to a capture."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return x * (3 if x.is_cuda and x.get_device() == 1 else 2) + torch.ones(4, 1, 1, device=x.device).cuda()

    captured = trace_module(Net(forward), CallKind((1, 3, 9, 9), torch.float64, torch.device("cuda", 1))).at(9, 9)
    assert captured is not None
    factors = [node.args[1] for node in captured.nodes if node.op == "aten.mul"]
    assert factors == [3]


def test_a_hook_on_gradients_is_refused_after_a_pass_without_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    net[0].register_full_backward_hook(lambda *args: None)
    streamed = StreamingCNN(net, 16, verify=False)
    with torch.no_grad():
        streamed(torch.rand(1, 3, 40, 32))
    with pytest.raises(UnsupportedOpError, match="backward hook"):
        streamed(torch.rand(1, 3, 40, 32))


@pytest.mark.parametrize("how", ["parameter", "assigned state", "layer", "given"])
def test_what_was_tied_and_is_no_more_is_noticed(how: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.BatchNorm2d(3)
            self.m = self.n if how == "layer" else nn.BatchNorm2d(3)
            if how in ("parameter", "assigned state"):
                self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.m(self.b(self.n(self.a(x)).tanh()))  # type: ignore[no-any-return]

    net, image = Two().double().eval(), torch.rand(1, 3, 40, 32, dtype=torch.float64)
    streamed, weight = StreamingCNN(net, 16, verify=False), torch.rand(3, 3, 3, 3, dtype=torch.float64)
    if how == "given":
        for given in ({"a.weight": weight, "b.weight": weight}, {"a.weight": weight, "b.weight": -2 * weight}):
            found = torch.func.functional_call(streamed, {f"module.{k}": w for k, w in given.items()}, (image,))
            assert relative_error(found, torch.func.functional_call(net, given, (image,))) < 1e-10
        return
    streamed(image)
    if how == "parameter":
        net.b.weight = nn.Parameter(-2 * weight)
    elif how == "assigned state":
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    else:
        net.m = nn.BatchNorm2d(3).double().eval()
        net.m.running_mean.add_(3)
    found = []
    for call in (streamed, net):
        net.zero_grad()
        result = call(image)
        result.square().sum().backward()
        found.append([result, *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-10
