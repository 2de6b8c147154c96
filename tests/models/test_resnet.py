"""ResNets by name: split, narrow ones, and their streaming Lightning module."""

import pytest
import torch
import torchvision.models as tv
from torch import nn

from widefield.models import resnet
from widefield.models.resnet import StreamingResNet, split_resnet


@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet50", 2048), ("wide_resnet50_2", 2048)])
def test_split_resnet_makes_a_head_of_the_right_width(name: str, features: int) -> None:
    net = getattr(tv, name)()
    trunk, head = split_resnet(net, num_classes=3)
    assert head[-1].in_features == features and head[-1].out_features == 3
    net.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(head(trunk(image)), net(image), atol=1e-6)


def test_split_resnet_refuses_a_network_of_other_parts() -> None:
    with pytest.raises(
        ValueError, match=r"Sequential is not laid out like a ResNet: it has no conv1, .*widefield\.split"
    ):
        split_resnet(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_a_slip_in_an_argument_is_found_before_weights_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widefield.models.resnet.resnet.make_resnet", lambda *args: pytest.fail("downloaded"))
    with pytest.raises(TypeError, match="no argument 'los_fn'; did you mean loss_fn"):
        StreamingResNet("resnet18", 64, los_fn=nn.CrossEntropyLoss())


def test_split_resnet_without_classes_is_the_trunk_alone() -> None:
    net = tv.resnet18().eval()
    image = torch.rand(1, 3, 64, 64)
    assert split_resnet(net)(image).shape == (1, 512, 2, 2)
    assert (
        split_resnet(net, True)(image).shape == split_resnet(net, remove_last_block=True)(image).shape == (1, 256, 4, 4)
    )
    trunk, head = split_resnet(net, 5, remove_last_block=True)
    assert head(trunk(image)).shape == (1, 5)


def test_streaming_resnet_is_importable_from_both_places() -> None:
    assert resnet.resnet.StreamingResNet is StreamingResNet
    module = StreamingResNet("resnet18_w16", 32, nn.CrossEntropyLoss(), num_classes=2, weights=None)
    assert module(torch.rand(1, 3, 70, 66)).shape == (1, 2)
    assert next(iter(module.state_dict())) == "stream_network.module.0.weight"


def test_an_unknown_model_name_gives_near_names() -> None:
    with pytest.raises(ValueError, match="resnet18"):
        StreamingResNet("resnet81", 32, nn.CrossEntropyLoss(), weights=None)
