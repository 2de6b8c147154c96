"""Property test: networks, image sizes, tiles, batch sizes and dtypes drawn at random agree with the whole image."""

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import assert_exact, randomise
from tests.streaming.test_rules import FUNCTIONS, POOLS
from widefield.streaming import UnsupportedOpError

layer = st.one_of(
    st.tuples(st.just("conv"), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5), st.integers(1, 2)),
    st.tuples(st.just("depthwise"), st.integers(1, 7), st.integers(1, 2)),
    st.tuples(st.just("norm")),
    st.tuples(st.just("act"), st.sampled_from(["relu", "gelu", "hardswish"])),
    st.tuples(st.just("max"), st.integers(1, 3), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("avg"), st.integers(2, 3), st.integers(1, 2), st.booleans()),
    st.tuples(st.just("up"), st.sampled_from(["nearest", "bilinear"])),
    st.tuples(st.just("transposed"), st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.integers(1, 3)),
    st.tuples(st.just("pick"), st.lists(st.integers(-4, 3), min_size=4, max_size=4)),
    st.tuples(st.just("residual"), st.integers(1, 3)),
    st.tuples(st.just("reflect"), st.integers(1, 2)),
    st.tuples(st.just("layernorm")),
    st.tuples(st.just("keep")),
    st.tuples(st.just("excite")),
    st.tuples(st.just("group norm"), st.sampled_from([1, 2])),
    st.tuples(st.just("attend")),
    st.tuples(st.just("cross-covariance")),
    st.tuples(st.just("spread")),
)


class Drawn(nn.Module):
    """Four channels throughout; "keep" adds the current map to the outputs; too small maps skip a layer."""

    def __init__(self, layers: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.layers = layers
        self.parts = nn.ModuleList(map(self._part, layers))

    @staticmethod
    def _part(spec: tuple[Any, ...]) -> nn.Module:
        kind, *args = spec
        if kind == "conv":
            return nn.Conv2d(4, 4, args[0], args[1], args[2], args[3])
        if kind == "depthwise":
            return nn.Conv2d(4, 4, args[0], args[1], args[0] // 2, groups=4, bias=False)
        if kind == "norm":
            return nn.BatchNorm2d(4)
        if kind == "max":
            return nn.MaxPool2d(args[0], args[1], args[0] // 2, ceil_mode=args[2])
        if kind == "avg":
            return nn.AvgPool2d(args[0], args[1], args[0] // 2, count_include_pad=args[2])
        if kind == "transposed":
            kernel, stride, beyond, dilation = args
            beyond = min(beyond, max(stride, dilation) - 1)
            return nn.ConvTranspose2d(4, 4, kernel, stride, output_padding=beyond, dilation=dilation)
        if kind == "residual":
            return nn.Conv2d(4, 4, 2 * args[0] + 1, padding=args[0])
        if kind == "reflect":
            return nn.Conv2d(4, 4, 2 * args[0] + 1, padding=args[0], padding_mode="reflect")
        if kind == "excite":
            return nn.Conv2d(4, 4, 1)
        if kind == "group norm":
            return nn.GroupNorm(args[0], 4)
        return nn.LayerNorm(4) if kind == "layernorm" else nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for (kind, *args), part in zip(self.layers, self.parts, strict=True):
            if kind == "keep":
                outputs.append(x)
            elif min(x.shape[2:]) < 10 and kind in ("conv", "depthwise", "max", "avg", "reflect", "residual"):
                continue
            elif kind == "act":
                x = getattr(F, args[0])(x)
            elif kind == "up":
                x = F.interpolate(x, scale_factor=2, mode=args[0]) if max(x.shape[2:]) < 60 else x
            elif kind == "transposed":
                x = part(x) if max(x.shape[2:]) < 60 else x
            elif kind == "residual":
                x = x + part(x).relu()
            elif kind == "pick":
                x = x[:, torch.tensor(args[0])]
            elif kind == "excite":
                x = x * part(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "attend":  # a sum of all positions, weighted by a softmax over them
                x = x + (x.flatten(2) @ x[:, :1].flatten(2).softmax(-1).mT)[..., None]
            elif kind == "cross-covariance":
                q, k = F.normalize(x.flatten(2), dim=-1), F.normalize(x.flatten(2).tanh(), dim=-1)
                x = x + ((q @ k.mT).softmax(-1) @ x.flatten(2)).view_as(x)
            elif kind == "spread":
                x = x / (1 + x.amax((2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
            elif kind == "layernorm":
                x = part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                x = part(x)
        return [*outputs, x * 1.0]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    layers=st.lists(layer, min_size=2, max_size=9),
    size=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    tiles=st.lists(st.tuples(st.integers(3, 30), st.one_of(st.none(), st.integers(5, 30))), min_size=1, max_size=2),
    batch=st.integers(1, 3),
)
def test_drawn_networks_are_exact(
    layers: list[tuple[Any, ...]], size: tuple[int, int], tiles: list[Any], batch: int
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), randomise(Drawn(layers)))
    assert_exact(module, torch.randn(batch, 2, *size), tiles)


OPERATIONS = {**FUNCTIONS, **POOLS}


class Chain(nn.Module):
    """Operations of the tests of the rules, one after the other with nothing between them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.before, self.names = nn.Conv2d(3, 8, 3, padding=1), names

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for name in self.names:
            x = OPERATIONS[name](x)
        return x


def drawn_chain(seed: int, image: Tensor, length: int = 3) -> Chain:
    """A chain of operations that the size of the image suits, and the sizes that they make."""
    names: list[str] = []
    for name in random.Random(seed).sample(sorted(OPERATIONS), 3 * length):
        try:
            made = Chain([*names, name]).double()(image)
        except (RuntimeError, ValueError):
            continue
        if len(names) < length and made.ndim == 4 and made.shape[1] == 8 and made.numel() and max(made.shape) < 80:
            names.append(name)
    return Chain(names)


def assert_chains_are_exact_or_refused(seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        image = torch.randn(1, 3, 23, 19, dtype=torch.float64)
        chain = drawn_chain(seed, image)
        try:
            assert_exact(chain, image, [[(7, None), (5, 6), (3, 4), (9, 13)][seed % 4]])
        except UnsupportedOpError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {chain.names}") from error


def test_operations_one_after_the_other_are_exact_or_refused() -> None:
    assert_chains_are_exact_or_refused(range(8))


@pytest.mark.slow
def test_a_thousand_rows_of_operations_are_exact_or_refused() -> None:
    assert_chains_are_exact_or_refused(range(1000, 2000))
