"""Property test: whatever is done to a small network, it is streamed exactly, or refused before any pixel is computed.

Networks are drawn, then changed in ways that a capture may not see: hooks, functions with a backward of their own, weights that
are computed from others, caches, branches, attributes, updates in place. They are called with gradients and without, changed
again between calls, and compared with a copy that plain PyTorch runs. The long version: `uv run pytest -m slow
tests/streaming/test_mutations.py`.
"""

import copy
import functools
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.streaming.exactness import relative_error
from widefield.streaming import StreamingCNN, UnsupportedOpError

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "dilated": lambda: nn.Conv2d(4, 4, 3, dilation=2, padding=2),
    "strided": lambda: nn.Conv2d(4, 4, 2, stride=2, padding=1),
    "pointwise": lambda: nn.Conv2d(4, 4, 1),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "pool": lambda x: nn.functional.max_pool2d(x, 2, 1),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
}
STATE = types.SimpleNamespace(memo={}, seen=[], calls=0, scale=2.0)


@functools.lru_cache
def ramp(width: int) -> Tensor:
    return torch.linspace(0, 1, width, dtype=torch.float64)


class Flip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return -2 * grad


def memo(x: Tensor) -> Tensor:
    key = int(x.shape[2])
    if key not in STATE.memo:
        STATE.memo[key] = torch.linspace(1, 2, key, dtype=torch.float64)[:, None]
    return x * STATE.memo[key]


def count(x: Tensor) -> Tensor:
    STATE.calls += 1
    return x * STATE.calls


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 3)
    return x * 1.5


def clamped(x: Tensor) -> Tensor:
    x.data.clamp_(-0.2, 0.2)
    return x * 2


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def seen(x: Tensor) -> Tensor:
    STATE.seen.append(x.detach())
    return x


def nested_branch(x: Tensor) -> Tensor:
    return x * (2 if torch.is_grad_enabled() and x.requires_grad else 3)


# What the part does to the result of its layer: a function of (part, layer's result).
EFFECTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "none": lambda part, x: x,
    "function": lambda part, x: Flip.apply(x),
    "lru_cache": lambda part, x: x * ramp(int(x.shape[3])),
    "memo": lambda part, x: memo(x),
    "global count": lambda part, x: count(x),
    "tensor hook": lambda part, x: hooked(x),
    "data in place": lambda part, x: clamped(x),
    "relu in place": lambda part, x: (x + 1).relu_(),
    "add in place": lambda part, x: (x * 1).add_(x.detach()),
    "no_grad": lambda part, x: without_gradients(x),
    "put away": lambda part, x: seen(x),
    "branch on the mode": lambda part, x: nested_branch(x),
    "branch on training": lambda part, x: x * (2 if part.training else 3),
    "branch on a weight": lambda part, x: x * (2 if part.gain.requires_grad else 3),
    "branch on the dtype": lambda part, x: x * (2 if x.dtype == torch.float64 else 3),
    "branch on text": lambda part, x: x * (2 if str(x.shape[2]).endswith("2") else 3),
    "attribute": lambda part, x: part.leave(x),
    "counter": lambda part, x: x * part.counted(),
    "recurrent": lambda part, x: part.recurrent(x),
    "settings": lambda part, x: x * part.cfg.scale,
    "settings elsewhere": lambda part, x: x * STATE.scale,
    "checkpoint": lambda part, x: checkpoint(torch.tanh, x, use_reentrant=False),
    "data": lambda part, x: x * part.gain.data + x.data,
    "weight in place": lambda part, x: x * part.gain.data.clamp_(-0.5, 0.5),
    "buffer in place": lambda part, x: x + part.offset.mul_(0.5),
    "value": lambda part, x: x * part.gain.sum().item(),
    "value of a map": lambda part, x: x * 2 if x.sum() > 0 else x,
    "complex": lambda part, x: (x * (1 + 2j)).abs(),
    "python's random": lambda part, x: x * random.random(),
    "generator": lambda part, x: x * torch.rand(1, generator=torch.Generator(), dtype=torch.float64),
    "own gradient": lambda part, x: x * (torch.autograd.grad(x.sum(), x)[0].sum() if x.requires_grad else 1),
    "numpy": lambda part, x: x * float(part.gain.detach().numpy().sum()),
    "weight from a list": lambda part, x: x * part.hidden[0],
    "scaled view": lambda part, x: x[:, [-1, 0, 1, 2]].flip(1),
}


class Part(nn.Module):
    """A layer, what comes after it, and an effect."""

    def __init__(self, layer: str, after: str, effect: str) -> None:
        super().__init__()
        self.layer, self.after, self.effect = LAYERS[layer](), AFTER[after], EFFECTS[effect]
        self.gain, self.cfg = nn.Parameter(torch.rand(4, 1, 1) + 0.5), types.SimpleNamespace(scale=2.0)
        self.register_buffer("offset", torch.rand(4, 1, 1))
        self.hidden = [nn.Parameter(torch.rand(4, 1, 1, dtype=torch.float64))]

    def leave(self, x: Tensor) -> Tensor:
        self.features, self.size = x.relu(), tuple(x.shape[2:])
        return x

    def counted(self) -> int:
        self.calls = getattr(self, "calls", 0) + 1
        return self.calls

    def recurrent(self, x: Tensor) -> Tensor:
        self.last = x.mean((2, 3), keepdim=True) + getattr(self, "last", 0.0)
        return x * self.last

    def forward(self, x: Tensor) -> Tensor:
        return self.effect(self, self.after(self.layer(x)))


class Drawn(nn.Module):
    def __init__(self, parts: list[tuple[str, str, str]]) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(3, 4, 3), nn.ModuleList(Part(*part) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        return x


def _put(net: Drawn, holder: dict[str, Tensor]) -> None:
    net.parts[0].layer.register_forward_hook(lambda module, args, out: holder.update(x=out))


def _low_rank(net: Drawn) -> None:
    prune.random_unstructured(net.parts[-1].layer, "weight", 0.3)


# Done to the network, before the first call or between calls.
CHANGES: dict[str, Callable[[Drawn], Any]] = {
    "nothing": lambda net: None,
    "forward hook": lambda net: net.parts[0].register_forward_hook(lambda module, args, out: out * 3),
    "forward pre-hook": lambda net: net.parts[-1].layer.register_forward_pre_hook(
        lambda module, args: (args[0].tanh(),)
    ),
    "backward hook": lambda net: net.parts[0].register_full_backward_hook(lambda module, into, out: (into[0] * 2,)),
    "backward pre-hook": lambda net: net.parts[-1].layer.register_full_backward_pre_hook(
        lambda module, out: (out[0] * 2,)
    ),
    "hook on a parameter": lambda net: net.stem.weight.register_hook(lambda grad: grad * 2),
    "hook that puts away": lambda net: _put(net, {}),
    "weight norm": lambda net: parametrizations.weight_norm(net.parts[-1].layer),
    "spectral norm": lambda net: parametrizations.spectral_norm(net.parts[-1].layer).eval(),
    "pruning": _low_rank,
    "frozen": lambda net: net.parts[0].requires_grad_(False),
    "all frozen": lambda net: net.requires_grad_(False),
    "evaluation mode": lambda net: net.eval(),
    "other settings": lambda net: setattr(net.parts[0].cfg, "scale", 5.0),
    "other weights": lambda net: (
        net.parts[0].layer.weight.data.mul_(1.5) if "weight" in net.parts[0].layer._parameters else None
    ),
    "another layer": lambda net: setattr(net.parts[0], "layer", nn.Conv2d(4, 4, 1).double()),
    "another function": lambda net: setattr(net.parts[0], "after", torch.sigmoid),
}

networks = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(list(LAYERS)), st.sampled_from(list(AFTER)), st.sampled_from(list(EFFECTS))),
        min_size=1,
        max_size=3,
    ),
    st.lists(st.sampled_from(list(CHANGES)), min_size=1, max_size=3),
    st.sampled_from([(21, 18), (13, 30), (16, 16)]),
    st.sampled_from([5, (7, None), (4, 9)]),
    st.booleans(),
)


def results(call: Callable[[Tensor], Tensor], net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Output and gradients where gradients are enabled, the output else."""
    net.zero_grad()
    image = image.clone().requires_grad_(torch.is_grad_enabled())
    out = call(image)
    found = {"output": out.detach()}
    if out.requires_grad:
        (out * torch.arange(out.numel(), dtype=out.dtype).cos().view(out.shape)).sum().backward()
        named = {"image": image, **dict(net.named_parameters())}
        found.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None and p.grad.any()})
    return found


def reset() -> None:
    STATE.memo.clear(), STATE.seen.clear(), ramp.cache_clear()
    STATE.calls, STATE.scale = 0, 2.0


def assert_exact_or_refused(drawn: Any) -> None:
    parts, changes, size, tile, verified = drawn
    reset()
    torch.manual_seed(0)
    net = Drawn(parts).double()
    plain = copy.deepcopy(net)
    streamed = StreamingCNN(net, tile, unsupported="run_whole", verify=verified)
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    for change in ["nothing", *changes]:
        for one in (net, plain):
            torch.manual_seed(1)
            try:
                CHANGES[change](one)
            except (RuntimeError, TypeError, ValueError):  # PyTorch refuses it: a hook on a frozen parameter, say
                return
        STATE.scale += 1
        for grads in (True, False):
            with torch.set_grad_enabled(grads):
                before, calls = {name: value.clone() for name, value in net.state_dict().items()}, STATE.calls
                try:
                    found = results(streamed, net, image)
                except UnsupportedOpError as error:
                    assert len(str(error)) < 1500
                    assert (STATE.calls, STATE.seen) == (calls, [])
                    assert all(type(value) is Tensor for value in STATE.memo.values())
                    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
                    return
                except ValueError:  # a module that cannot run
                    with pytest.raises((TypeError, RuntimeError, ValueError)):
                        plain(image)
                    return
                expected = results(plain, plain, image)
                for name in {**expected, **found}:
                    given = expected.get(name, found.get(name))
                    errors = relative_error(
                        found.get(name, torch.zeros_like(given)), expected.get(name, torch.zeros_like(given))
                    )
                    assert errors < 1e-9, f"{name} after {change}, gradients {grads}: {errors:.1e}"
                assert all(type(value) is Tensor for value in (*STATE.memo.values(), ramp(image.shape[3])))


@given(networks)
@settings(
    max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)
@pytest.mark.filterwarnings("ignore")
def test_a_changed_network_is_exact_or_refused(drawn: Any) -> None:
    assert_exact_or_refused(drawn)


@pytest.mark.slow
@given(networks)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_changed_networks_are_exact_or_refused(drawn: Any) -> None:
    assert_exact_or_refused(drawn)
