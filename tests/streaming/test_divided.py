"""A stage that is cut at a narrow map, so that the deep part is recorded and the shallow one recomputed: the same numbers."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.streaming.exactness import TOLERANCE, assert_exact, relative_error
from widefield.streaming import StreamingCNN, planner
from widefield.streaming.captured import CallKind
from widefield.streaming.drafts import PlanRequest
from widefield.streaming.planner import Planner
from widefield.streaming.program import Program


class Net(nn.Module):
    """A block with a shortcut, strides, a map that leaves at the cut, and a mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 5, 2, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.deep = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.ReLU(), nn.Conv2d(10, 8, 3, padding=1), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        deep = self.deep(x)
        return x, deep, deep.mean((2, 3))


def divide(monkeypatch: pytest.MonkeyPatch, which: int, shares: tuple[float, ...] = (0.0, 1.0)) -> None:
    """All plans are of the program with this cut, and record these shares of its scans."""
    finished = planner._finished

    def divided(program: Program, request: PlanRequest) -> Planner:
        program = (*program.divisions, *program.waists)[which]()
        assert len(program.stages) > 1
        return planner._planner(program, PlanRequest(**{**vars(request), "divided": True}))

    def recorded(*args: Any) -> Any:
        plan, scans = finished(*args)
        counts = [round(share * len(scan.grid.order)) for share, scan in zip(shares, scans, strict=True)]
        return plan, tuple(type(s)(s.grid, s.carry_sizes, count) for s, count in zip(scans, counts, strict=True))

    monkeypatch.setattr("widefield.streaming.module.make_planner", divided)
    monkeypatch.setattr(planner, "_finished", recorded)


def program_of(module: nn.Module) -> Program:
    return StreamingCNN(module)._program(CallKind((1, 3, 64, 64), torch.float32))


def test_a_stage_can_be_cut_where_all_goes_through_one_map() -> None:
    """Not within the block, nor between a layer and its ReLU, nor where the map is larger than one before."""
    cuts = [division().stages[1] for division in program_of(Net()).divisions]
    shapes = [stage.values[stage.inputs[0]].shape for stage in cuts]
    assert shapes == [(1, 6, 32, 32), (1, 6, 16, 16), (1, 6, 16, 16), (1, 10, 8, 8), (1, 8, 8, 8)]
    assert all(len(stage.inputs) == 1 for stage in cuts)


@pytest.mark.parametrize("which", range(4))
def test_any_cut(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    divide(monkeypatch, which)
    assert_exact(Net().eval(), torch.randn(2, 3, 45, 39), [(8, None), (11, 13)])


def test_a_share_of_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    divide(monkeypatch, 2, (0.4, 0.6))
    assert_exact(Net().eval(), torch.randn(1, 3, 45, 39), [(8, None), (11, 13)])


def test_a_region_and_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net().double().eval()
    image, mask = torch.randn(1, 3, 64, 48, dtype=torch.float64), torch.zeros(64, 48, dtype=torch.bool)
    mask[8:40, 16:44] = True
    calls = [{"mask": mask}, {"region": (16, 8, 24, 20)}]

    def found() -> list[Tensor]:
        results: list[Tensor] = []
        for call in calls:
            streamed = StreamingCNN(module, 16, verify=False)
            module.zero_grad()
            tensors = streamed(image, **call)[:2]
            torch.stack([x.square().sum() for x in tensors]).sum().backward()
            results += [*tensors, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]
        return results

    expected = found()
    divide(monkeypatch, 2)
    for a, b in zip(found(), expected, strict=True):
        assert relative_error(a, b) < TOLERANCE


@pytest.mark.parametrize("which", range(5))
def test_a_map_that_is_written_and_kept_nowhere_is_no_place_for_a_cut(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    possible = list[bool]()

    def divided(program: Program, request: PlanRequest) -> Planner | None:
        cut = planner._planner(program.divisions[which](), replace(request, divided=True))
        possible.append(cut is not None)
        return cut or planner._planner(program, request)

    monkeypatch.setattr("widefield.streaming.module.make_planner", divided)
    module, image = Net().double().eval(), torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = module(image)[:2]
    streamed, arrays = StreamingCNN(module, 16, verify=False), [torch.zeros_like(x) for x in expected]
    streamed.write(image, arrays)
    assert all(relative_error(found, plain) < TOLERANCE for found, plain in zip(arrays, expected, strict=True))
    assert possible == [which not in (2, 4)]  # the maps that are written


def test_deep_parts_that_are_hundreds_of_times_smaller_are_planned() -> None:
    module = nn.Sequential(*(nn.Conv2d(3 if k == 0 else 4, 4, 3, 2, 1) for k in range(13)))
    with pytest.raises(ValueError, match="smallest that works"):
        StreamingCNN(module, memory_budget="64KiB", verify=False).plan((3, 4096, 4096))
    assert StreamingCNN(module, memory_budget="64MiB", verify=False).plan((3, 4096, 4096)).total_bytes <= 64 << 20


class Skips(nn.Module):
    """An encoder and a decoder that reads two of its maps besides; the deepest part has most weights."""

    def __init__(self, width: int = 6, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, width), (width, 8), (8, 4 * width)))
        self.deepest = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4 * width, 4 * width, 3, 1, 1), nn.ReLU()) for _ in range(layers))
        )
        self.up = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1) for a, b in ((4 * width + 8, 8), (8 + width, 4)))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.down[0](x))
        second = torch.relu(self.down[1](first))
        x = self.deepest(torch.relu(self.down[2](second)))
        for layer, skip in zip(self.up, (second, first), strict=True):
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = torch.relu(layer(torch.cat([x, skip], 1)))
        return x


def test_a_network_with_skips_is_cut_around_its_deep_parts() -> None:
    inputs = [
        [sorted(stage.values[v].shape[1:] for v in stage.inputs) for stage in waist().stages]
        for waist in program_of(Skips()).waists
    ]
    assert inputs == [
        [[(3, 64, 64)], [(8, 16, 16)], [(6, 32, 32), (8, 16, 16), (24, 8, 8)]],
        [[(3, 64, 64)], [(6, 32, 32)], [(6, 32, 32), (8, 16, 16)]],
    ]


@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.0), (0.3, 1.0, 0.5), (0.0, 0.4, 1.0)], ids=str)
@pytest.mark.parametrize("which", [-2, -1])
def test_any_cut_around_a_deep_part(which: int, shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    divide(monkeypatch, which, shares)
    assert_exact(Skips().eval(), torch.randn(2, 3, 48, 40), [(8, None), (16, 24)])


def test_the_planner_cuts_around_a_deep_part(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = partial(StreamingCNN, Skips(width=48, layers=8), memory_budget="60MiB", verify=False)
    plan = wrap().plan((3, 512, 512))
    monkeypatch.setattr(planner, "_GAIN", 1.0)
    whole = wrap().plan((3, 512, 512))
    assert (plan.stages, whole.stages) == (3, 1)
    assert plan.predicted_overhead < whole.predicted_overhead - 0.05


def deep_net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1 if inputs == outputs else 2, 1), nn.ReLU()]
    return nn.Sequential(*layers)


def test_the_planner_cuts_where_that_is_faster_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    module = deep_net()
    wrap = partial(StreamingCNN, module, memory_budget="24MiB", verify=False)
    plan = wrap().plan((3, 512, 512))
    monkeypatch.setattr(planner, "_GAIN", 1.0)
    whole = wrap().plan((3, 512, 512))
    assert (plan.stages, whole.stages) == (2, 1)
    assert plan.predicted_overhead < whole.predicted_overhead - 0.02
    assert plan.total_bytes <= 24 << 20


def test_the_smallest_budget_is_met_by_a_cut() -> None:
    shallow = [layer for _ in range(4) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    deep = [layer for _ in range(12) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    between = nn.Conv2d(16, 32, 3, 4, 1), nn.ReLU()
    module = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), *shallow, *between, *deep).double()
    image = torch.randn(1, 3, 512, 512, dtype=torch.float64)
    with pytest.raises(ValueError, match="the smallest that works") as error:
        StreamingCNN(module, memory_budget="200KiB").plan(image.shape)
    needed = int(str(error.value).partition(" bytes,")[0].rpartition("(")[2])
    streamed = StreamingCNN(module, memory_budget=needed)
    plan = streamed.plan(image.shape)
    assert plan.stages == 2
    assert plan.total_bytes <= needed
    expected = torch.autograd.grad(module(image).square().sum(), list(module.parameters()))
    found = torch.autograd.grad(streamed(image).square().sum(), list(module.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE


def test_nothing_is_cut_where_all_fits_and_without_gradients() -> None:
    module = deep_net()
    assert StreamingCNN(module, memory_budget="500MiB").plan((3, 512, 512)).stages == 1
    assert StreamingCNN(module, 64).plan((3, 512, 512)).stages == 1
    with torch.no_grad():
        assert StreamingCNN(module, memory_budget="12MiB").plan((3, 512, 512)).stages == 1


class Shared(nn.Module):
    """The image is read again behind the cut, a layer works on both sides, and each side drops."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.both = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.out, self.drop = nn.Conv2d(9, 4, 3, padding=1), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.drop(self.both(self.drop(self.both(self.stem(x)).relu())))
        return self.out(torch.cat([deep, functional.avg_pool2d(x, 2)], 1))


@pytest.mark.parametrize("which", range(2))
def test_what_both_parts_read_and_draw(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, results = Shared().double().train(), []
    for cut in (False, True):
        if cut:
            divide(monkeypatch, which, (0.3, 0.5))
        image = torch.rand(
            2, 3, 46, 38, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        module.zero_grad()
        torch.manual_seed(3)
        found = StreamingCNN(module, (8, None), verify=False)(image)
        found.square().sum().backward()
        results.append([found.detach(), image.grad, *(p.grad for p in module.parameters())])
    assert all(relative_error(f, e) <= TOLERANCE for f, e in zip(*results, strict=True))
