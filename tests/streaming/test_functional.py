"""Updates in place become operations with results, by us where it is simple and by PyTorch else, and always with its numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.streaming.exactness import relative_error
from widefield.streaming import StreamingCNN, UnsupportedOpError


def twice(x: Tensor) -> Tensor:
    y = x * 2
    z = y.mul_(3)
    y += x
    return y.relu_() + z


def shortcut(x: Tensor) -> Tensor:
    y = nn.functional.hardswish(x + 1, inplace=True)
    y.add_(x).clamp_(-0.5, 0.5)
    y = nn.functional.leaky_relu(y, 0.1, inplace=True)
    return torch.cat([y, x], 1)


def result(x: Tensor) -> Tensor:
    y = x * 2
    y.sigmoid_()
    return y


def view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0].add_(1)
    return y


def seen_by_a_view(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, :2]
    y.relu_()
    return first + y[:, 2:]


def seen_by_no_dropout(x: Tensor) -> Tensor:
    y = x * 2
    z = nn.functional.dropout(y, 0.5, training=False)
    y.tanh_()
    return nn.functional.dropout(y, 0.0, training=True) + z


def view_seen_by_no_dropout(x: Tensor) -> Tensor:
    y = x * 2
    z = nn.functional.dropout(y, 0.5, training=False)
    y[:, 0].add_(1)
    return z


def copied(x: Tensor) -> Tensor:
    y = x * 2
    y.copy_(x.mean((2, 3), keepdim=True))
    return y + x


def other_dtype(x: Tensor) -> Tensor:
    y = (x * 2).float()
    y.add_(x)
    return y


SIMPLE = (twice, shortcut, result, seen_by_no_dropout)
OTHERS = (view, seen_by_a_view, view_seen_by_no_dropout, copied, other_dtype)


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function = nn.Conv2d(3, 4, 3).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


@pytest.mark.parametrize("function", [*SIMPLE, *OTHERS])
def test_updates_in_place_are_exact(function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    traced_again: list[ExportedProgram] = []
    original = ExportedProgram.run_decompositions

    def noticed(program: ExportedProgram, table: dict[object, object]) -> ExportedProgram:
        traced_again.append(program)
        return original(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noticed)
    net, image = Net(function), torch.rand(1, 3, 17, 14, dtype=torch.float64)
    found, expected = [], []
    for call, kept in ((StreamingCNN(net, 6), found), (net, expected)):
        net.zero_grad()
        one = image.clone().requires_grad_()
        out = call(one)
        (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
        kept += [out.detach(), one.grad, net.conv.weight.grad.clone()]
    tolerance = 1e-12 if expected[0].dtype == torch.float64 else 1e-6
    assert all(relative_error(a, b) < tolerance for a, b in zip(found, expected, strict=True))
    assert bool(traced_again) == (function in OTHERS)


class Weight(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.mul_(2).sum()


class Statistics(nn.BatchNorm2d):
    """Updates its running statistics, whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, training=True)


@pytest.mark.parametrize(
    "layer", [Statistics(3), Weight(3, 4, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))]
)
def test_an_update_of_a_weight_or_of_the_image_is_refused(layer: nn.Module) -> None:
    with torch.no_grad(), pytest.raises(UnsupportedOpError, match="in-place update"):
        StreamingCNN(layer, 6)(torch.rand(1, 3, 17, 14))


def test_a_model_in_evaluation_mode_draws_no_random_numbers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU(inplace=True)).eval()
    before = torch.get_rng_state()
    StreamingCNN(net, 6)(torch.rand(1, 3, 17, 14, generator=torch.Generator()))
    assert torch.equal(before, torch.get_rng_state())
