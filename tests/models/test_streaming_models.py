"""Networks by name, as lightstream has them, and any of timm's."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import widefield
from widefield.models import Classifier
from widefield.models.convnext import StreamingConvNeXt, StreamingConvnext
from widefield.models.resnet import StreamingResNet
from widefield.models.streaming_timm import StreamingTimm
from widefield.modules import ImageNetClassifier


def equals_plain(module: ImageNetClassifier, size: tuple[int, int] = (70, 90)) -> None:
    module = module.double().eval()
    image = torch.rand(1, 3, *size, dtype=torch.float64)
    used = module.stream_network.normalisation
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (used.mean, used.std))
    plain = nn.Sequential(copy.deepcopy(module.stream_network.module), copy.deepcopy(module.head))
    right, got = plain((image - mean) / std), module(image)
    torch.testing.assert_close(got, right)
    right.square().sum().backward()
    got.square().sum().backward()
    parts = (*module.stream_network.module.parameters(), *module.head.parameters())
    for value, other in zip(parts, plain.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad)


def test_resnet_without_its_last_block_and_with_more_behind_it() -> None:
    more = nn.Sequential(nn.Conv2d(64, 12, 3, padding=1), nn.ReLU())
    module = StreamingResNet(
        encoder="resnet18_w16",
        tile_size=32,
        num_classes=3,
        weights=None,
        additional_modules=more,
        remove_last_block=True,
    )
    assert module.head[-1].in_features == 12
    assert module.head[-1].out_features == 3
    equals_plain(module)


@pytest.mark.parametrize("names", [{}, {"model_name": "resnet18", "encoder": "resnet18"}])
def test_resnet_needs_one_name(names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="model_name or encoder"):
        StreamingResNet(**names, tile_size=32, weights=None)


def test_convnext() -> None:
    assert widefield.StreamingConvNeXt is StreamingConvNeXt is StreamingConvnext
    assert {"convnext_large", "convnext_atto"} <= set(StreamingConvNeXt.model_choices)
    equals_plain(StreamingConvNeXt("convnext_atto", 64, num_classes=2, weights=None), (96, 128))
    with pytest.raises(ValueError, match="convnext_tiny"):
        StreamingConvNeXt("convnext_tny", weights=None)


def test_torchvision_convnext_has_a_head_of_its_own() -> None:
    module = StreamingConvNeXt("convnext_tiny", 64, num_classes=5, weights=None, use_stochastic_depth=True)
    assert isinstance(module.head, nn.Module)
    with torch.no_grad():
        assert module.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 5)


def test_timm() -> None:
    module = widefield.StreamingTimm("timm/resnet10t", 32, num_classes=2, weights=None)
    assert isinstance(module, StreamingTimm)
    assert module.stream_network.normalisation.mean is not None
    equals_plain(module)
    with pytest.raises(ValueError, match="resnet10t"):
        StreamingTimm("resnet10tt", weights=None)


@pytest.mark.parametrize(
    ("streaming", "plain"),
    [
        (
            lambda: StreamingResNet("resnet50", num_classes=3, weights=None),
            lambda: torchvision.models.resnet50(num_classes=3),
        ),
        (
            lambda: StreamingConvNeXt("convnext_tiny", num_classes=3, weights=None),
            lambda: torchvision.models.convnext_tiny(num_classes=3),
        ),
        (
            lambda: Classifier("resnet18", "abc"),
            lambda: torchvision.models.resnet18(num_classes=3),
        ),
        (
            lambda: Classifier("timm/resnet18", "abc"),
            lambda: timm.create_model("resnet18", num_classes=3),
        ),
        (
            lambda: StreamingTimm("efficientnet_lite0", num_classes=3, weights=None),
            lambda: timm.create_model("efficientnet_lite0", num_classes=3),
        ),
    ],
    ids=["resnet50", "convnext_tiny", "classifier", "timm classifier", "timm"],
)
def test_weights_load_strictly_into_the_plain_model(
    streaming: Callable[[], ImageNetClassifier], plain: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.save(streaming().plain_state_dict(), tmp_path / "weights.pt")
    plain().load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
