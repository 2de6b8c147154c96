"""Whole networks against plain PyTorch on the whole image, in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import assert_exact, randomise
from widefield.streaming import stream
from widefield.streaming.captured import CallKind

ODD = (97, 113)


def resnet_trunk(model: nn.Module) -> nn.Module:
    return nn.Sequential(*list(model.children())[:-2])


class UNet(nn.Module):
    """Two scales, transposed and bilinear upsampling, skip connections, a dict of maps as its result."""

    def __init__(self) -> None:
        super().__init__()
        self.down0, self.down1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.down2 = nn.Conv2d(12, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(12)
        self.up1 = nn.ConvTranspose2d(16, 12, 2, 2)
        self.up0 = nn.Conv2d(24, 8, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = F.relu(self.down0(x))
        b = F.relu(self.norm(self.down1(a)))
        c = F.gelu(self.down2(b))
        d = F.relu(self.up0(torch.cat([self.up1(c), b], 1)))
        e = torch.cat([F.interpolate(d, scale_factor=2, mode="bilinear"), a], 1)
        return {"logits": self.out(e), "deep": c, "pair": (b, d)}


class Dilated(nn.Module):
    """Parallel dilated branches of one convolution that is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=d, dilation=d) for d in (1, 2, 5))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        x = self.shared(self.shared(x).relu()) + self.shared(x)
        return [branch(x) for branch in self.branches]


SLOW = partial(pytest.param, marks=pytest.mark.slow)  # a minute each


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], int]] = {
    "resnet18": (lambda: resnet_trunk(tv.resnet18()), ODD, 2),
    "resnet50": (lambda: resnet_trunk(tv.resnet50()), (65, 70), 1),
    "convnext_tiny": (lambda: tv.convnext_tiny().features[:4], ODD, 1),
    "mobilenet_v2": (lambda: tv.mobilenet_v2().features, ODD, 2),
    "vgg11_bn": (lambda: tv.vgg11_bn().features, (49, 67), 1),
    "densenet121": (lambda: tv.densenet121().features[:8], (65, 70), 1),
    "hrnet": (lambda: timm.create_model("hrnet_w18_small", features_only=True), (96, 64), 1),
    "shufflenet": (lambda: nn.Sequential(*list(tv.shufflenet_v2_x0_5().children())[:-1]), ODD, 1),
    "unet": (UNet, (52, 44), 2),
    "dilated and reused": (Dilated, (41, 39), 2),
}


@pytest.mark.parametrize(
    "name", [SLOW(name) if name in ("hrnet", "mobilenet_v2", "shufflenet") else name for name in NETWORKS]
)
def test_networks_are_exact(name: str) -> None:
    build, size, batch = NETWORKS[name]
    torch.manual_seed(0)
    module = randomise(build()).train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
        if type(part).__name__ == "StochasticDepth":
            part.p = 0.0
    assert_exact(module, torch.randn(batch, 3, *size), [(32, None), (17, 29)] if name != "hrnet" else [(32, 40)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "densenet121", "vgg16_bn", "resnet101"])
def test_whole_trunks_are_exact(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(getattr(tv, name)()).eval()
    trunk = model.features if hasattr(model, "features") else resnet_trunk(model)
    assert_exact(trunk, torch.randn(1, 3, *ODD), [(32, None), (17, 29)])


@pytest.mark.parametrize("name", ["resnet18", SLOW("mobilenet_v2"), SLOW("vgg11"), SLOW("efficientnet_b0")])
def test_stream_runs_a_whole_classifier(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(getattr(tv, name)(num_classes=5)).eval()
    streamed = assert_exact(model, torch.randn(2, 3, 65, 71), [(24, None), (33, 40)], wrap=stream)
    fraction = streamed.plan((3, 65, 71)).streamed_fraction
    assert fraction > 0.99


@pytest.mark.parametrize(
    "name",
    ["regnety_002", *map(SLOW, ("efficientnet_b0", "convnextv2_atto", "test_resnet", "edgenext_xx_small"))],
)
def test_networks_with_stages(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=3)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))  # zero-initialised scales would hide errors
    streamed = assert_exact(model, torch.randn(2, 3, 97, 81), [(40, 50)], wrap=stream)
    plan = streamed.plan((3, 97, 81))
    assert not plan.refused
    assert plan.streamed_fraction > 0.95


def test_global_average_pooling_is_summed_tile_by_tile() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 3, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.conv(x).relu()
            return (
                self.fc(y.mean((-2, -1))),
                F.adaptive_avg_pool2d(y, 1),
                y.permute(0, 2, 3, 1).mean((1, 2), keepdim=True),
            )

    image = torch.randn(2, 3, 41, 35)
    streamed = assert_exact(Net(), image, [(9, None), (7, 11), (1, 1)], wrap=stream)
    program = streamed._program(CallKind(tuple(image.shape), torch.float64))
    (stage,) = program.stages
    assert not stage.outputs, "the map itself is never made"
    assert len(stage.reductions) == 3


@pytest.mark.parametrize("size", [(224, 224), (255, 261), (448, 224)])
def test_a_head_on_a_grid_of_cells_takes_sizes_that_the_grid_divides_and_others(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(3, 2)),
        *(nn.AdaptiveAvgPool2d((6, 6)), nn.Flatten(), nn.Linear(144, 3)),
    )
    assert_exact(network, torch.randn(1, 3, *size), [64])
