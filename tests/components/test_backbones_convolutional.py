"""MobileNets, EfficientNets, ConvNeXts and networks of timm, against torchvision and timm."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.components import ConvNeXt, EfficientNet, MobileNetV2, MobileNetV3, TimmBackbone

TINY = {"depths": [1, 1, 2, 1], "channels": [4, 4, 6, 8]}


def scrambled(net: nn.Module) -> Any:
    """`net` in evaluation mode, none of its weights what they are at first."""
    for parameter in net.parameters():
        if parameter.ndim < 4:
            nn.init.normal_(parameter, std=0.1)
    return net.eval()


def shapes(outs: tuple[torch.Tensor, ...]) -> list[tuple[int, ...]]:
    return [tuple(out.shape[1:]) for out in outs]


def frozen(backbone: nn.Module) -> set[str]:
    """Parts, by the begin of their name, whose parameters do not train; all of them are in evaluation mode."""
    names = {".".join(name.split(".")[:2]) for name, p in backbone.named_parameters() if not p.requires_grad}
    for name, part in backbone.named_modules():
        if next(part.parameters(recurse=False), None) is not None:
            assert part.training == all(parameter.requires_grad for parameter in part.parameters(recurse=False)), name
    return names


@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (lambda **more: MobileNetV2(0.5, **more), lambda: torchvision.models.mobilenet_v2(width_mult=0.5)),
        (MobileNetV3, torchvision.models.mobilenet_v3_small),
        (lambda **more: MobileNetV3("large", **more), torchvision.models.mobilenet_v3_large),
        (
            lambda **more: EfficientNet(conv_cfg={"type": "Conv2d"}, norm_cfg={"type": "BN"}, **more),
            torchvision.models.efficientnet_b0,
        ),
        (lambda **more: EfficientNet("b5", conv_cfg={"type": "Conv2d"}, **more), torchvision.models.efficientnet_b5),
    ],
    ids=["MobileNetV2", "MobileNetV3 small", "MobileNetV3 large", "EfficientNet b0", "EfficientNet b5"],
)
def test_it_loads_and_computes_what_torchvision_computes(make: Any, reference: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = scrambled(reference())
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    backbone = make(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")}).eval()
    backbone.init_weights()
    image = torch.rand(1, 3, 65, 70)
    (out,) = backbone(image)
    assert torch.equal(out, net.features(image))


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_atto", "convnext_nano", "convnextv2_atto"])
def test_a_convnext_loads_the_weights_of_timm(name: str) -> None:
    net = scrambled(timm.create_model(name))
    arch = name.rpartition("_")[2]
    v2 = {"use_grn": True, "layer_scale_init_value": 0.0} if "v2" in name else {}
    backbone = ConvNeXt(arch, linear_pw_conv=name == "convnext_tiny", **v2).eval()
    result = backbone.load_state_dict(net.state_dict(), strict=False)
    assert (result.missing_keys, set(result.unexpected_keys)) == ([], {"head.fc.weight", "head.fc.bias"})
    image = torch.rand(1, 3, 65, 70)
    expected = net.forward_head(net.forward_features(image), pre_logits=True)
    torch.testing.assert_close(backbone(image)[0], expected)


def test_a_convnext_loads_the_weights_of_torchvision() -> None:
    net = scrambled(torchvision.models.convnext_tiny())
    backbone = ConvNeXt("tiny").eval()
    result = backbone.load_state_dict(net.state_dict(), strict=False)
    assert (result.missing_keys, set(result.unexpected_keys)) == ([], {"classifier.2.weight", "classifier.2.bias"})
    image = torch.rand(1, 3, 65, 70)
    torch.testing.assert_close(backbone(image)[0], net.classifier[:2](net.avgpool(net.features(image))))


def test_a_convnext_loads_its_own_weights_within_a_larger_model() -> None:
    first, second = (nn.Sequential(nn.Identity(), ConvNeXt(TINY, out_indices=(0, 3))) for _ in range(2))
    scrambled(first)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("arch", ["atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge", "huge"])
def test_convnexts_have_the_sizes_that_timm_gives_them(arch: str) -> None:
    with torch.device("meta"):
        name = f"convnextv2_{arch}" if arch == "huge" else f"convnext_{arch}"
        v2 = {"use_grn": True, "layer_scale_init_value": 0.0} if arch == "huge" else {}
        reference = timm.create_model(name, num_classes=0)
        backbone = ConvNeXt(arch, **v2)
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in reference.parameters())


def test_maps_are_those_of_the_stages_in_their_order() -> None:
    image = torch.rand(1, 3, 64, 96)
    assert shapes(MobileNetV2(0.25, out_indices=range(8)).eval()(image)) == [
        (8, 32, 48),
        (8, 16, 24),
        (8, 8, 12),
        (16, 4, 6),
        (24, 4, 6),
        (40, 2, 3),
        (80, 2, 3),
        (1280, 2, 3),
    ]
    v3 = MobileNetV3("small_050", out_indices=(12, 0, -2)).eval()
    assert shapes(v3(image)) == [(16, 32, 48), (48, 2, 3), (288, 2, 3)]
    assert shapes(MobileNetV3("small_075").eval()(image)) == [(432, 2, 3)]
    assert shapes(EfficientNet(out_indices=range(7)).eval()(image)) == [
        (32, 32, 48),
        (16, 32, 48),
        (24, 16, 24),
        (40, 8, 12),
        (112, 4, 6),
        (320, 2, 3),
        (1280, 2, 3),
    ]
    assert shapes(ConvNeXt(TINY, out_indices=range(4))(image)) == [(4,), (4,), (6,), (8,)]
    maps = ConvNeXt(TINY, out_indices=(-1, 0), gap_before_final_norm=False, in_channels=2, stem_patch_size=2)
    assert shapes(maps(image[:, :2])) == [(4, 32, 48), (8, 4, 6)]


def test_a_pooled_convnext_normalises_averages_and_an_unpooled_one_maps() -> None:
    image = torch.rand(2, 3, 64, 64)
    pooled, maps = ConvNeXt(TINY), ConvNeXt(TINY, gap_before_final_norm=False)
    maps.load_state_dict(pooled.state_dict())
    x = pooled.stages(pooled.stem(image))
    norm = pooled.norm3
    torch.testing.assert_close(
        pooled(image)[0], nn.functional.layer_norm(x.mean((2, 3)), (8,), norm.weight, norm.bias, 1e-6)
    )
    expected = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (8,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(maps(image)[0], expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: MobileNetV2(0.25, frozen_stages=-1), set()),
        (lambda: MobileNetV2(0.25, frozen_stages=0), {"features.0"}),
        (lambda: MobileNetV2(0.25, frozen_stages=2), {f"features.{k}" for k in range(4)}),
        (lambda: MobileNetV2(0.25, frozen_stages=7), {f"features.{k}" for k in range(18)}),
        (lambda: MobileNetV3("small_050"), set()),
        (lambda: MobileNetV3("small_050", frozen_stages=1), {"features.0", "features.1"}),
        (lambda: EfficientNet(), set()),
        (lambda: EfficientNet(frozen_stages=1), {"features.0"}),
        (lambda: EfficientNet(frozen_stages=5), {f"features.{k}" for k in range(6)}),
        (lambda: ConvNeXt(TINY), set()),
        (lambda: ConvNeXt(TINY, frozen_stages=2), {"stem.0", "stem.1", "stages.0", "stages.1"}),
        (lambda: TimmBackbone("resnet10t"), set()),
        (lambda: TimmBackbone("resnet10t", frozen_stages=0), {"model.conv1", "model.bn1"}),
        (lambda: TimmBackbone("resnet10t", frozen_stages=1), {"model.conv1", "model.bn1", "model.layer1"}),
    ],
)
def test_frozen_stages_do_not_train_whatever_the_mode(make: Any, expected: set[str]) -> None:
    backbone = make()
    assert frozen(backbone) == expected
    assert frozen(backbone.eval().train()) == expected


def test_a_frozen_transformer_of_timm_keeps_its_tokens_too() -> None:
    with torch.device("meta"):
        backbone = TimmBackbone("vit_tiny_patch16_224", frozen_stages=0)
    names = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert {
        "model.cls_token",
        "model.pos_embed",
        "model.patch_embed.proj.weight",
        "model.blocks.0.attn.qkv.bias",
    } < names
    assert not any(name.startswith("model.blocks.1.") for name in names)


@pytest.mark.parametrize(
    "make", [lambda: MobileNetV2(0.25, norm_eval=True), lambda: TimmBackbone("resnet10t", norm_eval=True)]
)
def test_norm_eval_keeps_batch_norms_in_evaluation_mode_and_trains_their_weights(make: Any) -> None:
    backbone = make().train()
    norms = [part for part in backbone.modules() if isinstance(part, _BatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)
    assert backbone.training


@pytest.mark.parametrize("make", [MobileNetV2, MobileNetV3, EfficientNet])
def test_norm_layers_are_those_of_the_description(make: Any) -> None:
    backbone = make(norm_cfg={"type": "GN", "num_groups": 2, "requires_grad": False})
    norms = [part for part in backbone.modules() if isinstance(part, (nn.GroupNorm, _BatchNorm))]
    assert {type(norm) for norm in norms} == {nn.GroupNorm}
    assert not any(parameter.requires_grad for norm in norms for parameter in norm.parameters())


def test_residual_branches_are_dropped_only_in_training() -> None:
    image = torch.rand(1, 3, 33, 33)
    tiny = ConvNeXt(TINY, drop_path_rate=0.9, layer_scale_init_value=1.0)
    for backbone in (tiny, EfficientNet(drop_path_rate=0.9, norm_eval=True)):
        torch.manual_seed(0)
        backbone.train()
        assert len({backbone(image)[0].sum().item() for _ in range(4)}) > 1
        backbone.eval()
        assert len({backbone(image)[0].sum().item() for _ in range(2)}) == 1


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "test_convnext"])
def test_a_network_of_timm_gives_its_maps_and_its_pooled_features(name: str) -> None:
    torch.manual_seed(0)
    net = scrambled(timm.create_model(name, num_classes=0))
    size = (1, 3, 224, 224) if "2" in name else (1, 3, 64, 64)
    image = torch.rand(size)
    maps = TimmBackbone(name, out_indices=(0, -1)).eval()
    maps.model.load_state_dict(net.state_dict())
    expected = net.forward_intermediates(image, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(maps(image), (expected[0], expected[-1]), strict=True))
    assert maps(image)[0].shape[1] == maps.model.feature_info[0]["num_chs"]
    pooled = TimmBackbone(name, global_pool=True).eval()
    pooled.model.load_state_dict(net.state_dict())
    assert torch.equal(pooled(image)[0], net(image))
    final = TimmBackbone(name).eval()
    final.model.load_state_dict(net.state_dict())
    assert torch.equal(final(image)[0], net.forward_features(image))


def test_a_network_of_timm_takes_a_checkpoint_channels_and_options(tmp_path: Any) -> None:
    net = scrambled(timm.create_model("test_convnext", in_chans=2))
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(
        "timm/test_convnext",
        checkpoint_path=str(tmp_path / "weights.pth"),
        in_channels=2,
        options={"drop_path_rate": 0.1},
    )
    image = torch.rand(1, 2, 64, 64)
    torch.testing.assert_close(backbone.eval()(image)[0], net.forward_features(image))
    torch.save({"stem.0.bias": torch.zeros(24)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth is not of test_convnext: it lacks stem.0.weight"):
        TimmBackbone("test_convnext", checkpoint_path=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MobileNetV2(0), "widen_factor=0 must be positive"),
        (lambda: MobileNetV2(out_indices=(8,)), r"out_indices=\(8,\) must be from 0 to 7"),
        (lambda: MobileNetV2(out_indices=()), r"out_indices=\(\)"),
        (lambda: MobileNetV2(frozen_stages=8), r"frozen_stages=8 must be from -1 \(nothing\) to 7"),
        (lambda: MobileNetV2(norm_cfg={"type": "BM"}), "no norm layer named 'BM'"),
        (lambda: MobileNetV3("smal"), "arch='smal' is unknown; did you mean small"),
        (lambda: MobileNetV3(out_indices=13), "out_indices=13 must be from 0 to 12"),
        (lambda: EfficientNet("b8"), "TimmBackbone has other EfficientNets, such as tf_efficientnet_b8"),
        (lambda: EfficientNet(drop_path_rate=1.0), "drop_path_rate=1.0 must be a probability below 1"),
        (lambda: EfficientNet(frozen_stages=-1), r"frozen_stages=-1 must be from 0 \(nothing\) to 7"),
        (lambda: ConvNeXt("tinny"), "arch='tinny' is unknown; did you mean tiny"),
        (lambda: ConvNeXt({"depths": [1]}), "must have depths and channels"),
        (lambda: ConvNeXt({"depths": [1], "channels": [4]}), "must have 4 positive depths"),
        (lambda: ConvNeXt(TINY, frozen_stages=5), "frozen_stages=5"),
        (lambda: TimmBackbone("resnet188"), "timm has no network named 'resnet188'; did you mean"),
        (lambda: TimmBackbone("resnet10t", options={"deep": 3}), r"resnet10t does not take options=\{'deep': 3\}"),
        (lambda: TimmBackbone("resnet10t", out_indices=5), "out_indices=5 must be from 0 to 4"),
        (lambda: TimmBackbone("resnet10t", out_indices=1, global_pool=True), "global_pool pools the final features"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_of_an_efficientnet_are_those_that_are_described() -> None:
    with torch.device("meta"):
        backbone = EfficientNet("b5", conv_cfg={"type": "Conv2dAdaptivePadding"}, norm_cfg={"type": "BN", "eps": 0.002})
    assert {part.eps for part in backbone.modules() if isinstance(part, _BatchNorm)} == {0.002}
    strided = [part for part in backbone.modules() if isinstance(part, nn.Conv2d) and part.stride == (2, 2)]
    assert {type(part).__name__ for part in strided} == {"Conv2dSame"}
    assert len(strided) == 5
