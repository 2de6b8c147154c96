"""`Local`: a module on every window of a map is, streamed, what it is on the whole image."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.streaming.exactness import TOLERANCE, assert_exact, relative_error
from tests.streaming.masked import OverForeground, foreground, masked
from widefield.streaming import Local, LocalError, StreamingCNN, UnsupportedOpError, VerificationError, stream
from widefield.streaming.captured import CallKind
from widefield.streaming.local import Draws, LocalCall


def convolution(channels: int, size: tuple[int, int]) -> nn.Module:
    kernel = min(3, *size)
    return nn.Sequential(nn.Conv2d(channels, 5, kernel), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def perceptron(channels: int, size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 7), nn.Tanh(), nn.Linear(7, 4))


def small_map(channels: int, size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, (1, 2 if size[1] > 1 else 1), 2), nn.Sigmoid())


MODULES = {"convolution": convolution, "perceptron": perceptron, "small map": small_map}


class Attention(nn.Module):
    """Gated attention over the positions of a map (Ilse et al., 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.v, self.u, self.w = nn.Linear(channels, 4), nn.Linear(channels, 4), nn.Linear(4, 1, bias=False)
        self.out = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        weights = self.w(torch.tanh(self.v(tokens)) * torch.sigmoid(self.u(tokens))).softmax(1)
        return self.out((weights * tokens).sum(1))


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "convolution": lambda channels: nn.Conv2d(channels, 2, 3, padding=1),
    "pooling": lambda channels: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, 2)),
    "attention": Attention,
}


def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def drawn_network(
    kind: str, head: str, inside: bool, window: Any, stride: Any, padding: Any, partial: Any, size: Any, chunk: int
) -> tuple[nn.Sequential, Tensor]:
    """Return a network around windows, and an image. Without a head if the image holds no window."""
    torch.manual_seed(0)
    padding = tuple(min(p, w - 1) for p, w in zip(padding, window, strict=True))
    channels = 4 if inside else 3
    local = Local(MODULES[kind](channels, window), window, stride, padding, partial=partial, fill=0.3, chunk=chunk)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), local) if inside else nn.Sequential(local)
    image = torch.randn(2, 3, *size)
    with suppress(LocalError):
        made = net(image)
        if head == "attention" and made.shape[3] == 1:  # a map of one column is not flattened by tiles
            head = "pooling"
        net.append(HEADS[head](made.shape[1]))
    return net, image


def agrees(tile: Any, **drawn: Any) -> None:
    net, image = drawn_network(**drawn)
    if isinstance(net[-1], Local):
        with pytest.raises(ValueError, match="holds no window"):
            StreamingCNN(net, tile)(image)
    else:
        assert_exact(net, image, [tile])


def agrees_under_a_mask(tile: Any, cells: Any, seed: int, **drawn: Any) -> None:
    net, image = drawn_network(**drawn)
    if isinstance(net[-1], Local):
        return
    mask = torch.rand(1, *cells, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask[0, seed % cells[0], seed % cells[1]] = True
    results = []
    plain = nn.Sequential(*(Shown(part) if isinstance(part, Local) else part for part in net)).double()
    streamed = StreamingCNN(net, tile, verify=False)
    for run in (lambda x: masked(plain, x, mask, 0.5), lambda x: streamed(x, mask=mask, fill=0.5)):
        net.zero_grad()
        x = image.double().requires_grad_()
        found = run(x)
        found.square().sum().backward()
        results.append([found, x.grad, *(p.grad for p in net.parameters())])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < TOLERANCE


DRAWN = {
    "kind": st.sampled_from(list(MODULES)),
    "head": st.sampled_from(list(HEADS)),
    "inside": st.booleans(),
    "window": pair(1, 13),
    "stride": st.one_of(st.none(), pair(1, 17)),
    "padding": pair(0, 4),
    "partial": st.sampled_from(["drop", "pad"]),
    "size": pair(7, 50),
    "tile": pair(3, 40),
    "chunk": st.integers(1, 70),
}


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(**DRAWN)
def test_windows_drawn_at_random_are_exact(**drawn: Any) -> None:
    agrees(**drawn)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(**DRAWN)
def test_many_windows_drawn_at_random_are_exact(**drawn: Any) -> None:
    agrees(**drawn)


MASKED = {
    **DRAWN,
    "head": st.sampled_from(["none", "convolution", "pooling"]),
    "cells": pair(1, 9),
    "seed": st.integers(0, 99),
}


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(**MASKED)
def test_windows_drawn_at_random_are_exact_under_a_mask(**drawn: Any) -> None:
    agrees_under_a_mask(**drawn)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(**MASKED)
def test_many_windows_drawn_at_random_are_exact_under_a_mask(**drawn: Any) -> None:
    agrees_under_a_mask(**drawn)


def vit(**options: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0, **options)


def test_a_vision_transformer_with_attention_over_its_patches_is_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Local(vit(), 32, (24, 40), partial="pad"), Attention(192))
    assert_exact(net, torch.randn(1, 3, 100, 90), [(40, 64)])


@pytest.mark.parametrize(
    ("kernel", "size"), [((4, 3), (7, 40)), ((4, 6), (7, 40)), ((6, 3), (40, 7)), ((6, 6), (7, 7))], ids=str
)
def test_small_maps_of_one_row_or_column_of_windows_are_exact(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    net = nn.Sequential(Local(nn.Conv2d(3, 4, kernel), 6, (6, 5)), Attention(4))
    assert_exact(net, torch.randn(1, 3, *size), [(7, 11)])


def test_it_is_what_unfold_gives() -> None:
    module, image = nn.Linear(3 * 4 * 5, 6), torch.randn(2, 3, 11, 17)
    columns = F.unfold(image, (4, 5), stride=(3, 6), padding=(1, 2)).transpose(1, 2)
    expected = module(columns).transpose(1, 2).reshape(2, 6, 4, 3)
    local = Local(nn.Sequential(nn.Flatten(), module), (4, 5), (3, 6), (1, 2), chunk=5)
    assert torch.allclose(local(image), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "window", "stride", "partial", "count"),
    [
        (10, 4, 4, "drop", 2),
        (10, 4, 4, "pad", 3),
        (12, 4, 4, "raise", 3),
        (3, 4, 4, "pad", 1),
        (10, 4, 3, "pad", 3),
        (11, 4, 3, "pad", 4),
        (10, 2, 5, "pad", 2),
        (11, 2, 5, "pad", 3),
        (9, 2, 7, "pad", 2),
    ],
)
def test_partial_windows_are_dropped_or_padded(length: int, window: int, stride: int, partial: Any, count: int) -> None:
    local = Local(nn.Flatten(), (1, window), (1, stride), partial=partial)
    assert local(torch.ones(1, 1, 1, length)).shape[3] == count


@pytest.mark.parametrize("length", [3, 10])
def test_a_map_that_windows_do_not_cover_is_refused_where_it_is_said_so(length: int) -> None:
    with pytest.raises(LocalError, match="partial="):
        Local(nn.Flatten(), 4, partial="raise")(torch.ones(1, 1, 8, length))
    with pytest.raises(ValueError, match="partial="):
        StreamingCNN(Local(nn.Flatten(), 4, partial="raise"))(torch.ones(1, 1, 8, length))


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"window": (3, 4, 5)},
        {"window": 2.5},
        {"stride": 0},
        {"padding": 4},
        {"padding": -1},
        {"partial": "keep"},
        {"chunk": 0},
        {"module": "relu"},
    ],
    ids=str,
)
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(LocalError, match=next(iter(wrong))):
        Local(**{"module": nn.Flatten(), "window": 4, **wrong})


@pytest.mark.parametrize("module", [nn.Identity(), nn.Flatten(0), nn.Flatten(2)], ids=lambda m: f"Flatten from {m}")
def test_results_that_are_neither_vectors_nor_maps_are_refused(module: nn.Module) -> None:
    if isinstance(module, nn.Identity):
        module = nn.Unflatten(2, (2, 2))
    with pytest.raises(LocalError, match="a vector"):
        Local(module, 4)(torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match="a vector"):
        StreamingCNN(Local(module, 4))(torch.ones(1, 3, 8, 8))


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class Odd(nn.Module):
    """What a capture of the whole would lose or refuse."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Sequential(nn.Flatten(), nn.Linear(48, 6)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "checkpoint":
            return checkpoint(self.inner, x, use_reentrant=False)
        y = self.inner(x)
        if self.how == "function":
            return Flipped.apply(y)
        if self.how == "hook on a gradient" and y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        if self.how == "medians":
            y = y + x.flatten(1).median(1, keepdim=True).values
        return y.sort(1).values


@pytest.mark.parametrize("how", ["checkpoint", "function", "hook on a gradient", "medians"])
def test_whatever_autograd_does_within_a_window_is_exact(how: str) -> None:
    assert_exact(nn.Sequential(Local(Odd(how), 4), nn.Conv2d(6, 2, 1)), torch.randn(1, 3, 14, 19), [(5, 9)])


def test_weights_that_are_computed_from_others_are_exact() -> None:
    layer = parametrizations.weight_norm(nn.Linear(48, 6))
    assert_exact(Local(nn.Sequential(nn.Flatten(), layer), 4), torch.randn(1, 3, 14, 19), [(5, 9)])


def test_one_local_in_two_places_is_exact() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Local(nn.Sequential(nn.Conv2d(3, 3, 2), nn.Tanh()), 4, 3)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + F.adaptive_avg_pool2d(x, 1)

    assert_exact(Twice(), torch.randn(1, 3, 23, 19), [(5, 9)])


def test_one_trace_serves_many_sizes() -> None:
    net = StreamingCNN(
        nn.Sequential(Local(perceptron(3, (4, 4)), 4, partial="pad"), nn.Conv2d(4, 2, 1)).double(), 9, verify=False
    )
    for size in ((20, 24), (21, 30), (4, 40), (33, 5)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        assert relative_error(net(image), net.module(image)) < TOLERANCE
    assert sum(map(len, net._programs._traces.values())) <= 2


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of windows of each tile that is computed."""
    counts: list[int] = []
    on_padded = LocalCall.on_padded

    def counting(call: LocalCall, *args: Any) -> Tensor:
        result = on_padded(call, *args)
        counts.append(result.shape[0] * result.shape[2] * result.shape[3])
        return result

    monkeypatch.setattr(LocalCall, "on_padded", counting)
    return counts


def test_frozen_windows_are_computed_once(computed: list[int]) -> None:
    net = nn.Sequential(Local(convolution(3, (8, 8)).requires_grad_(False), 8), Attention(5)).double()
    streamed = StreamingCNN(net, 16, verify=False)
    image = torch.randn(1, 3, 40, 48, dtype=torch.float64)
    streamed(image).square().sum().backward()
    assert sum(computed) == 5 * 6
    trained = [p for p in net.parameters() if p.requires_grad]
    found = [p.grad for p in trained]
    net.zero_grad()
    net(image).square().sum().backward()
    assert all(relative_error(f, p.grad) < TOLERANCE for f, p in zip(found, trained, strict=True))
    plan = streamed.plan((3, 4000, 4800))
    assert plan.predicted_bytes["carries"] < 2**20
    net[0].requires_grad_(True)
    computed.clear()
    streamed(image).square().sum().backward()
    assert sum(computed) == 2 * 5 * 6


def test_training_windows_are_one_scan() -> None:
    assert (
        StreamingCNN(nn.Sequential(Local(convolution(3, (8, 8)), 8), nn.Conv2d(5, 2, 1))).plan((3, 40, 48)).stages == 1
    )


class Shown(nn.Module):
    """Keeps the foreground, a definition in plain PyTorch, from reaching into windows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.inner(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_masks_and_regions_are_exact(frozen: bool) -> None:
    torch.manual_seed(0)
    module = convolution(3, (8, 8)).requires_grad_(not frozen)
    net = nn.Sequential(Local(module, 8, 6), nn.Conv2d(5, 4, 3, padding=1), nn.ReLU()).double()
    head = nn.AdaptiveAvgPool2d(1)
    image = torch.randn(1, 3, 62, 74, dtype=torch.float64)
    mask = torch.zeros(1, 7, 9, dtype=torch.bool)
    mask[0, 1:3, 2:5] = mask[0, 6, 7] = True
    shown = nn.Sequential(Shown(net[0]), *net[1:], head)
    filled = torch.where(foreground(mask, (62, 74)), image, 0.5)
    with OverForeground(mask):
        expected = shown(filled)
    expected.sum().backward()
    gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    streamed = StreamingCNN(nn.Sequential(net, head), (14, 20), verify=False)
    assert streamed.plan((3, 62, 74), mask=mask).computed_fraction < 0.6
    found = streamed(image, mask=mask, fill=0.5)
    found.sum().backward()
    assert relative_error(found, expected) < TOLERANCE
    for p, g in zip(net.parameters(), gradients, strict=True):
        assert (p.grad is None and g is None) or relative_error(p.grad, g) < TOLERANCE
    with torch.no_grad():
        part = StreamingCNN(net, (14, 20), verify=False)(image, region=(20, 30, 11, 9))
    rows, cols = net(image).shape[2:]
    y, x = 20 * rows // 62, 30 * cols // 74
    assert relative_error(part, net(image)[:, :, y : y + part.shape[2], x : x + part.shape[3]]) < TOLERANCE


def test_windows_without_foreground_are_not_computed(computed: list[int]) -> None:
    net = nn.Sequential(Local(perceptron(3, (4, 4)), 4), nn.AdaptiveAvgPool2d(1))
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[2:4, 4:6] = True
    with torch.no_grad():
        StreamingCNN(net, 8, verify=False)(torch.randn(1, 3, 40, 40), mask=mask)
    assert sum(computed) == 4


def test_dropout_is_drawn_by_the_place_of_a_window() -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(180, 4), nn.Dropout(0.3))
    net = nn.Sequential(Local(module, 8, 5), nn.Dropout(0.2), nn.Conv2d(4, 2, 2)).double()
    image = torch.randn(2, 3, 30, 41, dtype=torch.float64)
    results = []
    for tile in (9, (30, 12), 41):
        streamed = StreamingCNN(net, tile)  # the check at first use compares with plain PyTorch
        net.zero_grad()
        torch.manual_seed(1)
        found = streamed(image)
        found.square().sum().backward()
        results.append([found, *(p.grad for p in net.parameters())])
    for others in results[1:]:
        assert all(relative_error(f, e) < TOLERANCE for f, e in zip(others, results[0], strict=True))
    assert relative_error(streamed(image), results[0][0]) > 0.1
    torch.manual_seed(2)
    before = torch.rand(3)
    torch.manual_seed(2)
    with torch.no_grad():
        Draws(1, "x").run(module, image[:1, :, :8, :8], 0, 0, 0)
    assert torch.equal(torch.rand(3), before)  # nobody else's random numbers are taken


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm1d(5, track_running_stats=False), "statistics of a batch of windows"),
        (parametrizations.spectral_norm(nn.Linear(5, 5)), "changes a parameter or buffer"),
    ],
    ids=["batch norm", "spectral norm"],
)
def test_windows_that_depend_on_each_other_are_refused_by_name(module: nn.Module, message: str) -> None:
    net = nn.Sequential(Local(nn.Sequential(convolution(3, (8, 8)), module), 8), nn.Conv2d(5, 2, 1))
    with pytest.raises(UnsupportedOpError, match=message) as raised:
        StreamingCNN(net)(torch.randn(1, 3, 24, 24))
    assert raised.value.module_path == "0"


HIDDEN = nn.Linear(5, 5)


class UsesHidden(nn.Module):
    """Trains a layer in a list, a tensor in a dictionary, a global layer, or what was computed from one."""

    def __init__(self, where: str) -> None:
        super().__init__()
        layer = nn.Linear(5, 5)
        self.kept = {
            "list": [layer],
            "dictionary": {"weight": nn.Parameter(torch.rand(5, 5))},
            "global": lambda x: HIDDEN(x),
            "computed before": {"weight": HIDDEN.weight * 2},
        }[where]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.kept, dict):
            return x @ self.kept["weight"]
        return self.kept[0](x) if isinstance(self.kept, list) else self.kept(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("where", ["list", "dictionary", "global", "computed before"])
def test_what_trains_within_windows_and_is_no_parameter_is_refused(where: str) -> None:
    net = nn.Sequential(Local(nn.Sequential(convolution(3, (8, 8)), UsesHidden(where)), 8), nn.Conv2d(5, 2, 1))
    with pytest.raises(UnsupportedOpError, match="requires grad or was computed before, within Local, is no parameter"):
        StreamingCNN(net, verify=False)(torch.randn(1, 3, 24, 24))
    with torch.no_grad():
        image = torch.randn(1, 3, 24, 24)
        if where == "computed before":  # the capture has no values of it
            with pytest.raises(UnsupportedOpError, match="was computed before"):
                StreamingCNN(net, verify=False)(image)
        else:
            assert relative_error(StreamingCNN(net, verify=False)(image), net(image)) < 1e-5


def test_a_lock_within_windows_is_shared_with_the_copies() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    module[1].lock = threading.Lock()  # type: ignore[assignment]
    net, image = Local(module, 8), torch.randn(1, 3, 24, 32)
    assert relative_error(StreamingCNN(net, 16)(image).detach(), net(image).detach()) < 1e-5


def test_attention_that_drops_draws_numbers() -> None:
    class Attends(nn.Module):
        def __init__(self, dropout: float) -> None:
            super().__init__()
            self.dropout = dropout

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).mT
            return F.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout).mean(1)

    for dropout in (0.0, 0.5):
        program = StreamingCNN(Local(Attends(dropout), 8), verify=False)._program(
            CallKind((1, 3, 24, 24), torch.float32)
        )
        (call,) = (node.target for node in program.captured.nodes if isinstance(node.target, LocalCall))
        assert call.cost.draws == (dropout > 0)


class Keeps(nn.Module):
    """Sets attributes: to what it makes of windows, a counter, a list, a cache of what is always the same."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls, self.all, self.cache = what, 0, [], None

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "features":
            self.features = x.exp().view(-1)
        elif self.what == "calls":
            self.calls += 1
        elif self.what == "all":
            self.all.append(len(x))
        elif self.cache is None:
            self.cache = torch.arange(x.shape[1]).to(x)
        return x if self.cache is None else x * self.cache


@pytest.mark.parametrize("what", ["features", "calls", "all"])
def test_attributes_that_windows_would_leave_are_refused_by_name(what: str) -> None:
    net = nn.Sequential(Local(nn.Sequential(convolution(3, (8, 8)), Keeps(what)), 8), nn.Conv2d(5, 2, 1))
    with pytest.raises(UnsupportedOpError, match=f"attribute 1.{what} within Local") as raised:
        StreamingCNN(net, verify=False)(torch.randn(1, 3, 24, 24))
    assert raised.value.module_path == "0"


def test_a_cache_of_what_is_always_the_same_is_exact() -> None:
    net = nn.Sequential(Local(nn.Sequential(convolution(3, (8, 8)), Keeps("cache")), 8), nn.Conv2d(5, 2, 1))
    assert_exact(net, torch.randn(1, 3, 24, 24), [8])


class Centred(nn.Module):
    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.by_value = by_value

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.by_value:
            return x * 2 if x.max() > 0 else x
        return x - x.mean(0)


def test_decisions_by_values_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedOpError, match="looks at values"):
        StreamingCNN(Local(Centred(by_value=True), 8))(torch.randn(1, 3, 24, 24))


def test_windows_that_depend_on_each_other_are_found_at_first_use() -> None:
    with pytest.raises(VerificationError, match="another result"):
        StreamingCNN(nn.Sequential(Local(Centred(by_value=False), 64), nn.Conv2d(3 * 64 * 64, 1, 1)))(
            torch.randn(1, 3, 192, 256)
        )


def test_batch_norm_is_evaluated_with_its_running_statistics() -> None:
    module = nn.Sequential(convolution(3, (8, 8)), nn.BatchNorm1d(5))
    net = nn.Sequential(Local(module, 8), nn.Conv2d(5, 2, 1)).double().train()
    image = torch.randn(1, 3, 24, 33, dtype=torch.float64)
    found = StreamingCNN(net, 9)(image)
    assert module.training and int(module[1].num_batches_tracked) == 0
    assert relative_error(found, net.eval()(image)) < TOLERANCE
    with pytest.raises(UnsupportedOpError, match="statistics of a batch of windows"):
        StreamingCNN(net.train(), 9, batch_statistics="exact")(image)


def test_autocast_runs_the_module_in_bfloat16() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Local(vit(), 32), Attention(192))
    image = torch.rand(1, 3, 70, 100)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        found = stream(net, (32, 64))(image)
        expected = net(image)
    found.float().sum().backward()
    assert relative_error(found, expected) < 0.02
    assert relative_error(found, net(image)) > 1e-4
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_module_in_bfloat16_runs_as_it_is() -> None:
    net = nn.Sequential(Local(vit(), 32), Attention(192)).to(torch.bfloat16)
    image = torch.rand(1, 3, 70, 100, dtype=torch.bfloat16)
    assert relative_error(stream(net, 64)(image), net(image)) < 0.05


def test_whole_maps_take_it_too() -> None:
    net = nn.Sequential(Softmax(), Local(convolution(3, (8, 8)), 8)).double()
    image = torch.randn(1, 3, 24, 33, dtype=torch.float64)
    assert relative_error(stream(net, 9)(image), net(image)) < TOLERANCE


class Softmax(nn.Module):
    """Attention of all positions to all."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.max_pool2d(x, 3, 1, 1).flatten(2)
        return (
            ((tokens.transpose(1, 2) @ tokens).softmax(2) @ tokens.transpose(1, 2))
            .transpose(1, 2)
            .unflatten(2, x.shape[2:])
        )


def test_what_a_window_needs_is_what_autograd_saves() -> None:
    module = vit()
    program = StreamingCNN(Local(module, 32))._program(CallKind((1, 3, 64, 64), torch.float32))
    (value,) = [value for value in program.stages[0].values if value.placed is not None]
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = module(torch.rand(8, 3, 32, 32))
    assert value.placed.saved_bytes == pytest.approx(sum(saved.values()) / 8, rel=0.05)
    assert (
        value.placed.saved_bytes * 1.5
        > value.placed.saved_bytes + value.placed.backward_bytes
        > value.placed.saved_bytes
    )
    assert 0 < value.placed.forward_bytes < value.placed.saved_bytes / 2
    del result


def test_tiles_hold_whole_windows() -> None:
    plan = StreamingCNN(Local(convolution(3, (56, 56)), 56, 48), memory_budget="300MiB").plan((3, 4000, 5000))
    assert plan.tile_size[0] % 48 == plan.tile_size[1] % 48 == 0


def test_the_receptive_field_is_the_window() -> None:
    layer = StreamingCNN(Local(convolution(3, (8, 8)), (8, 10), (5, 12))).plan((3, 80, 90)).layers[0]
    assert (layer.op, layer.receptive_field, layer.stride) == ("Local", (8, 10), (5, 12))
