"""Networks by name, as lightstream has them, and any of timm's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Trainer
from torch import nn
from torchvision.models import ResNet18_Weights, WeightsEnum

import widefield
from widefield.models import Classifier
from widefield.models.classifier import StreamingTimm
from widefield.models.convnext import StreamingConvNeXt, StreamingConvnext
from widefield.models.resnet import StreamingResNet
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import IMAGENET_MEAN, IMAGENET_STD
from widefield.streaming.tiles import Normalisation


def equals_plain(module: ImageNetClassifier, size: tuple[int, int] = (70, 90)) -> None:
    module = module.double().eval()
    module.stream_network.verify = False  # the comparison below is stricter
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


@pytest.mark.parametrize(
    ("kind", "remove_last_block"),
    [
        (StreamingResNet, False),
        pytest.param(StreamingConvNeXt, True, marks=pytest.mark.slow),
    ],
)
def test_without_loss_and_classes_it_is_the_trunk_alone(kind: Any, remove_last_block: bool) -> None:
    name = "resnet18_w8" if kind is StreamingResNet else "convnext_atto"
    options = {"weights": None, "remove_last_block": remove_last_block}
    module = kind(name, 64, additional_modules=nn.MaxPool2d(2), **options).eval()
    module.stream_network.verify = False  # the comparison below is stricter
    assert name in kind.get_model_names()
    image = torch.rand(1, 3, 128, 192) * 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    right = module.stream_network.module((image / 255 - mean) / std)
    assert right.shape[2:] == ((4, 6) if remove_last_block else (2, 3))
    torch.testing.assert_close(module(image), right, rtol=1e-4, atol=1e-5)
    assert kind(name, 64, normalize_on_gpu=False, **options).stream_network.normalisation == Normalisation()
    if kind is StreamingConvNeXt:
        with pytest.raises(ValueError, match="are for a trunk alone"):
            kind(name, 64, num_classes=2, additional_modules=nn.MaxPool2d(2), **options)


@pytest.mark.slow
def test_torchvision_convnext_has_a_head_of_its_own() -> None:
    module = StreamingConvNeXt("convnext_tiny", 64, num_classes=5, weights=None, use_stochastic_depth=True)
    assert isinstance(module.head, nn.Module)
    with torch.no_grad():
        assert module.head(torch.rand(1, 768, 2, 2)).shape == (1, 5)


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


@pytest.mark.parametrize(
    "build",
    [
        lambda: StreamingResNet(
            "resnet18_w8", 32, num_classes=3, weights=None, remove_last_block=True, train_streaming_layers=False
        ),
        lambda: StreamingConvNeXt(
            "convnext_atto", 32, num_classes=3, weights=None, mean=(0.1, 0.2, 0.3), std=(1, 2, 3)
        ),
        lambda: StreamingTimm("resnet10t", num_classes=3, weights=None, mean=None, std=None, lr=0.5),
    ],
    ids=["resnet", "convnext", "timm"],
)
def test_a_checkpoint_says_how_its_model_was_made(build: Callable[[], ImageNetClassifier], tmp_path: Path) -> None:
    module = build()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, memory_budget="1GiB")
    assert loaded.stream_network.normalisation == module.stream_network.normalisation
    assert (loaded.lr, loaded.train_streaming_layers) == (module.lr, module.train_streaming_layers)
    for (name, value), (other, right) in zip(loaded.state_dict().items(), module.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, right)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "IMAGENET1K_V3"}, "neither a file nor one of the published IMAGENET1K_V1"),
        ({"weights": True}, "neither a file nor one of"),
        ({"num_classes": 0}, "num_classes=0 must be a positive int"),
        ({"num_classes": "2"}, "num_classes='2' must be"),
    ],
)
def test_wrong_weights_and_classes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        StreamingResNet("resnet18", **{"weights": None, **arguments})


def test_weights_by_name_and_member(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: state)
    for weights in ("IMAGENET1K_V1", "DEFAULT", ResNet18_Weights.IMAGENET1K_V1):
        module = StreamingResNet("resnet18", num_classes=2, weights=weights)
        assert torch.equal(module.plain_state_dict()["conv1.weight"], state["conv1.weight"])
        assert module.head[-1].out_features == 2


def test_additional_modules_may_need_a_large_map() -> None:
    module = StreamingResNet("resnet18_w8", num_classes=2, weights=None, additional_modules=nn.Conv2d(64, 8, 5))
    assert module.head[-1].in_features == 8
