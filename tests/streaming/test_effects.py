"""What forward does besides computing its result: exact, or refused by name, and nothing is left behind."""

import functools
import itertools
import pickle
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.streaming import unseen
from tests.streaming.exactness import relative_error
from tests.streaming.unseen import IMAGE, Net, assert_equal_results
from widefield.streaming import StreamingCNN, UnsupportedOpError, VerificationError, stream

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


def counts_in_a_module(net: Net, x: Tensor) -> Tensor:
    unseen.SCALE += 1
    return x * unseen.SCALE


def uses_an_earlier_result(net: Net, x: Tensor) -> Tensor:
    return x * net.computed


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
    *(draws_from_a_generator, counts_in_a_module, uses_an_earlier_result),
]


@pytest.mark.parametrize("function", REFUSED)
def test_effects_are_refused_and_leave_nothing_behind(function: Callable[[Net, Tensor], Tensor]) -> None:
    MEMO.clear(), LOG.clear()
    net = Net(function)
    net.computed = net.gain * 2
    before = {name: value.clone() for name, value in net.state_dict().items()}
    count, calls = COUNT, Counter.calls
    with pytest.raises(UnsupportedOpError) as caught:
        StreamingCNN(net, 7)(IMAGE)
    assert isinstance(caught.value, VerificationError) == (function is counts_in_a_dict)
    assert len(str(caught.value)) < 1000
    assert (COUNT, Counter.calls, MEMO, LOG, unseen.SCALE) == (count, calls, {}, [], 2.0)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert set(before) == set(net.state_dict())


@pytest.mark.parametrize(
    "written",
    [
        lambda net, x: [x.detach(), net.b(x).data.chunk(2, 1)[0].movedim(1, 0)],
        lambda net, x: [net.offset, net.gain.data],
        lambda net, x: [net.b.weight.data, net.b.bias.data],
    ],
    ids=["maps", "buffers", "weights"],
)
def test_updates_of_many_tensors_past_autograd_are_refused(written: Callable[[Net, Tensor], list[Tensor]]) -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        torch._foreach_mul_(written(net, x), 0.5)
        return net.b(x) * net.gain + net.offset

    with pytest.raises(UnsupportedOpError, match=r"in.place"):
        stream(Net(function), 7, verify=False)(IMAGE)


def divided_in_place(net: Net, x: Tensor) -> Tensor:
    view = (x + 1).detach()
    view /= 2
    return net.b(view)


def test_updates_by_operators_past_autograd_are_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="in place"):
        stream(Net(divided_in_place), 7, verify=False)(IMAGE)


@pytest.mark.parametrize("gradients", [True, False])
def test_updates_of_a_map_of_which_a_detached_view_was_taken_are_exact(gradients: bool) -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        y = x + 1
        view = y.detach()
        return net.b(y.mul_(3)) + view

    net = Net(function)
    streamed = stream(net, 7, verify=False)
    if gradients:
        assert_equal_results(streamed, net)
    else:
        with torch.no_grad():
            assert relative_error(streamed(IMAGE), net(IMAGE)) < 1e-12


def test_updates_of_many_maps_with_gradients_are_exact() -> None:
    def function(net: Net, x: Tensor) -> Tensor:
        maps = [x + 1, net.b(x)]
        torch._foreach_mul_(maps, [2.0, 3.0])
        return maps[0] + maps[1]

    net = Net(function)
    assert_equal_results(stream(net, 7, verify=False), net)


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
        monkeypatch.setattr("widefield.streaming.program_cache.trace_module", None)
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
        scripted, compiled = torch.jit.script(net), torch.compile(net)
    wrapped = {
        "TorchScript": scripted,
        "is a wrapper around": nn.DataParallel(net),
        "model._orig_mod": compiled,
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


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_and_numpy_are_refused_and_not_drawn(draw: Callable[[], float]) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(UnsupportedOpError, match="changes the random state of"):
        StreamingCNN(Net(lambda net, x: x * draw()), 7, verify=False)(IMAGE)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize(
    "of", [random.Random(0), np.random.default_rng(0), np.random.RandomState(0)], ids=lambda of: type(of).__name__
)
@pytest.mark.parametrize("kept", ["in an attribute", "outside"])
def test_random_generators_are_refused_and_not_drawn_from(of: Any, kept: str) -> None:
    net = Net(lambda net, x: x * getattr(net, "of", of).random())
    if kept == "in an attribute":
        net.of = of
    before = pickle.dumps(of)
    with pytest.raises(UnsupportedOpError, match="changes the random state of a"):
        StreamingCNN(net, 7, verify=False)(IMAGE)
    assert pickle.dumps(of) == before


@pytest.mark.parametrize("of", [itertools.count(1.0), iter([1.0, 2.0, 3.0])], ids=["count", "list"])
def test_iterators_are_refused(of: Any) -> None:
    net = Net(lambda net, x: x * next(net.of))
    net.of = of
    with pytest.raises(UnsupportedOpError, match="changes the state of a"):
        StreamingCNN(net, 7, verify=False)(IMAGE)
    assert next(of) == 1.0


@pytest.mark.parametrize(
    "of",
    [threading.Lock(), sys.__stdout__, (k for k in ()), types, types.SimpleNamespace(lock=threading.Lock(), log=[])],
    ids=["lock", "file", "generator", "module", "object"],
)
def test_what_cannot_be_copied_may_lie_in_attributes(of: Any) -> None:
    def method(net: Net, x: Tensor) -> Tensor:
        return net.b(x) * net.parents[0].gain + net.other(x)

    net = Net(method)
    net.of, net.parents = of, [net]
    net.other = net.b.forward
    assert_equal_results(StreamingCNN(net, 7, verify=False), net)


def test_a_change_of_an_object_that_cannot_be_copied_is_refused_and_undone() -> None:
    net = Net(lambda net, x: (net.of.log.append(1), x)[1])
    net.of = types.SimpleNamespace(lock=threading.Lock(), log=[])
    with pytest.raises(UnsupportedOpError, match="changes a list"):
        StreamingCNN(net, 7, verify=False)(IMAGE)
    assert net.of.log == []


# --- layers with two names ----------------------------------------------------------------------------------------------------


def two_names(net: Net, x: Tensor) -> Tensor:
    return net.layers[0](net.again(net.b(x)).relu()) + sum(layer(x) for layer in net.layers[1:])


def with_two_names(function: Callable[[Net, Tensor], Tensor]) -> Net:
    net = Net(function)
    net.again = nn.Sequential(net.b, nn.BatchNorm2d(4).double())
    net.layers = nn.Sequential(*[net.again] * 2, nn.Conv2d(4, 4, 1).double())
    return net


def test_layers_with_two_names_are_exact() -> None:
    net = with_two_names(two_names).eval()
    assert_equal_results(StreamingCNN(net, 7, verify=False), net)


def test_a_layer_with_two_names_that_reads_what_it_left_is_refused() -> None:
    def remembers(layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        earlier, layer.last = layer.__dict__.get("last", 0.0), out.mean((2, 3), keepdim=True)
        return out + earlier

    net = with_two_names(lambda net, x: net.layers[0](x))
    net.again.register_forward_hook(remembers)
    with pytest.raises(UnsupportedOpError, match=r"is read in forward before it is set"):
        StreamingCNN(net, 7, verify=False)(IMAGE)


def test_running_statistics_of_a_layer_with_two_names_behind_a_slice_are_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="reached through a slice of layers"):
        StreamingCNN(with_two_names(two_names), 7, batch_statistics="exact", verify=False)(IMAGE)
