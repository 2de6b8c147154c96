"""Receptive fields, strides, rows carried and positions lost: by hand, by brute force, and of a whole ResNet-18."""

import functools
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from widefield.streaming import StreamingCNN, stream
from widefield.streaming.extents import AdaptiveWindow, AxisMap, BorderPad, Resample, Transposed, Window
from widefield.streaming.layers import Layer, Lost, layer_table


def layers(module: StreamingCNN | nn.Module, height: int, width: int | None = None, tile: int = 64) -> list[Layer]:
    streamed = module if isinstance(module, StreamingCNN) else StreamingCNN(module, tile)
    return list(streamed.plan((1, 3, height, width or height)).layers)


# Rows lost at the top; one fewer at the bottom. Columns are lost like rows. What the last convolution loses, the trunk does.
RESNET18 = """
    0 2, 3 2, 4.0.conv1 3, 4.0.conv2 4, 4.1.conv1 5, 4.1.conv2 6,
    5.0.conv1 4, 5.0.conv2 5, 5.0.downsample.0 3, 5.1.conv1 6, 5.1.conv2 7,
    6.0.conv1 4, 6.0.conv2 5, 6.0.downsample.0 4, 6.1.conv1 6, 6.1.conv2 7,
    7.0.conv1 4, 7.0.conv2 5, 7.0.downsample.0 4, 7.1.conv1 6, 7.1.conv2 7
"""


def test_resnet18() -> None:
    trunk = nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])
    found = layers(trunk, 2880, tile=2880)
    expected = [entry.split() for entry in RESNET18.split(",")]
    assert [(layer.module_path, layer.lost) for layer in found] == [
        (path, Lost(int(n), int(n), int(n) - 1, int(n) - 1)) for path, n in expected
    ]
    assert [layer.op for layer in found] == ["conv2d", "max_pool2d", *["conv2d"] * 19]
    fields = {layer.module_path: layer.receptive_field for layer in found}
    assert [fields[p][0] for p in ("0", "3", "4.1.conv2", "5.1.conv2", "6.1.conv2", "7.1.conv2")] == [
        7, 11, 43, 99, 211, 435,
    ]  # fmt: skip
    assert {f"{layer.module_path[0]} {layer.stride[0]:g} {layer.stride[1]:g}" for layer in found} == {
        "0 2 2", "3 4 4", "4 4 4", "5 8 8", "6 16 16", "7 32 32",
    }  # fmt: skip
    assert found[0].shape == (1, 64, 1440, 1440)
    assert {layer.rows_carried for layer in found} == {0}  # one tile
    assert layers(trunk, 2880, tile=256)[0].rows_carried == 2  # for the pooling, with a window of 3 and a stride of 2


def test_a_small_network_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 0)), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3))
    assert layers(module, 32, 40, tile=8) == [
        Layer("0", "conv2d", (1, 4, 32, 36), (3, 5), (1, 1), 1, Lost(1, 0, 1, 0)),
        Layer("2", "max_pool2d", (1, 4, 16, 18), (4, 6), (2, 2), 2, Lost(1, 0, 1, 0)),
        Layer("3", "conv2d", (1, 5, 14, 16), (8, 10), (2, 2), 0, Lost(1, 0, 1, 0)),
    ]


class Residual(nn.Module):
    """A branch with a wider reach than the other, and one upsampled back to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 7, padding=3), nn.Conv2d(3, 4, 3, padding=1)
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return self.last(torch.cat([self.up(self.down(y)), y], 1))


class Fn(nn.Module):
    """A convolution, then a function of its map."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


# Networks whose stride divides 48, and of which nothing depends on the size of the image.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "strides": lambda: nn.Sequential(nn.Conv2d(3, 4, 5, 3, 1), nn.Conv2d(4, 4, 2)),
    "dilation": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=4, dilation=4), nn.Conv2d(4, 4, 3, 2, 1, dilation=2)),
    "even kernels": lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.Conv2d(4, 4, 2, padding=1)),
    "a stride larger than the kernel": lambda: nn.Sequential(nn.Conv2d(3, 4, 1, 4), nn.Conv2d(4, 4, 3, padding=1)),
    "pooling": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(3, 4, 3, 2, 1)),
    "ceil mode": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, ceil_mode=True)),
    "transposed": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ConvTranspose2d(4, 4, 5, 2, 1, 1)),
    "padding": lambda: Fn(lambda x: F.pad(x, (3, 1, 2, 0))),
    "reflection": lambda: Fn(lambda x: F.pad(x, (3, 1, 2, 4), mode="reflect")),
    "cropping": lambda: Fn(lambda x: F.pad(x[:, :, 2:, ::2], (-3, 1, 0, -2), mode="replicate")),
    "nearest": lambda: Fn(lambda x: F.avg_pool2d(F.interpolate(x, scale_factor=2), 3, 1, 1)),
    "bilinear": lambda: Fn(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "bicubic": lambda: Fn(lambda x: F.interpolate(x, scale_factor=4, mode="bicubic")),
    "bilinear to a quarter": lambda: Fn(lambda x: F.interpolate(x, scale_factor=0.25, mode="bilinear")),
    "pixel shuffle": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.PixelShuffle(2), nn.Conv2d(1, 4, 3, padding=1)),
    "pixel unshuffle": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.PixelUnshuffle(2)),
    "branches": Residual,
}


@functools.cache
def network(name: str) -> StreamingCNN:
    torch.manual_seed(0)
    return StreamingCNN(NETWORKS[name]().double(), 64)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_lost_is_what_a_tile_taken_for_the_image_gets_wrong(name: str) -> None:
    streamed = network(name)
    image = torch.rand(1, 3, 144, 144, dtype=torch.float64)
    whole = streamed.module(image)
    for size in (48, 52 if name in ("branches", "pixel unshuffle") else 53):
        layer = layers(streamed, size)[-1]
        tile = streamed.module(image[:, :, 48 : 48 + size, 48 : 48 + size])
        top, left = (48 / stride for stride in layer.stride)
        assert top.is_integer() and left.is_integer()
        there = whole[:, :, int(top) : int(top) + tile.shape[2], int(left) : int(left) + tile.shape[3]]
        wrong = (tile - there).abs().amax((0, 1)) > 1e-12
        rows, cols = wrong[:, wrong.shape[1] // 2], wrong[wrong.shape[0] // 2]
        assert layer.lost == Lost(_leading(rows), _leading(cols), _leading(rows.flip(0)), _leading(cols.flip(0)))


def _leading(wrong: Tensor) -> int:
    """Positions up to the last wrong one of the first half."""
    places = wrong[: len(wrong) // 2].nonzero()
    return int(places.max()) + 1 if len(places) else 0


@pytest.mark.parametrize("name", NETWORKS)
def test_the_receptive_field_is_where_the_gradient_of_the_middle_is(name: str) -> None:
    streamed = network(name)
    image = torch.rand(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    out = streamed.module(image)
    (grad,) = torch.autograd.grad(out[:, :, out.shape[2] // 2, out.shape[3] // 2].sum(), image)
    places = grad[0].abs().amax(0).nonzero()
    height, width = (places.amax(0) - places.amin(0) + 1).tolist()
    assert layers(streamed, 96)[-1].receptive_field == (height, width)


AXES: list[AxisMap] = [
    Window(50, 24, 5, 2, 1),
    Transposed(50, 101, 5, 2, 2),
    BorderPad(50, 3, -2, True),
    *(Resample(50, n, 50 / n, mode) for n in (20, 50, 75, 100) for mode in ("linear", "cubic", "nearest-exact")),
    Resample(50, 99, 49 / 98, "linear", align_corners=True),
    Resample(50, 1, 0.0, "linear", align_corners=True),
    *(Resample(50, n, 50 / n, mode, antialias=True) for n in (7, 20, 75) for mode in ("linear", "cubic")),
    *(AdaptiveWindow(50, n) for n in (10, 24, 33, 60)),
]


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_inside_the_axis_the_reach_is_what_the_axis_map_says(axis: AxisMap) -> None:
    reach = axis.receptive_field
    assert reach is not None
    for o in range(axis.n_out):
        first, last = -((-reach.num * o - reach.low) // reach.den), (reach.num * o + reach.high) // reach.den
        assert reach.start_after(first) <= o < reach.start_after(first + 1)
        assert reach.stop_before(last) <= o < reach.stop_before(last + 1)
        if 8 < o < axis.n_out - 8:
            # An AxisMap may read positions with a weight of zero.
            assert axis.first(o) <= first <= axis.first(o) + 1
            assert axis.stop(o + 1) - 1 <= last + 2 and last < axis.stop(o + 1)


def test_gaps_between_the_windows_of_a_transposed_convolution_count_as_part_of_them() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 1, 3), nn.Conv2d(4, 4, 3))
    _, up, last = layers(module, 32)
    assert (up.receptive_field, up.lost) == ((3, 3), Lost(3, 3, 1, 1))  # without a gap after the last row
    assert (last.receptive_field, last.lost) == ((4, 4), Lost(3, 3, 1, 1))


def test_all_is_lost_on_a_small_image() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 9, padding=4), nn.Conv2d(4, 4, 9, padding=4))
    assert [layer.lost for layer in layers(module, 5, 12)] == [Lost(4, 4, 4, 4), Lost(5, 8, 5, 8)]


class Gated(nn.Module):
    """A Squeeze-and-Excite between convolutions; without it, the same convolutions."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 3, padding=1)
        self.fc, self.gate = nn.Conv2d(4, 4, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        return self.c(x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid() if self.gate else x)


def test_operations_over_the_whole_image_change_nothing() -> None:
    plain, gated = (layers(Gated(gate), 96, 90, tile=16) for gate in (False, True))
    assert gated == plain
    assert [layer.module_path for layer in gated] == ["a", "b", "c"]


def test_what_runs_on_whole_maps_or_pools_to_a_grid_is_no_layer() -> None:
    grid = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(7))
    assert [layer.module_path for layer in layers(grid, 50)] == ["0"]
    whole = stream(nn.Sequential(nn.Conv2d(3, 4, 3), Fn(lambda x: x.cumsum(2))), 64)
    whole.module[1].conv = nn.Conv2d(4, 4, 1)
    assert [layer.module_path for layer in layers(whole, 50)] == ["0", "1.conv"]


class Positions(nn.Module):
    """A weight as large as the image is added to a map, and windows of it are read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3)
        self.grid = nn.Parameter(torch.rand(1, 4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x) + self.grid)


def test_weights_as_large_as_the_image_are_not_the_image() -> None:
    conv, last = layers(Positions(), 32, tile=8)
    assert (conv.receptive_field, conv.stride) == ((2, 2), (2, 2))
    assert (last.receptive_field, last.stride) == ((6, 6), (2, 2))


def test_the_geometry_does_not_depend_on_the_size_of_the_image() -> None:
    module = nn.Sequential(*(nn.Conv2d(3, 3, 3, 1 + k % 2, 1) for k in range(6)))
    small, large = layers(module, 512, tile=512), layers(module, 65536, tile=8192)
    for one, other in zip(small, large, strict=True):
        assert (one.receptive_field, one.stride, one.lost) == (other.receptive_field, other.stride, other.lost)


def test_the_table_is_aligned() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 10, 3))
    header, *lines = layer_table(layers(module, 100, 2000)).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in (header, *lines)}) == 1
    assert lines[1].split() == ["1", "upsample_bilinear2d", "1x4x196x3996", "4x4", "0.5x0.5", "2", *"1111"]
