"""Fewer maps kept between stages, and more of them computed again: the same numbers."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.streaming.exactness import TOLERANCE, assert_exact, randomise, relative_error
from tests.streaming.test_random_networks import Drawn
from tests.streaming.test_stages import normed, trained_like_plain
from widefield.streaming import StreamingCNN, planner, stream
from widefield.streaming.drafts import PlanRequest
from widefield.streaming.planner import Planner
from widefield.streaming.program import Program


class Bottleneck(nn.Module):
    """A residual block, normalised over groups, gated by means over the image, with dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        )
        self.wide, self.gate, self.drop = nn.Conv2d(4, channels, 1), nn.Conv2d(channels, channels, 1), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.wide(self.body(x).relu()))
        return (x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()).relu()


class UNet(nn.Module):
    """A long shortcut over two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.InstanceNorm2d(6, affine=True), nn.ReLU()
        )
        self.deep = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down(x)
        deep = self.deep(x)
        return self.out(torch.cat([x, self.up(deep)], 1)), deep


def blocks(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), *(Bottleneck(12) for _ in range(count)))


def thin(monkeypatch: pytest.MonkeyPatch, share: float) -> list[Program]:
    """All plans are of the program that keeps the fewest maps (1), or of one between; returned, as they are used."""
    used: list[Program] = []

    def thinned(program: Program, request: PlanRequest) -> Planner:
        choices = program.thinner()
        used.append(choices[round(share * (len(choices) - 1))]() if choices else program)
        planned = planner._planner(used[-1], request)
        assert planned is not None
        return planned

    monkeypatch.setattr("widefield.streaming.module.make_planner", thinned)
    return used


def made(program: Program) -> list[str]:
    return [value.name for stage in program.stages for value in stage.values if value.placed is not None]


@pytest.mark.parametrize("share", [0.5, 1])
@pytest.mark.parametrize("kind", [blocks, UNet])
def test_what_is_computed_again_is_exact(kind: Any, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    used = thin(monkeypatch, share)
    assert_exact(kind().eval(), torch.randn(2, 3, 22, 18), [(8, None), (7, 9)])
    assert len(made(used[0])) > len(set(made(used[0])))


@pytest.mark.cpu
def test_a_budget_that_holds_no_more_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = partial(stream, blocks(6), verify=False)
    rich = wrap(memory_budget="200MiB").plan((3, 600, 500))
    poor = wrap(memory_budget="70MiB").plan((3, 600, 500))
    assert rich.map_place == poor.map_place == "device"
    assert poor.map_bytes < rich.map_bytes / 1.2
    assert poor.total_bytes <= 70 << 20
    assert poor.predicted_overhead > rich.predicted_overhead
    monkeypatch.setattr(planner, "_thinner", lambda *args: None)
    assert wrap(memory_budget="70MiB").plan((3, 600, 500)).map_place == "file"


def test_masks_of_dropout_are_the_same_wherever_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = blocks().double().train(), []
    for thinned in (False, True):
        if thinned:
            thin(monkeypatch, 1)
        image = torch.rand(1, 3, 22, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        image.requires_grad_()
        module.zero_grad()
        torch.manual_seed(3)
        found = StreamingCNN(module, (6, 9), verify=False)(image)
        found.square().sum().backward()
        results.append([found.detach(), image.grad, *(p.grad for p in module.parameters())])
    assert all(relative_error(f, e) <= TOLERANCE for f, e in zip(*results, strict=True))


def test_running_statistics_are_updated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    thin(monkeypatch, 1)
    module = nn.Sequential(normed(), nn.Conv2d(4, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 1)).double()
    images = [torch.randn(2, 3, 14, 15, dtype=torch.float64) for _ in range(2)]
    trained_like_plain(module, images, StreamingCNN(module, (7, 9), batch_statistics="exact", verify=False))


def test_a_region_and_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = UNet().double().eval()
    image, mask = torch.randn(1, 3, 32, 24, dtype=torch.float64), torch.zeros(32, 24, dtype=torch.bool)
    mask[4:20, 8:22] = True
    calls: list[dict[str, Any]] = [{"mask": mask}, {"region": (8, 4, 12, 10)}]

    def found() -> list[Tensor]:
        results: list[Tensor] = []
        for call in calls:
            streamed = StreamingCNN(module, 10, verify=False)
            module.zero_grad()
            tensors = streamed(image, **call)
            torch.stack([x.square().sum() for x in tensors]).sum().backward()
            results += [*tensors, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
        return results

    expected = found()
    thin(monkeypatch, 1)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(found(), expected, strict=True))


LAYERS: list[tuple[Any, ...]] = [
    *(("conv", 3, 1, 1, 1), ("conv", 3, 2, 1, 1), ("depthwise", 5, 1), ("act", "relu"), ("max", 3, 2, False)),
    *(("up", "bilinear"), ("residual", 1), ("keep",), ("excite",), ("excite",), ("group norm", 1), ("group norm", 2)),
    *(("attend",), ("cross-covariance",), ("spread",)),
]


def assert_drawn_are_exact(seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        draw = random.Random(seed)
        layers = draw.choices(LAYERS, k=draw.randint(3, 8))
        module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), randomise(Drawn(layers)))
        size = draw.randint(5, 40), draw.randint(5, 40)
        with pytest.MonkeyPatch.context() as patch:
            thin(patch, draw.random())
            try:
                tiles = [(draw.randint(3, 20), None), (draw.randint(3, 20), draw.randint(5, 20))]
                assert_exact(module, torch.randn(draw.randint(1, 2), 2, *size), tiles)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {layers}, {size}") from error


def test_drawn_networks_are_exact() -> None:
    assert_drawn_are_exact(range(4))


@pytest.mark.slow
def test_five_hundred_drawn_networks_are_exact() -> None:
    assert_drawn_are_exact(range(1000, 1500))
