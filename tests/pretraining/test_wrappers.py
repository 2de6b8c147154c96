"""What a model must offer, and which are wrapped by themselves."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from tests.pretraining.tiny import TinyWrapper, assert_same
from widefield.components import ResNet
from widefield.pretraining import EmbeddingModel, ModelWrapper, wrap
from widefield.pretraining.dry_run import dry_run

NAMES = [
    "torchvision/resnet18",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mobilenet_v3_small",
    "torchvision/regnet_y_400mf",
    "torchvision/mnasnet0_5",
    "torchvision/densenet121",
    "torchvision/convnext_tiny",
    "timm/resnet10t",
    "timm/convnext_atto",
    "timm/vit_tiny_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "widefield/ResNet",
]


@pytest.mark.parametrize("name", NAMES)
def test_models_by_name_keep_the_contract(name: str) -> None:
    side = 224 if "swin" in name else 64
    wrapper = wrap(name, {"depth": 18} if name == "widefield/ResNet" else None)
    assert isinstance(wrapper, ModelWrapper)
    assert dry_run(EmbeddingModel(wrapper), 3, [(side, side)]) == wrapper.feature_dim()


def test_instances_are_wrapped_and_wrappers_taken_as_they_are() -> None:
    model = torchvision.models.resnet18()
    wrapper = wrap(model)
    assert wrapper.get_model() is model and wrapper.feature_dim() == 512
    x = torch.rand(2, 3, 64, 64)
    model.eval(), wrapper.eval()
    pooled = wrapper.forward_pool(wrapper.forward_features(x))["pooled_features"]
    torch.testing.assert_close(model.fc(pooled.flatten(1)), model(x))
    assert wrap(wrapper) is wrapper
    dense = torchvision.models.densenet121().eval()
    pooled = wrap(dense).forward_pool(wrap(dense).forward_features(x))["pooled_features"]
    torch.testing.assert_close(dense.classifier(pooled.flatten(1)), dense(x))
    net = timm.create_model("resnet10t")
    assert wrap(net).get_model() is net
    assert wrap(ResNet(depth=18)).feature_dim() == 512
    own = TinyWrapper()
    assert wrap(own) is own


def test_a_vision_transformer_gives_its_map_and_its_class_token() -> None:
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=0).eval()
    wrapper, x = wrap(model), torch.rand(1, 3, 64, 96)
    features = wrapper.forward_features(x)
    tokens = model.forward_features(x)
    assert features["features"].shape == (1, 192, 4, 6)
    torch.testing.assert_close(features["features"][0, :, 1, 2], tokens[0, 1 + 6 + 2])
    torch.testing.assert_close(wrapper.forward_pool(features)["pooled_features"].flatten(1), tokens[:, 0])


def test_timm_models_are_made_for_the_channels_of_the_images() -> None:
    assert dry_run(EmbeddingModel(wrap("timm/resnet10t", num_channels=5)), 5, [(64, 64)]) == 512


def test_models_of_torchvision_get_a_first_layer_for_other_channels() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = wrap("torchvision/shufflenet_v2_x0_5").get_model().conv1[0].weight
        torch.manual_seed(0)
        wrapper = wrap("torchvision/shufflenet_v2_x0_5", num_channels=4)
    torch.testing.assert_close(wrapper.get_model().conv1[0].weight, before[:, [0, 1, 2, 0]] * 0.75)
    assert dry_run(EmbeddingModel(wrapper), 4, [(64, 64)]) == 1024


def test_what_is_missing_is_named() -> None:
    class Half(nn.Module):
        def get_model(self) -> nn.Module:
            return self

        def forward_features(self, x: Tensor) -> dict[str, Any]:
            return {}

    with pytest.raises(ValueError, match=r"torch\.nn\.Module: True\n - missing methods: forward_pool, feature_dim$"):
        wrap(Half())
    for name in ("get_model", "forward_features", "forward_pool", "feature_dim"):
        without = type(
            "Without", (nn.Module,), {k: v for k, v in vars(TinyWrapper).items() if k not in (name, "__init__")}
        )
        with pytest.raises(ValueError, match=rf"missing methods: {name}$"):
            wrap(without())
    with pytest.raises(ValueError, match=r"torch\.nn\.Module: False"):
        wrap(object())
    with pytest.raises(ValueError, match="it is a class: give an instance"):
        wrap(TinyWrapper)
    with pytest.raises(ValueError, match="that is made already"):
        wrap(TinyWrapper(), {"dim": 3})
    with pytest.raises(ValueError, match=r"cannot be made with model_args=\{'widht': 3\}"):
        wrap("torchvision/resnet18", {"widht": 3})


class Changed(TinyWrapper):
    """A tiny wrapper of which one method is replaced."""

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        for name, method in methods.items():
            setattr(self, name, method)


def features(x: Tensor) -> Tensor:
    return TinyWrapper().forward_features(x)["features"]


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (Changed(feature_dim=lambda: 100), r"feature_dim\(\) returns 100, but \"features\" .* has 12 channels"),
        (Changed(feature_dim=lambda: "12"), r"feature_dim\(\) must return a positive integer, got '12'"),
        (Changed(get_model=lambda: None), r"get_model\(\) must return a torch\.nn\.Module, got NoneType"),
        (Changed(get_model=TinyWrapper), r"get_model\(\) returns a TinyWrapper, which is a wrapper itself"),
        (TinyWrapper().half(), r"weights of float16, .* give model\.float\(\)"),
        (TinyWrapper().bfloat16(), r"weights of bfloat16"),
        (TinyWrapper().double(), r"weights of float64, .* '64-true' in 64"),
        (
            Changed(forward_features=features),
            r"forward_features must return a dict with an entry \"features\", got Tensor",
        ),
        (
            Changed(forward_pool=lambda x: {"pooled_features": x["features"].mean((2, 3))}),
            r"\"pooled_features\" .*: got \(2, 12\); add \[:, :, None, None\]",
        ),
        (Changed(forward_pool=lambda x: {"pooled": 1}), r"got a dict with 'pooled'"),
        (
            Changed(forward_pool=lambda x: {"pooled_features": x["features"].detach().mean((2, 3), keepdim=True)}),
            r"has no gradient",
        ),
        (
            Changed(forward_features=lambda x: {"features": torch.ones(len(x), 12, 4, 4, requires_grad=True)}),
            r"no gradient of the output reaches a parameter",
        ),
        (TinyWrapper(in_channels=5), r"on views of shape \(2, 3, 32, 32\), and the first layer .* takes 5 channels"),
        (TinyWrapper().requires_grad_(False), r"no parameter of the model requires a gradient"),
    ],
)
def test_a_dry_run_finds_what_is_wrong(wrapper: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(EmbeddingModel(wrapper), 3, [(32, 32)])


def test_a_dry_run_changes_nothing() -> None:
    wrapper = TinyWrapper(dropout=0.5).train()
    before, state = copy.deepcopy(wrapper.state_dict()), torch.get_rng_state()
    dry_run(EmbeddingModel(wrapper), 3, [(32, 32), (16, 16)])
    assert_same(dict(wrapper.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in wrapper.modules())
    assert all(parameter.grad is None for parameter in wrapper.parameters())


def test_pooled_maps_may_be_larger_than_one_pixel_but_of_one_size() -> None:
    halves = Changed(forward_pool=lambda x: {"pooled_features": nn.functional.adaptive_avg_pool2d(x["features"], 2)})
    assert dry_run(EmbeddingModel(halves), 3, [(32, 32), (16, 16)]) == 12 * 4
    maps = Changed(forward_pool=lambda x: {"pooled_features": x["features"]})
    assert dry_run(EmbeddingModel(maps), 3, [(288, 320)]) == 12 * 72 * 80
    with pytest.raises(ValueError, match=r"768 of a view of 32 x 32, 192 of a view of 16 x 16"):
        dry_run(EmbeddingModel(maps), 3, [(32, 32), (16, 16)])


def test_embeddings_are_of_the_embedding_layer() -> None:
    x = torch.rand(2, 3, 32, 32)
    assert EmbeddingModel(TinyWrapper(), 64)(x).shape == (2, 64, 1, 1)
    assert EmbeddingModel(TinyWrapper())(x, pool=False).shape == (2, 12, 8, 8)
    assert EmbeddingModel(TinyWrapper(), 64).vectors(x).shape == (2, 64)
