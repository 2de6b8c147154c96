"""One trace serves many image sizes, and never one that it was not proven for."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import TOLERANCE, relative_error
from widefield.streaming import StreamingCNN, UnsupportedOpError, program_cache, stream
from widefield.streaming.capture import trace_module
from widefield.streaming.captured import CallKind, Captured, Ref


class Fn(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def same_padding(x: Tensor) -> Tensor:
    """What is added depends on the size."""
    pads = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
    return F.max_pool2d(F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2]), 3, 2)


def updated_in_part(x: Tensor) -> Tensor:
    x = x * 2
    part = x[:, :3, :, :]
    part += x[:, 1:, :, :].sigmoid()
    return x


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "local": lambda x: F.max_pool2d(x.relu(), 3, 2, 1),
    "global mean": lambda x: x * x.mean((2, 3), keepdim=True),
    "views of the size": lambda x: x.view(x.shape[0], 2, 2, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).softmax(1).transpose(1, 2).reshape(x.shape),
    "resized to a half": lambda x: F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear"),
    "resized by a factor": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "resized back": lambda x: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode="nearest"),
    "cropped by its size": lambda x: x[:, :, x.shape[2] // 4 :, : x.shape[3] - 3],
    "divided by its size": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "padded by its size": same_padding,
    "a grid of positions": lambda x: x + torch.arange(x.shape[3]) / x.shape[3],
    "updated in part": updated_in_part,
    "adaptive pooling": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
}
SIZES = ((33, 47), (34, 46), (64, 64), (40, 31), (97, 128))


def renamed(captured: Captured) -> tuple[object, ...]:
    """A capture with names that count."""
    names = {node.name: f"v{k}" for k, node in enumerate(captured.nodes)}

    def rename(value: object) -> object:
        if isinstance(value, Ref):
            return Ref(names.get(value.name, value.name))
        if isinstance(value, (list, tuple)):
            return [rename(item) for item in value]
        return value

    nodes = [
        (
            names[node.name],
            node.op,
            node.shape,
            node.dtype,
            node.pick,
            rename(node.args) if node.op != "aten.slice" else (),
        )
        for node in captured.nodes
    ]  # of a slice to the end, the end is written in two ways
    return captured.image_shape, nodes, rename(captured.outputs)


@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if name != "updated in part"]
)  # more slices, which do nothing
def test_a_derived_trace_is_that_of_the_size(name: str) -> None:
    module = Fn(FUNCTIONS[name])
    trace = trace_module(module, CallKind((1, 3, *SIZES[0]), torch.float32))
    assert not trace.fixed
    derived = 0
    for size in SIZES:
        own = trace_module(module, CallKind((1, 3, *size), torch.float32), symbolic=False).at(*size)
        assert own is not None
        if (found := trace.at(*size)) is not None:
            assert renamed(found) == renamed(own)
            derived += 1
    assert derived >= 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_sizes_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, traced = Fn(FUNCTIONS[name]).double(), []

    def counted(*args: object, **kwargs: object) -> object:
        traced.append(args[1])
        return trace_module(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(program_cache, "trace_module", counted)
    streamed = stream(module, 11)
    for size in SIZES:
        image = torch.rand(1, 3, *size, dtype=torch.float64)
        assert relative_error(streamed(image).detach(), module(image).detach()) < TOLERANCE
    assert len(traced) < len(SIZES)


def test_same_padding_of_many_layers_is_one_trace_for_sizes_of_one_remainder() -> None:
    module = Fn(lambda x: same_padding(same_padding(same_padding(same_padding(x))))).double()
    trace = trace_module(module, CallKind((1, 3, 101, 87), torch.float64))
    held = [size for size in range(64, 160) if trace.at(size, 87) is not None]
    assert {size % 32 for size in held} == {101 % 32, 102 % 32}  # the convolution before makes 51 of both
    streamed = stream(module, 40)
    for height in held:
        image = torch.rand(1, 3, height, 87, dtype=torch.float64)
        assert relative_error(streamed(image).detach(), module(image).detach()) < TOLERANCE


def test_a_decision_on_the_size_is_taken_again() -> None:
    module = Fn(lambda x: x.tanh() if x.shape[2] > 20 else x.relu()).double()
    streamed = StreamingCNN(module, 9)
    for height in (60, 30, 70, 41, 38, 39):
        image = torch.randn(1, 3, height, 30, dtype=torch.float64)
        assert torch.allclose(streamed(image), module(image), rtol=1e-12)


def test_a_size_that_is_written_into_the_model_is_not_reused() -> None:
    module = Fn(lambda x: x * torch.tensor(float(x.shape[2])) + torch.full((1,), int(math.sqrt(x.shape[3])))).double()
    streamed = StreamingCNN(module, 9)
    for size in ((30, 30), (30, 32), (50, 30), (31, 31)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        assert torch.allclose(streamed(image), module(image), rtol=1e-12)


@pytest.mark.parametrize("divisor", [4, 10])
def test_sizes_that_must_divide(divisor: int) -> None:
    def blocks(x: Tensor) -> Tensor:
        assert x.shape[2] % divisor == 0
        return x

    module = Fn(blocks).double()
    streamed = StreamingCNN(module, 16)
    for height in (40, 80, 120):
        image = torch.randn(1, 3, height, 33, dtype=torch.float64)
        assert torch.allclose(streamed(image), module(image), rtol=1e-12)
    with pytest.raises(ValueError, match="cannot run"):
        streamed(torch.randn(1, 3, 42, 33, dtype=torch.float64))


def test_square_images_only() -> None:
    module = Fn(lambda x: x + x.mT).double()
    streamed = stream(module)
    for size in (33, 64, 47):
        image = torch.randn(1, 3, size, size, dtype=torch.float64)
        assert torch.allclose(streamed(image), module(image), rtol=1e-12)
    with pytest.raises(ValueError, match="cannot run"):
        streamed(torch.randn(1, 3, 33, 35, dtype=torch.float64))


def test_an_image_of_one_row() -> None:
    module = Fn(lambda x: x.relu()).double()
    streamed = StreamingCNN(module, 8)
    for size in ((1, 33), (40, 33), (1, 40), (40, 1), (2, 2)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        assert torch.allclose(streamed(image), module(image), rtol=1e-12)


def test_a_module_that_needs_long_with_symbols_is_traced_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widefield.streaming.capture._SYMBOLIC_LIMIT", 0.0)
    assert trace_module(Fn(lambda x: x.relu()), CallKind((1, 3, 33, 47), torch.float32)).fixed


def test_a_condition_that_cannot_be_computed_does_not_hold() -> None:
    """The second one divides by 0 where the first one does not hold."""

    def pick(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return x.tanh() if width != 48 and height // (width - 48) == -3 else x.relu()

    module = Fn(pick).double()
    streamed = stream(module, 11)
    for size in ((64, 64), (33, 48), (30, 38)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        assert relative_error(streamed(image).detach(), module(image).detach()) < TOLERANCE


def test_a_size_that_depends_on_values_is_refused() -> None:
    module = Fn(lambda x: x + torch.nonzero(torch.ones(x.shape[3])).shape[0])
    with pytest.raises(UnsupportedOpError, match="whose size depends on the values of another"):
        stream(module)(torch.rand(1, 3, 9, 9))
