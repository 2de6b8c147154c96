"""ResNet, its variants, and the subclass that users write."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from widefield.components import ResNet, ResNet_CIFAR, build_conv_layer, build_norm_layer
from widefield.registry import MODELS


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("depth", [18, 50])
def test_it_computes_what_torchvision_computes_with_the_same_weights(depth: int) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(f"resnet{depth}").eval()
    weights = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    model = ResNet(depth, out_indices=(0, 3)).eval()
    model.load_state_dict(weights)
    image = torch.rand(1, 3, 41, 37)
    *_, last = model(image)
    features = nn.Sequential(*list(reference.children())[:-2])(image)
    torch.testing.assert_close(last, features)
    assert [tuple(one.shape) for one in model(torch.rand(1, 3, 64, 64))] == [
        (1, 64 * model.expansion, 16, 16),
        (1, 512 * model.expansion, 2, 2),
    ]


@pytest.mark.parametrize(("depth", "count"), [(18, 11_168_832), (34, 21_276_992), (50, 23_500_352)])
def test_the_one_for_small_images_has_as_many_weights_as_it_should(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = ResNet_CIFAR(depth, out_indices=(0, 1, 2, 3))
        shapes = [tuple(one.shape[1:]) for one in model(torch.rand(1, 3, 32, 32))]
    assert parameters(model) == count
    wide = 1 if depth < 50 else 4
    assert shapes == [(64 * wide, 32, 32), (128 * wide, 16, 16), (256 * wide, 8, 8), (512 * wide, 4, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"deep_stem": True},
        {"avg_down": True},
        {"style": "caffe"},
        {"num_stages": 2, "out_indices": (1,)},
        {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4)},
        {"base_channels": 8, "stem_channels": 16, "expansion": 2},
        {"norm_cfg": {"type": "GN", "num_groups": 2}},
        {"norm_cfg": {"type": "LN2d"}},
        {"conv_cfg": {"type": "Conv2d", "padding_mode": "reflect"}},
        {"drop_path_rate": 0.5},
        {"with_cp": True},
        {"in_channels": 1},
    ],
    ids=str,
)
def test_every_option_gives_a_network_that_trains(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ResNet(50, **{"stem_channels": 8, "base_channels": 4, **options})
    model.init_weights()
    (out,) = model(torch.rand(2, options.get("in_channels", 3), 33, 35))
    out.square().mean().backward()
    assert out.shape[1] == model.feat_dim
    grads = [parameter.grad for parameter in model.parameters()]
    assert sum(grad is not None and bool(grad.any()) for grad in grads) > 10


def test_recomputed_blocks_give_the_same_gradients() -> None:
    image = torch.rand(1, 3, 33, 35, dtype=torch.float64)
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = ResNet(18, base_channels=4, stem_channels=4, with_cp=with_cp, norm_cfg={"type": "GN", "num_groups": 2})
        model.double()(image)[0].square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_blocks_begin_as_the_identity_unless_told_otherwise() -> None:
    model = ResNet(18, base_channels=4, stem_channels=4)
    model.init_weights()
    assert all(not block.last_norm.weight.any() for layer in model.res_layers for block in getattr(model, layer))
    assert bool((model.bn1.weight == 1).all())
    model = ResNet(18, base_channels=4, stem_channels=4, zero_init_residual=False)
    model.init_weights()
    assert bool((model.layer1[0].bn2.weight == 1).all())


@pytest.mark.parametrize(("kind", "deep_stem"), [(ResNet, False), (ResNet, True), (ResNet_CIFAR, False)])
def test_frozen_stages_do_not_train_whatever_the_mode(kind: type[ResNet], deep_stem: bool) -> None:
    model = kind(18, base_channels=4, stem_channels=4, frozen_stages=1, deep_stem=deep_stem).train()
    frozen = [*([model.stem] if deep_stem else [model.conv1, model.bn1]), model.layer1]
    assert not any(part.training for top in frozen for part in top.modules())
    assert not any(parameter.requires_grad for top in frozen for parameter in top.parameters())
    assert model.layer2.training
    assert all(parameter.requires_grad for parameter in model.layer2.parameters())


def test_norm_eval_keeps_batch_norms_in_evaluation_mode_and_trains_their_weights() -> None:
    model = ResNet(18, base_channels=4, stem_channels=4, norm_eval=True).train()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)
    assert model.layer1.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 19}, "depth=19 is not one of 18, 34"),
        ({"depth": 18, "num_stages": 5}, "num_stages=5"),
        ({"depth": 18, "strides": (1, 2)}, "must have one for each of 4"),
        ({"depth": 18, "out_indices": (4,)}, r"out_indices=\(4,\) must be stages from 0 to 3"),
        ({"depth": 18, "out_indices": ()}, "out_indices"),
        ({"depth": 18, "style": "torch"}, "style='torch'"),
        ({"depth": 18, "frozen_stages": 5}, "frozen_stages=5"),
        ({"depth": 18, "drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"depth": 18, "norm_cfg": {"type": "BM"}}, r"no norm layer named 'BM'; there are BN, BN1d"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**arguments)


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_the_one_for_small_images_has_no_deep_stem(error: type[Exception]) -> None:
    with pytest.raises(error, match="do not support deep_stem"):
        ResNet_CIFAR(18, deep_stem=True)


class Users(ResNet):
    """The subclass of the page, with an argument of its own."""

    def __init__(self, depth: int, deep_stem: bool = False, **kwargs: Any) -> None:
        super().__init__(depth, deep_stem=deep_stem, **kwargs)
        assert not self.deep_stem

    def _make_stem_layer(self, in_channels: int, base_channels: int) -> None:
        self.conv1 = build_conv_layer(self.conv_cfg, in_channels, base_channels, kernel_size=3, padding=1, bias=False)
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, base_channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.relu(self.norm1(self.conv1(x)))
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            x = getattr(self, layer_name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def init_weights(self) -> None:
        super().init_weights()
        if self.init_cfg is not None and self.init_cfg["type"] == "Pretrained":
            return
        nn.init.constant_(self.conv1.weight, 0.5)


def test_the_subclass_of_the_page_works_and_equals_ours(tmp_path: Any) -> None:
    torch.manual_seed(0)
    options = {"depth": 18, "base_channels": 4, "stem_channels": 4, "out_indices": [1, 3]}
    users, ours = Users(**options), ResNet_CIFAR(**options)
    users.init_weights()
    assert bool((users.conv1.weight == 0.5).all())
    ours.load_state_dict(users.state_dict())
    image = torch.rand(2, 3, 32, 32)
    assert all(torch.equal(one, other) for one, other in zip(users(image), ours(image), strict=True))
    torch.save(ResNet_CIFAR(**options).state_dict(), tmp_path / "weights.pth")
    loaded = Users(**options, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")})
    loaded.init_weights()
    assert not bool((loaded.conv1.weight == 0.5).all())


@pytest.mark.parametrize(
    ("cfg", "name", "kind"),
    [
        ({"type": "BN"}, "bn1", nn.BatchNorm2d),
        ({"type": "SyncBN", "eps": 1e-3}, "bn1", nn.SyncBatchNorm),
        ({"type": "GN", "num_groups": 2}, "gn1", nn.GroupNorm),
        ({"type": "LN"}, "ln1", nn.LayerNorm),
        ({"type": "BN", "requires_grad": False}, "bn1", nn.BatchNorm2d),
    ],
)
def test_norm_layers_by_description(cfg: dict[str, Any], name: str, kind: type) -> None:
    before = dict(cfg)
    found, layer = build_norm_layer(cfg, 8, postfix=1)
    assert (found, type(layer), cfg) == (name, kind, before)
    assert layer.eps == cfg.get("eps", 1e-5)
    assert {parameter.requires_grad for parameter in layer.parameters()} == {cfg.get("requires_grad", True)}


def test_components_are_built_from_their_descriptions() -> None:
    model = MODELS.build([{"type": "ResNet_CIFAR", "depth": 18, "base_channels": 4}, {"type": "GlobalAveragePooling"}])
    assert model(torch.rand(2, 3, 32, 32))[0].shape == (2, 32)
