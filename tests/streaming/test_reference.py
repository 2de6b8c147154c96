"""The reference scan, plain PyTorch and the engine agree."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.streaming import reference
from tests.streaming.exactness import relative_error
from tests.streaming.reference import Layer
from widefield.streaming import StreamingCNN


class Net(nn.Module):
    """Three convolutions, a nonlinearity and a pooling; `layers` for the scan, which pads rows itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 5, 3).double(), nn.Conv2d(5, 4, 3).double(), nn.Conv2d(4, 3, 5).double()

    def layers(self) -> list[Layer]:
        def convolution(conv: nn.Conv2d, padding: int, stride: int) -> Layer:
            run = lambda x: F.conv2d(x, conv.weight, conv.bias, stride, (0, padding))  # noqa: E731
            return Layer(run, conv.kernel_size[0], stride, padding)

        pool = Layer(lambda x: F.avg_pool2d(x, 2), 2, 2)
        return [
            convolution(self.a, 1, 2),
            Layer(torch.tanh),
            pool,
            convolution(self.b, 0, 1),
            convolution(self.c, 2, 1),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.a.weight, self.a.bias, 2, 1).tanh()
        return F.conv2d(self.b(F.avg_pool2d(x, 2)), self.c.weight, self.c.bias, padding=2)


@pytest.mark.parametrize("height", [41, 44])
@pytest.mark.parametrize("strip", [1, 5, 16, 100])
def test_the_reference_scan_is_exact_and_so_is_the_engine(height: int, strip: int) -> None:
    net, image = Net(), torch.rand(2, 3, height, 23, dtype=torch.float64)
    output = net(image.requires_grad_())
    grad = torch.rand_like(output)
    expected = torch.autograd.grad(output, (image, *net.parameters()), grad)

    layers = net.layers()
    found, heights, began = reference.forward(layers, image, strip)
    of_image = reference.backward(layers, image, strip, heights, began, grad)
    by_scan = (found, of_image, *(p.grad for p in net.parameters()))

    streamed = StreamingCNN(net, (strip, None))(image)
    by_engine = (streamed.detach(), *torch.autograd.grad(streamed, (image, *net.parameters()), grad))

    for ours in (by_scan, by_engine):
        for tensor, reference_tensor in zip(ours, (output.detach(), *expected), strict=True):
            assert tensor is not None
            assert relative_error(tensor, reference_tensor) < 1e-12


def test_the_reference_scan_holds_a_few_rows() -> None:
    net = Net()
    _, _, began = reference.forward(net.layers(), torch.rand(1, 3, 400, 23, dtype=torch.float64), 8)
    assert max(carry.rows.shape[2] for carries in began for carry in carries if carry.rows is not None) <= 5


def test_the_pictures_in_the_docs_are_what_the_reference_scan_does() -> None:
    script = Path(__file__).parents[2] / "docs" / "pictures" / "scan.py"
    drawn = runpy.run_path(str(script))
    assert script.with_suffix(".svg").read_text() == drawn["still"]()
    assert script.with_name("scan-animated.svg").read_text() == drawn["animated"]()
