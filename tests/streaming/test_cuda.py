"""The same exactness on a CUDA device; skipped where there is none."""

import pytest
import torch
import torchvision.models as tv
from torch import nn

from tests.streaming.exactness import plain_reference, randomise, relative_error
from widefield.streaming import StreamingCNN, stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tile", [(32, None), (40, 56)], ids=str)
def test_float64_is_exact_on_cuda(tile: tuple[int, int | None]) -> None:
    torch.manual_seed(0)
    module = randomise(nn.Sequential(*list(tv.resnet18().children())[:-2])).double().cuda()
    plain = plain_reference(module)
    x = torch.randn(2, 3, 97, 113, dtype=torch.float64, device="cuda")
    whole, tiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(whole).square().sum().backward()
    StreamingCNN(module, tile)(tiled).square().sum().backward()
    assert relative_error(tiled.grad, whole.grad) < 1e-10
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_an_image_in_host_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = randomise(tv.resnet18(num_classes=3)).cuda().eval()
    image = torch.rand(1, 3, 256, 200)
    with torch.autocast("cuda", dtype=dtype):
        found = stream(model, (64, None))(image)
        expected = model(image.cuda())
    assert found.device.type == "cuda"
    assert relative_error(found.detach(), expected.detach()) < 0.05
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_image_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="move one of them"):
        StreamingCNN(nn.Conv2d(3, 4, 3), 8)(torch.zeros(1, 3, 9, 9, device="cuda"))
