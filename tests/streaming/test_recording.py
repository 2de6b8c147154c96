"""Steps that are recorded in the forward pass instead of recomputed, and carries that live elsewhere: the same numbers."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.streaming.exactness import TOLERANCE, assert_exact, relative_error
from widefield.streaming import StreamingCNN, planner
from widefield.streaming.arena import Arena
from widefield.streaming.captured import CallKind, Ref
from widefield.streaming.store import Store
from widefield.streaming.tape import Tape


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, 2, 2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Dropout(0.2),
        nn.Sigmoid(),
    )


def change_plans(monkeypatch: pytest.MonkeyPatch, share: float | None, carries: str = "device") -> None:
    """All plans record this share of each scan's steps, and keep carries there."""

    finished = planner._finished

    def changed(*args: Any) -> Any:
        plan, scans = finished(*args)
        scans = [
            scan if share is None else replace(scan, recorded=round(share * len(scan.grid.order))) for scan in scans
        ]
        return replace(plan, carry_place=carries), tuple(scans)

    monkeypatch.setattr(planner, "_finished", changed)


@pytest.mark.parametrize("carries", ["device", "host", "file"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_any_share_of_the_steps(share: float, carries: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    change_plans(monkeypatch, share, carries)

    wrap = partial(StreamingCNN, scratch_dir=tmp_path)
    assert_exact(net().eval(), torch.randn(2, 3, 45, 39), [(8, None), (11, 13)], wrap=wrap)
    assert not list(tmp_path.iterdir())


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_backward_twice(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the recorded steps are gone, and recomputed with the same masks."""
    change_plans(monkeypatch, share)
    module = net().double()
    out = StreamingCNN(module, 9)(torch.rand(1, 3, 40, 41, dtype=torch.float64))
    out.sum().backward(retain_graph=True)
    first = gradients(module)
    module.zero_grad()
    out.sum().backward()
    for a, b in zip(first, gradients(module), strict=True):
        assert relative_error(a, b) < TOLERANCE


def test_inside_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    change_plans(monkeypatch, 0.5)
    module = net().double().eval()
    plain = copy.deepcopy(module)
    image = torch.rand(1, 3, 40, 41, dtype=torch.float64)
    streamed = StreamingCNN(module, 9)
    checkpoint(streamed, image, use_reentrant=False).square().sum().backward()
    plain(image).square().sum().backward()
    for a, b in zip(gradients(module), gradients(plain), strict=True):
        assert relative_error(a, b) < TOLERANCE


def test_an_unused_output_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    change_plans(monkeypatch, 0.5)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    module = Two()
    StreamingCNN(module, 16)(torch.rand(1, 3, 40, 40))[0].sum().backward()
    assert module.a.weight.grad is not None
    assert module.b.weight.grad is None


def test_more_memory_means_less_to_recompute() -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    plans = [StreamingCNN(module, memory_budget=f"{mib}MiB").plan((3, 512, 512)) for mib in (24, 40, 60, 500)]
    overheads = [plan.predicted_overhead for plan in plans]
    assert overheads == sorted(overheads, reverse=True)
    shares = [recorded / steps for ((recorded, steps),) in (plan.recorded for plan in plans)]
    assert shares == sorted(shares)
    assert shares[0] < 0.4
    assert shares[-1] == 1.0
    for plan, mib in zip(plans, (24, 40, 60, 500), strict=True):
        assert plan.total_bytes <= mib * 2**20


def test_a_budget_that_is_too_small_names_one_that_works() -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    with pytest.raises(ValueError, match="the smallest that works") as error:
        StreamingCNN(module, memory_budget="200KiB").plan((3, 512, 512))
    needed = int(str(error.value).partition(" bytes,")[0].rpartition("(")[2])
    assert StreamingCNN(module, memory_budget=needed).plan((3, 512, 512)).total_bytes <= needed


def test_a_forward_pass_needs_less_than_a_step() -> None:
    streamed = StreamingCNN(net(), 64)
    step = streamed.plan((3, 512, 512))
    with torch.no_grad():
        forward = streamed.plan((3, 512, 512))
    assert forward.total_bytes < step.total_bytes
    assert forward.predicted_overhead < step.predicted_overhead


def test_tiles_and_budget_together() -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    alone = StreamingCNN(module, 64).plan((3, 512, 512))
    both = StreamingCNN(module, 64, memory_budget="200MiB").plan((3, 512, 512))
    assert alone.tile_size == both.tile_size == (64, 64)
    assert alone.predicted_bytes["recorded"] == 0 < both.predicted_bytes["recorded"]
    with pytest.raises(ValueError, match="too small"):
        StreamingCNN(module, 64, memory_budget="100KiB").plan((3, 512, 512))


@pytest.mark.cpu
def test_processes_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "free_memory", lambda device: 160 << 20)
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))
    alone = StreamingCNN(module).plan((3, 1024, 1024))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shared = StreamingCNN(module).plan((3, 1024, 1024))
    assert shared.total_bytes <= 40 << 20 < alone.total_bytes <= 80 << 20


class Failing:
    """An image that can be read so often, then no more."""

    shape, dtype = (3, 48, 40), torch.float64

    def __init__(self, reads: int) -> None:
        self.pixels, self.reads = torch.rand(self.shape, dtype=self.dtype), reads

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        self.reads -= 1
        if self.reads < 0:
            raise OSError("the disk has gone")
        return self.pixels[:, y : y + height, x : x + width]


def test_a_backward_pass_that_fails_changes_no_gradient(tmp_path: Path) -> None:
    """Of three stages and a head, only the first reads the image."""
    body = nn.Sequential(
        net(), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    module = body.double().eval()
    streamed = StreamingCNN(module, (16, None), maps="file", scratch_dir=tmp_path)
    steps = -(-48 // 16)
    streamed(Failing(2 * steps)).sum().backward()
    before = gradients(module)
    assert len(before) == len(list(module.parameters()))
    out = streamed(Failing(2 * steps - 1))
    with pytest.raises(OSError, match="disk has gone"):
        out.sum().backward()
    for a, b in zip(before, gradients(module), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.iterdir())


def test_carries_whose_size_nobody_knows_lie_in_few_blocks_and_are_copied_once() -> None:
    arena = Arena(Store(), {})
    given = [torch.rand(1, 3, 2, k + 1) for k in range(64)]
    pieces = [arena.put(piece) for piece in given]
    # Each further block is as large as all before it together, so their sum doubles.
    total, first = sum(piece.numel() for piece in given), given[0].numel()
    assert len(arena.blocks[torch.float32]) <= 1 + math.ceil(math.log2(total / first))
    assert all(map(arena.holds, pieces))
    assert not arena.holds(given[0])
    assert all(torch.equal(piece, other) for piece, other in zip(pieces, given, strict=True))


def test_carries_that_wait_are_not_copied_again() -> None:
    arena = Arena(Store(), {torch.float32: 1 << 16})
    tape: Any = SimpleNamespace(arena=arena)
    waiting = Tape.new_carry(tape, torch.rand(1, 8, 2, 64))
    assert arena.holds(waiting) and Tape.new_carry(tape, waiting) is waiting


def test_a_plan_under_autocast_counts_the_bytes_of_its_dtypes() -> None:
    """Convolutions are computed in 16 bits; a product with a parameter of 32 bits, and what is added to it, is not."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
            self.scale = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(self.a(x)).relu()
            return self.b(x), x + self.b(x) * self.scale

    streamed, image = StreamingCNN(Scaled(), 16, verify=False), torch.rand(1, 3, 40, 40)
    wide = streamed.plan((3, 400, 400))
    with torch.autocast("cpu", torch.bfloat16):
        results = streamed(image)
        plan = streamed.plan((3, 400, 400))
        program = streamed._program(CallKind((1, 3, 40, 40), torch.float32))
    made = {value.name: value.itemsize for stage in program.stages for value in stage.values}
    names = [leaf.name for leaf in program.captured.outputs if isinstance(leaf, Ref)]
    assert [made[name] for name in names] == [x.dtype.itemsize for x in results] == [2, 4]
    assert plan.map_bytes * 2 == wide.map_bytes
    assert plan.total_bytes < 0.9 * wide.total_bytes
