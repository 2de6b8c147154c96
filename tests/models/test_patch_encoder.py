"""Networks of timm, or modules, on the patches of an image."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import widefield as wf
from tests.streaming.exactness import TOLERANCE, assert_exact, relative_error
from tests.streaming.test_local import Attention
from widefield.errors import WidefieldError
from widefield.models.patch_encoder import PatchEncoder

NAME = "timm/vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"size": 32, "input_size": 32, "options": {"depth": 1}}
IMAGE = torch.rand(1, 3, 70, 100, generator=torch.Generator().manual_seed(0))


def test_patches_are_normalised_as_timm_says() -> None:
    encoder = PatchEncoder(NAME, **SMALL).eval()
    assert wf.PatchEncoder is PatchEncoder
    network: Any = encoder.module.network
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    expected = network((IMAGE[:, :, 32:64, 64:96] - mean) / std)
    assert encoder(IMAGE).shape == (1, 192, 2, 3) and encoder.spacing == 0.5
    assert torch.allclose(encoder(IMAGE)[0, :, 1, 2], expected[0], atol=1e-5)


def test_patches_of_another_size_are_resized() -> None:
    encoder = PatchEncoder(NAME, 40, 1.0, input_size=32, options={"depth": 1}).eval()
    patch = F.interpolate(IMAGE[:, :, :40, 40:80], (32, 32), mode="bicubic", antialias=True)
    assert torch.allclose(encoder(IMAGE)[0, :, 0, 1], encoder.module.network((patch - 0.5) / 0.5)[0], atol=1e-5)


@pytest.mark.parametrize("pooling", ["default", "token+avg"])
def test_it_streams_exactly_with_every_pooling(pooling: Any) -> None:
    torch.manual_seed(0)
    encoder = PatchEncoder(NAME, stride=24, pooling=pooling, **SMALL)
    net = nn.Sequential(encoder, nn.Conv2d(384 if "+" in pooling else 192, 2, 1))
    assert_exact(net, IMAGE, [(40, 64)])


def test_the_pooled_tokens_are_those_of_the_network() -> None:
    token, avg, both = (
        PatchEncoder(NAME, pooling=pooling, **SMALL).eval() for pooling in ("token", "avg", "token+avg")
    )
    avg.load_state_dict(token.state_dict())
    both.load_state_dict(token.state_dict())
    assert torch.equal(both(IMAGE), torch.cat([token(IMAGE), avg(IMAGE)], 1))
    tokens = token.module.network.forward_features((IMAGE[:, :, :32, :32] - 0.5) / 0.5)
    assert torch.allclose(avg(IMAGE)[0, :, 0, 0], tokens[0, 1:].mean(0), atol=1e-5)


def test_networks_of_convolutions_and_modules_are_encoders_too() -> None:
    assert PatchEncoder("timm/resnet10t", 64, input_size=64)(IMAGE).shape == (1, 512, 1, 1)
    module = nn.Sequential(nn.Conv2d(3, 5, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = PatchEncoder(module, 20, mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0], partial="pad", fill=1.0)
    expected = module(
        (IMAGE[:, :, :20, :20] - torch.tensor([0.1, 0.2, 0.3])[:, None, None])
        / torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    )
    assert encoder(IMAGE).shape == (1, 5, 4, 5) and torch.allclose(encoder(IMAGE)[0, :, 0, 0], expected[0], atol=1e-6)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_are_read_from_files(ending: str, tmp_path: Path) -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7)
    path = tmp_path / f"weights.{ending}"
    if ending == "pt":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    encoder = PatchEncoder(NAME, weights=path, **SMALL)
    assert torch.equal(encoder.module.network.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "vit_tiny_patch16_224"}, "must be timm/NAME"),
        ({"network": "timm/vit_tini"}, "there is no model"),
        ({"network": 3}, "must be the name of one or a module"),
        ({"network": nn.Flatten(), "weights": "DEFAULT"}, "load them into the module first"),
        ({"network": nn.Flatten(), "pooling": "token"}, "transformers of timm"),
        ({"network": NAME, "pooling": "max"}, "must be one of"),
        ({"network": NAME, "spacing": 0}, "micrometres per pixel"),
        ({"network": NAME, "options": {"depht": 1}}, "does not take options"),
        ({"network": nn.Flatten(), "std": [1.0, 0.0, 1.0]}, "must be positive"),
        ({"network": nn.Flatten(), "size": 0}, "window=0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((WidefieldError, ValueError), match=message):
        PatchEncoder(**arguments)


def test_adapters_of_peft_train_exactly() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    encoder = PatchEncoder(peft.get_peft_model(PatchEncoder(NAME, **SMALL).module.network, config), 32)
    net = nn.Sequential(encoder, Attention(192)).double()
    plain, image = copy.deepcopy(net), torch.randn(1, 3, 70, 100, dtype=torch.float64)
    plain(image).sum().backward()
    wf.stream(net, (32, 64))(image).sum().backward()
    trained = [name for name, p in net.named_parameters() if p.grad is not None]
    assert len([name for name in trained if "lora_" in name]) == 2 and not any("base_layer" in name for name in trained)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            assert relative_error(p.grad, q.grad) < TOLERANCE, name
