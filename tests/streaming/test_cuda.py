"""What is special about CUDA devices. All other tests of the engine run there too: `pytest tests/streaming --device cuda`."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn

from tests.streaming.exactness import assert_exact, plain_reference, randomise, relative_error
from widefield.streaming import StreamingCNN, stream
from widefield.streaming.check import explain

pytestmark = pytest.mark.gpu

TILES = [(32, None), (40, 56)]
NETWORKS = {
    "trunk": lambda: nn.Sequential(*list(tv.resnet18().children())[:-2]),
    "resnet18": lambda: tv.resnet18(num_classes=3),
    "efficientnet_b0": lambda: tv.efficientnet_b0(num_classes=3),  # squeeze and excitation
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=3),
    "group norm": lambda: tv.resnet18(norm_layer=partial(nn.GroupNorm, 4), num_classes=3),
    "attention": lambda: timm.create_model("xcit_nano_12_p16_224", num_classes=3).patch_embed,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETWORKS[name]()).eval().cuda()


class Disk:
    """An image that is read region by region."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        return self.pixels[:, y : y + height, x : x + width]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_float64_is_exact_wherever_the_maps_live(name: str, place: str, tmp_path: Path) -> None:
    wrap = partial(StreamingCNN, maps=place, scratch_dir=tmp_path, unsupported="run_whole")
    assert_exact(network(name), torch.randn(2, 3, 97, 113, device="cuda"), TILES, wrap=wrap)


@pytest.mark.parametrize("place", ["device", "host"])
def test_an_image_in_host_memory_gets_its_gradient_there(place: str) -> None:
    module = network("efficientnet_b0").double()
    whole = torch.randn(1, 3, 97, 113, dtype=torch.float64, device="cpu", requires_grad=True)
    tiled = whole.detach().clone().requires_grad_()
    plain_reference(module)(whole.cuda()).sum().backward()
    found = stream(module, 40, verify=False)
    found.maps = place
    found(tiled).sum().backward()
    assert tiled.grad is not None
    assert tiled.grad.device.type == "cpu"
    assert relative_error(tiled.grad, whole.grad) < 1e-10


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
def test_defaults_pass_the_check_at_first_use(name: str, dtype: torch.dtype | None, monkeypatch: Any) -> None:
    monkeypatch.undo()  # the check runs
    module = network(name)
    image = torch.rand(1, 3, 256, 200)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        found = stream(module)(image)
        expected = module(image.cuda())
    assert found.device.type == "cuda"
    assert found.dtype == expected.dtype
    assert relative_error(found.detach(), expected.detach()) < (0.05 if dtype else 1e-3)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_modules_in_half_precision(dtype: torch.dtype) -> None:
    module = network("resnet18").to(dtype)
    image = torch.rand(1, 3, 256, 200, device="cuda", dtype=dtype)
    assert relative_error(stream(module, 64)(image).detach(), module(image).detach()) < 0.05


def test_an_image_on_disk_is_read_and_normalised_as_in_memory() -> None:
    module = network("resnet18").double()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 120, 101), dtype=np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    found = stream(module, 32, mean=mean, std=std)(Disk(pixels))
    means, stds = (torch.tensor(v, device="cuda", dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    expected = module(((torch.from_numpy(pixels).cuda().double() / 255 - means) / stds)[None])
    assert relative_error(found.detach(), expected.detach()) < 1e-10


def test_a_budget_holds() -> None:
    module = network("trunk").requires_grad_()
    image = torch.rand(1, 3, 1024, 1024, device="cuda")
    streamed = stream(module, memory_budget="300MiB")
    streamed(image[..., :200, :200]).mean().backward()  # workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    streamed(image).mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * 300 * 2**20


def test_dropout_is_that_of_the_seed_whatever_the_tile() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 4, 3, 2)).double().cuda()
    image = torch.rand(1, 3, 60, 70, device="cuda", dtype=torch.float64)

    def drawn(tile: int) -> Tensor:
        torch.manual_seed(3)
        return StreamingCNN(module, tile)(image).detach()

    assert relative_error(drawn(16), drawn(64)) < 1e-12


def test_streams_of_cuda_and_threads_do_not_mix() -> None:
    module = network("trunk").double()
    images = [torch.rand(1, 3, 160, 160, device="cuda", dtype=torch.float64) for _ in range(4)]
    expected = [module(image).detach() for image in images]
    streamed = StreamingCNN(module, 64)
    streamed.plan((1, 3, 160, 160))
    torch.cuda.synchronize()
    found: dict[int, Tensor] = {}

    def work(k: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            found[k] = streamed(images[k].cpu())
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative_error(found[k], expected[k]) < 1e-10 for k in range(4))


def test_an_image_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="move one of them"):
        StreamingCNN(nn.Conv2d(3, 4, 3, device="cpu"), 8)(torch.zeros(1, 3, 9, 9, device="cuda"))


class HoldsTensors(nn.Module):
    """Keeps a frozen layer in a list, makes a grid once, and asks for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(3, 4, 3), [nn.Conv2d(4, 4, 1).requires_grad_(False)]
        self.scale, self.grids = torch.tensor(3.0), {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden[0](self.conv(x)) * self.scale * (3 if x.is_cuda else 2)
        key = int(x.shape[2]), int(x.shape[3])
        if key not in self.grids:
            self.grids[key] = torch.linspace(0, 1, key[1], device=x.device, dtype=x.dtype).expand(key)
        return x * self.grids[key] + torch.ones(4, 1, 1, device="cuda").to(x)


@pytest.mark.parametrize("plain_first", [True, False])
def test_tensors_of_the_device_that_no_module_registers_are_found(plain_first: bool) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = HoldsTensors().double()
        module.hidden[0].double()
    image = torch.rand(1, 3, 30, 40, device="cuda", dtype=torch.float64)
    if plain_first:
        module(image)
    found = StreamingCNN(module, 8)(image)
    assert relative_error(found.detach(), module(image).detach()) < 1e-10
    assert "aten.conv2d" in explain(module, (3, 30, 40))
