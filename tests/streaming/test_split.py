"""`split` cuts a model into a streamable trunk and a head without changing what it computes or how its weights are named."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision.models as tv
from torch import nn

from tests.streaming.exactness import randomise, relative_error
from widefield.streaming import StreamingCNN, UnsupportedOpError, split

MODELS = {
    "resnet18": lambda: tv.resnet18(num_classes=3),
    "densenet121": lambda: tv.densenet121(num_classes=3),
    "vgg11": lambda: tv.vgg11(num_classes=3),
    "convnext_tiny": lambda: tv.convnext_tiny(num_classes=3),
    "mobilenet_v2": lambda: tv.mobilenet_v2(num_classes=3),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=3),
    "efficientnet, up to its first squeeze": lambda: timm.create_model("efficientnet_lite0", num_classes=3),
}


SLOW = ("densenet121", "efficientnet, up to its first squeeze", "mobilenet_v2", "convnext_tiny", "vgg11")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_split_cuts_without_changing_anything(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(MODELS[name]()).double().eval()
    trunk, head = split(model)
    keys = set(model.state_dict())
    assert set(trunk.state_dict()) | set(head.state_dict()) == keys
    assert not set(trunk.state_dict()) & set(head.state_dict())
    image = torch.randn(2, 3, 97, 101, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        assert relative_error(head(StreamingCNN(trunk, (40, 50))(image)), expected) < 1e-10
        trunk, head = pickle.loads(pickle.dumps(copy.deepcopy((trunk, head))))
        assert relative_error(head(trunk(image)), expected) < 1e-10


def test_a_local_network_has_no_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    trunk, head = split(model)
    assert trunk is model
    assert isinstance(head, nn.Identity)


def test_a_model_that_cannot_be_cut_says_so() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(7, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.cat([self.conv(x).mean((2, 3)), x.mean((2, 3))], 1))

    with pytest.raises(UnsupportedOpError, match="stream"):
        split(Both())


def test_a_network_with_stages_is_cut_at_its_last_pooling() -> None:
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    trunk, head = split(model)
    assert {name.split(".")[0] for name, _ in head.named_parameters()} == {"classifier"}
    image = torch.randn(1, 3, 65, 81)
    features = StreamingCNN(trunk, (32, None))(image)
    assert features.shape == (1, 256, 3, 3)
    assert torch.allclose(head(features), model(image), atol=1e-5)
