"""Cases that once gave wrong numbers, endless loops or unclear errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import assert_exact, randomise, relative_error
from widefield.streaming import StreamingCNN, UnsupportedOpError


class Net(nn.Module):
    def __init__(self, function: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function
        self.register_buffer("mask", torch.rand(8, 12) > 0.5)
        self.cube = nn.Parameter(torch.rand(4, 4, 4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.conv(x))


IMAGE = torch.rand(1, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
OUTSIDE = nn.Parameter(torch.rand(4, 1, 1, dtype=torch.float64))
IN_A_LIST = [nn.Conv2d(4, 4, 1).double()]

EXACT: dict[str, Callable[[Net, Tensor], Any]] = {
    "integer positions": lambda net, x: x * torch.arange(x.shape[2]).view(1, 1, -1, 1),
    "integer grid as a channel": lambda net, x: torch.cat([x, torch.arange(96).view(1, 1, 8, 12)], 1),
    "boolean mask of the image's size": lambda net, x: torch.where(net.mask, x, 2 * x).masked_fill(net.mask, 0.5),
    "type_as a weight": lambda net, x: x.type_as(net.conv.weight) * net.cube[:1, :1, :1].type_as(x),
    "one weight spread in two layouts": lambda net, x: (
        (x[:, :, :4, :4] + net.cube) + (x[:, :, :4, :4].permute(0, 2, 3, 1) + net.cube).permute(0, 3, 1, 2)
    ),
    "a detached output": lambda net, x: (x, x.detach()),
    "relu of a sum that is read elsewhere": lambda net, x: (x + 1).relu() * 2 + (x + 1),
}

REFUSED: dict[str, Callable[[Net, Tensor], Any]] = {
    "nearest to a size that rounds": lambda net, x: F.interpolate(x, (82, 94)),
    "a weight from outside": lambda net, x: x * OUTSIDE,
    "a layer in a list": lambda net, x: IN_A_LIST[0](x),
    "channel shuffle over height": lambda net, x: F.channel_shuffle((x * 2).permute(0, 2, 3, 1), 2),
    "bits as another dtype": lambda net, x: (x * 2).view(torch.int64) + 0,
    "broadcasting one row": lambda net, x: x[:, :, :1] + torch.rand(1, 1, 5, 1),
    "pixel unshuffle of a permuted map": lambda net, x: F.pixel_unshuffle(x.permute(0, 2, 3, 1), 2),
    "batch norm over height": lambda net, x: F.batch_norm(
        x.permute(0, 2, 3, 1), torch.zeros(8).double(), torch.ones(8).double()
    ),
    "median of everything": lambda net, x: x - x.median(),
    "attention of all positions to all": lambda net, x: (x.flatten(2).mT @ x.flatten(2)).softmax(-1),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    assert_exact(Net(EXACT[name]), IMAGE, [(3, 4), (2, None), (1, 1)])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(UnsupportedOpError):
        StreamingCNN(Net(REFUSED[name]).double(), (3, 4))(IMAGE)


def test_an_output_without_gradient_requires_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 3).requires_grad_(False), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    assert [out.requires_grad for out in StreamingCNN(Two().double(), 4)(IMAGE)] == [False, True]


@pytest.mark.parametrize("change", ["function", "dict", "tensor", "minus one"])
def test_changed_attributes_are_noticed(change: str) -> None:
    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.config = nn.Conv2d(3, 2, 3), torch.relu, {"scale": 2.0}
            self.factor, self.power = torch.tensor(3.0), -1

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.act(self.conv(x)) * self.config["scale"] * self.factor + (2.0 + x[:, :2, 1:-1, 1:-1]) ** self.power
            )

    module = Configured().double()
    streamed = StreamingCNN(module, 4)
    streamed(IMAGE)
    if change == "function":
        module.act = torch.sigmoid
    elif change == "dict":
        module.config["scale"] = 5.0
    elif change == "tensor":
        module.factor = torch.tensor(7.0)
    else:
        module.power = -2
    assert relative_error(streamed(IMAGE).detach(), module(IMAGE).detach()) < 1e-10


def test_a_lazy_layer_is_named() -> None:
    lazy = nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match=r"0\.weight"):
        StreamingCNN(nn.Sequential(lazy), 4)(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("channels", [8, 12, 16])
def test_a_strided_1x1_convolution_does_not_crash_in_float32(channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 1, 2))
    image = torch.rand(1, 3, 64, 64)
    for _ in range(5):
        StreamingCNN(net, (16, None))(image).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.cpu
def test_float_inside_of_forward_holds_under_autocast() -> None:
    net = Net(lambda net, x: (x.float() * 3.14159, x * 2)).float()
    image = IMAGE.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = net(image), StreamingCNN(net, (3, None))(image)
    assert [x.dtype for x in found] == [x.dtype for x in expected] == [torch.float32, torch.bfloat16]
    assert relative_error(found[0].detach(), expected[0].detach()) < 1e-6


def test_gradients_of_batch_norm_before_a_permutation_of_one_image() -> None:
    """Its gradient arrives with a first stride that PyTorch's batch norm mistakes for another memory format."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)[:, 4:]).reshape(len(x), 4, -1).mT

    assert_exact(randomise(Tokens()).eval(), torch.randn(1, 3, 6, 8), [(4, None), (3, 5)])


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
@pytest.mark.parametrize("factors", [(1.3, 1.0), (1.3, 2.0), (2.4, 1.4)])
def test_a_factor_that_changes_no_size_is_not_used_or_refused(mode: str, factors: tuple[float, float]) -> None:
    """PyTorch copies rows, or repeats them, where the sizes say so, whatever the factor."""

    class Resize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.conv(x), scale_factor=factors, mode=mode)

    torch.manual_seed(0)
    for size in ((2, 5), (2, 2), (3, 2)):
        if mode == "bicubic" and Resize()(torch.ones(1, 1, *size)).shape[2:] == size:
            with pytest.raises(UnsupportedOpError, match="a factor that changes no size"):
                StreamingCNN(Resize())(torch.ones(1, 1, *size))
            continue
        kept = [a == b for a, b in zip(size, Resize()(torch.ones(1, 1, *size)).shape[2:], strict=True)]
        other = mode == "nearest-exact" and kept[0] and size[0] > 2  # another row than the copy's
        if mode == "nearest" or other or (mode == "bilinear" and kept[0] != kept[1]):  # by memory format or device
            with pytest.raises(UnsupportedOpError, match="PyTorch's kernels"):
                StreamingCNN(Resize())(torch.ones(1, 1, *size))
        else:
            assert_exact(Resize(), torch.randn(1, 1, *size), [(1, None), (2, 2)])
