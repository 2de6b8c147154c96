"""Rolled maps and windowed attention: networks of both, and the extents of what goes round."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)

from tests.streaming.exactness import TOLERANCE, assert_exact, randomise, relative_error
from tests.streaming.masked import foreground
from tests.streaming.test_parts import assert_part_is_exact
from tests.streaming.test_rules import Fn
from widefield.streaming import StreamingCNN
from widefield.streaming.autocast import Autocast
from widefield.streaming.build import passes
from widefield.streaming.capture import trace_module
from widefield.streaming.captured import CallKind
from widefield.streaming.extents import AxisMap, BorderPad, Resample, Transposed, Window, identity
from widefield.streaming.rules.rolled import _around

AXES: dict[str, AxisMap] = {
    "identity": identity(11),
    "3x3": Window(11, 11, 3, 1, 1),
    "windows of 4": Window(12, 3, 4, 4),
    "stride 2, padding 1": Window(11, 6, 3, 2, 1),
    "pad": Window(11, 16, padding=2),
    "crop": Window(11, 7, padding=-3),
    "repeat": Transposed(5, 15, 3, 3),
    "reflect": BorderPad(11, 3, 2, reflect=True),
    "bilinear": Resample(11, 22, 0.5, "linear"),
}


class Net(nn.Module):
    """A small Swin: the last map, normalised, or classes."""

    def __init__(self, depths: list[int], version: int, classes: bool) -> None:
        super().__init__()
        merging = {"downsample_layer": PatchMergingV2} if version == 2 else {}
        self.swin = SwinTransformer(
            patch_size=[2, 2],
            embed_dim=8,
            depths=depths,
            num_heads=[2] * len(depths),
            window_size=[4, 4],
            stochastic_depth_prob=0.0,
            num_classes=5,
            block=SwinTransformerBlockV2 if version == 2 else SwinTransformerBlock,
            **merging,
        )
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return self.swin(x) if self.classes else self.swin.norm(self.swin.features(x)).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def traced_for_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace for all sizes takes longer than all else here, and gives the same operations."""
    monkeypatch.setattr("widefield.streaming.capture._SYMBOLIC_LIMIT", 0.0)


@pytest.mark.parametrize(
    ("version", "size", "classes"),
    [
        (1, (21, 26), False),
        (2, (32, 24), True),
        pytest.param(1, (32, 48), True, marks=pytest.mark.slow),
        pytest.param(1, (37, 29), False, marks=pytest.mark.slow),
        pytest.param(1, (13, 50), False, marks=pytest.mark.slow),
        pytest.param(2, (37, 29), False, marks=pytest.mark.slow),
    ],
)
def test_a_swin_is_exact(version: int, size: tuple[int, int], classes: bool) -> None:
    torch.manual_seed(0)
    module = randomise(Net([2, 2], version, classes)).eval()
    assert_exact(module, torch.randn(2, 3, *size), [(9, None), (11, 20)])


@pytest.mark.slow
def test_shifted_windows_twice_roll_further_each_time() -> None:
    torch.manual_seed(0)
    module = randomise(Net([4], 1, False)).eval()
    assert_exact(module, torch.randn(1, 3, 26, 35), [(7, None)])


def test_a_map_of_one_window_is_exact_for_a_batch() -> None:
    torch.manual_seed(0)
    assert_exact(randomise(Net([1, 2], 1, True)).eval(), torch.randn(2, 3, 16, 16), [(8, None)])


def test_the_receptive_field_grows_where_windows_are_shifted() -> None:
    plan = StreamingCNN(Net([2], 1, False), 64, verify=False).plan((1, 3, 256, 256))
    fields = [layer.receptive_field for layer in plan.layers if "view" in layer.op]
    assert fields[0] == (8, 8)
    assert fields[-1] == (16, 16)


def test_the_masks_of_shifted_windows_are_made_tile_by_tile() -> None:
    module, image = Net([2], 1, False).eval(), torch.zeros(1, 3, 128, 192)
    with torch.no_grad():
        program = StreamingCNN(module, 64, verify=False)._program(
            CallKind(tuple(image.shape), image.dtype, image.device)
        )
    assert program.broadcast, "the numbers of the parts that a window may hold are a map"
    assert program.combined_bytes < 16 * 64 * 96 * 4, "a mask has 16 numbers for each position"


class Rolling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, (-3, 2), (2, 3))


MASKED: dict[str, Callable[[Tensor], Tensor]] = {
    "a result that is rolled": lambda x: x.roll((-3, 2), (2, 3)),
    "means": lambda x: x.roll((-3, 2), (2, 3)) * x.roll((2, 5), (2, 3)).mean((2, 3), keepdim=True),
    "circular padding": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1) * x,
    "statistics": lambda x: torch.cat([x.roll((-3, 2), (2, 3)).var((2, 3)), x.roll((1, 2), (2, 3)).logsumexp((2, 3))], 1),
    "cells": lambda x: F.adaptive_max_pool2d(x.roll((-2, 3), (2, 3)), (3, 2)).flatten(1),
    "group norm of a map that rolls back": lambda x: F.group_norm(x.roll((-2, 3), (2, 3)), 2).roll((2, -3), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_of_rolled_maps_is_exact(name: str) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 7, 6, dtype=torch.bool)
    mask[0, 2:4, 1:3] = mask[0, 6, 5] = mask[1, 0, 0] = mask[1, 3, 3] = True
    count = 1 if name == "circular padding" else 2  # of what slices give it is not known whether they are of the batch
    assert_part_is_exact(
        Fn(MASKED[name], channels=6, after=None), torch.randn(count, 3, 23, 19), (5, 6), mask=mask[:count]
    )


class Pooled(nn.Module):
    """The means over the positions of a Swin's last map, and the map."""

    def __init__(self) -> None:
        super().__init__()
        self.net = randomise(Net([2], 1, False)).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net(x)
        return x.mean((2, 3)), x


def test_a_mask_of_a_swin_is_exact() -> None:
    torch.manual_seed(0)
    cells = torch.zeros(1, 5, 4, dtype=torch.bool)
    cells[0, 1, :2] = cells[0, 4, 3] = True
    module, image = Pooled().double(), torch.randn(1, 3, 26, 35).double().requires_grad_()
    last = module.net(torch.where(foreground(cells, (26, 35)), image, 0.25))
    inside = foreground(cells, (last.shape[2], last.shape[3]))
    expected = (last * inside).sum((2, 3)) / inside.sum(), last * inside
    found = StreamingCNN(module, 9, verify=False)(image, mask=cells, fill=0.25)
    weights = [torch.randn_like(x) for x in expected]
    gradients = []
    for results in (found, expected):
        loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True))
        gradients.append(
            torch.autograd.grad(loss, [image, *module.parameters()], allow_unused=True, materialize_grads=True)
        )
    for f, e in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert relative_error(f.detach(), e.detach()) < TOLERANCE


@pytest.mark.parametrize("region", [(0, 0, 9, 7), (11, 13, 10, 13), (8, 0, 1, 26), (20, 25, 1, 1), (0, 0, 21, 26)])
def test_a_region_of_a_rolled_map_is_exact(region: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    circular = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    module = nn.Sequential(
        circular, nn.Tanh(), Rolling(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 2, 3, padding=1)
    ).double()
    y, x, height, width = region
    images = [torch.randn(1, 3, 21, 26).double().requires_grad_()]
    images.append(images[0].detach().clone().requires_grad_())
    expected = module(images[0])[:, :, y : y + height, x : x + width]
    expected.sin().sum().backward()
    weight = circular.weight.grad.clone()
    for tile in ((5, 6), (8, None)):
        module.zero_grad()
        images[1].grad = None
        found = StreamingCNN(module, tile, verify=False)(images[1], region=region)
        found.sin().sum().backward()
        assert relative_error(found.detach(), expected.detach()) < TOLERANCE
        assert relative_error(images[1].grad, images[0].grad) < TOLERANCE
        assert relative_error(circular.weight.grad, weight) < TOLERANCE


def test_a_region_of_a_swin_is_exact() -> None:
    torch.manual_seed(0)
    module, image = randomise(Net([2, 2], 1, False)).eval().double(), torch.randn(1, 3, 40, 56).double()
    with torch.no_grad():
        expected = module(image)
        streamed = StreamingCNN(module, 8, verify=False)
        for y, x in ((0, 0), (4, 12), (32, 48)):
            found = streamed(image, region=(y, x, 8, 8))
            assert relative_error(found, expected[:, :, y // 4 : y // 4 + 2, x // 4 : x // 4 + 2]) < TOLERANCE


def test_a_rolled_map_is_written_to_an_array() -> None:
    module, image = nn.Sequential(nn.Conv2d(3, 4, 3), Rolling()).double(), torch.randn(1, 3, 20, 20).double()
    streamed = StreamingCNN(module, (7, 6), verify=False)
    written = np.zeros((1, 4, 18, 18))
    streamed.write(image, written)
    assert relative_error(torch.from_numpy(written), module(image).detach()) < TOLERANCE
    part = np.zeros((1, 4, 9, 9))
    streamed.write(image, part, region=(0, 10, 10, 10))
    assert np.array_equal(part, written[:, :, :9, 9:])


def test_a_rolled_map_is_not_written_to_a_file(tmp_path: Path) -> None:
    streamed = StreamingCNN(nn.Sequential(nn.Conv2d(3, 4, 3), Rolling()), 8, verify=False)
    with pytest.raises(ValueError, match="layer '1' rolls its map, which begins with row 15"):
        streamed.write(torch.randn(1, 3, 20, 20), tmp_path / "map.zarr")


@pytest.mark.parametrize("begin", [0, 1, 4, 5, 10])
@pytest.mark.parametrize("name", AXES)
def test_what_goes_round_reads_what_is_there_and_kept(name: str, begin: int) -> None:
    inner = AXES[name]
    (rolled,) = _around([inner], [begin % inner.n_in], [False])
    outputs = []
    for o in range(rolled.n_out):
        ((part, add),) = rolled.parts(o, o + 1)
        span = rolled.span(o, o + 1)
        outputs.append(part.start)
        assert (part.first + add, part.last + add) == (span.first, span.last)
        if part.last > part.first:
            assert 0 <= rolled.first(o) <= span.first
            assert span.last <= rolled.stop(o + 1) <= rolled.n_in
            assert rolled.ready(span.last - 1) <= o or span.last == 1
            # Input i of what is scanned is input (i + begin) of the map, and once more after a turn.
            assert (span.first + begin - part.first) % inner.n_in == 0
        if o:
            assert rolled.first(o) >= rolled.first(o - 1)
            assert rolled.stop(o) >= rolled.stop(o - 1)
    assert sorted(outputs) == list(range(inner.n_out))
    ready = [rolled.ready(r) for r in range(rolled.n_in + 1)]
    assert ready == sorted(ready)
    assert ready[-1] == rolled.n_out
    assert rolled.again <= inner.n_in


def test_no_more_is_read_twice_than_a_map_was_rolled_by() -> None:
    by_three, by_none = _around([identity(100)] * 2, [3, 0], [False, False])
    assert (by_three.again, by_none.again, by_none.begin) == (0, 3, 3)
    (windows,) = _around([Window(100, 25, 4, 4)], [97], [False])
    assert (windows.begin, windows.again) == (0, 3)


def test_under_autocast_rolled_maps_have_its_dtype() -> None:
    module = Fn(lambda x: x.roll((2, 3), (2, 3)).abs().roll((-2, -3), (2, 3)) + x, after=None)
    captured = trace_module(module, CallKind((1, 3, 7, 9), torch.float32), symbolic=False).at(7, 9)
    assert captured is not None
    *_, (_, graph) = passes(captured, allow_whole=False, autocast=Autocast("cpu", torch.bfloat16))
    assert {graph.computed[node.name] for node in graph.nodes} == {torch.bfloat16}
