"""Checkpoints of MMPretrain: names, values, files and where they are.

`mmpretrain_checkpoints.json` has for each family the names and shapes of the weights of MMPretrain 1.2.0, and numbers of the output
that it computes, in float64, for `wave` as the image and `filled` weights. `bn` and `norm` stand for what these layers have.
"""

import json
import os
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from widefield.cli.trial import try_out
from widefield.components.checkpoints import ADDRESSES, locate, read_weights
from widefield.components.key_maps import MMPRETRAIN, mmpretrain_names
from widefield.config import Config, ConfigError
from widefield.inference import get_model
from widefield.inference.models import info_of
from widefield.models import load_weights, make_model
from widefield.registry import MODELS

CASES = json.loads(Path(__file__).with_name("mmpretrain_checkpoints.json").read_text())
LAYERS = {"norm": ("weight", "bias"), "bn": ("weight", "bias", "running_mean", "running_var")}


def wave(*shape: int, step: float = 1.3, phase: float = 0) -> Tensor:
    return torch.sin(torch.arange(np.prod(shape), dtype=torch.float64) * step + phase).reshape(shape)


def filled(name: str, *shape: int) -> Tensor:
    value = wave(*shape, step=0.7, phase=zlib.crc32(name.encode()) % 1000)
    if len(shape) > 1:
        return value * (2 * shape[0] / value.numel()) ** 0.5
    if name.endswith("running_var"):
        return 1 + 0.5 * value
    return 1 + 0.2 * value if name.endswith(("weight", "gamma", "gamma_1", "gamma_2")) else 0.1 * value


def theirs(family: str) -> dict[str, Tensor]:
    weights = {}
    for row in CASES[family]["weights"]:
        name, *shape = row.split()
        if shape[0] in LAYERS:
            weights |= {f"{name}.{part}": filled(f"{name}.{part}", int(shape[1])) for part in LAYERS[shape[0]]}
        else:
            weights[name] = filled(name, *map(int, shape))
    return weights


IMAGES = {
    "MobileNetV2": (41, 44),
    "MobileNetV3": (41, 44),
    "EfficientNet": (41, 44),
    "ConvNeXt": (64, 64),
    "ResNet": (64, 64),
}
INPUTS: dict[str, Any] = {
    "LinearNeck": lambda: [(wave(1, 8, 5, 5),)],
    "NonLinearNeck": lambda: [(wave(1, 8, 5, 5),)],
    "VisionTransformerClsHead": lambda: [(wave(1, 8),)],
    "MAEPretrainDecoder": lambda: [wave(1, 5, 24), torch.arange(15, -1, -1)[None]],
    "BEiTV2Neck": lambda: [(wave(1, 17, 24), wave(1, 17, 24, phase=1)), wave(4, 17, 17, phase=2)],
    "MAEViT": lambda: [wave(1, 3, 32, 32), None],
}


@pytest.mark.parametrize("family", CASES)
def test_weights_load_by_their_names_give_their_outputs_and_are_exported_by_their_names(family: str) -> None:
    part = MODELS.build(CASES[family]["model"]).double().eval()
    given = theirs(family)
    part.load_state_dict(given)

    kind = CASES[family]["model"]["type"]
    inputs = INPUTS[kind]() if kind in INPUTS else [wave(1, 3, *IMAGES.get(kind, (32, 32)))]
    with torch.no_grad():
        outs = part(*inputs)
    for out, expected in zip([outs] if isinstance(outs, Tensor) else outs, CASES[family]["outputs"], strict=True):
        assert list(out.shape) == expected["shape"]
        found = out.flatten()[:: max(1, out.numel() // 5)][:5]
        torch.testing.assert_close(found, torch.tensor(expected["values"], dtype=torch.float64), rtol=1e-7, atol=1e-8)

    exported = {key: value for key, value in mmpretrain_names(part).items() if not key.endswith("num_batches_tracked")}
    needed = {key for key in given if not key.endswith("relative_position_index")}
    assert exported.keys() == needed
    assert all(torch.equal(exported[key], given[key]) for key in needed)


def test_every_family_of_the_table_is_compared() -> None:
    compared = {case["model"]["type"] for case in CASES.values()}
    assert set(MMPRETRAIN) - compared == {"HOGGenerator", "MoCo", "TimmBackbone", "VQKD"}


RESNET = {"type": "ResNet", "depth": 18, "base_channels": 4, "stem_channels": 4}
HEAD = {"type": "LinearClsHead", "num_classes": 3, "in_channels": 32}
CLASSIFIER = {
    "type": "ImageClassifier",
    "backbone": RESNET,
    "neck": {"type": "GlobalAveragePooling"},
    "head": HEAD,
}
VIT = {"arch": {"embed_dims": 24, "num_layers": 2, "num_heads": 4, "feedforward_channels": 48}, "patch_size": 8}


def test_models_with_parts_inside_of_parts_have_their_names_too() -> None:
    neck = {
        "type": "NonLinearNeck",
        "in_channels": 32,
        "hid_channels": 4,
        "out_channels": 4,
        "norm_cfg": {"type": "BN1d"},
    }
    moco = {"queue_len": 8, "feat_dim": 4, "backbone": RESNET, "neck": neck, "head": {"type": "ContrastiveHead"}}
    moco["head"] |= {"loss": {"type": "CrossEntropyLoss"}}
    first, second = (MODELS.build({"type": "MoCo", **moco}) for _ in range(2))
    exported = mmpretrain_names(first)
    assert {
        "neck.fc1.weight",
        "encoder_k.module.0.conv1.weight",
        "encoder_k.module.1.bn0.running_var",
    } <= exported.keys()
    second.load_state_dict({**exported, "encoder_k.steps": torch.tensor(3)})
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )

    encoder = {"type": "BEiTViT", "img_size": 32, "out_type": "featmap", **VIT}
    vqkd = {"type": "VQKD", "encoder_config": encoder, "num_embed": 4, "embed_dims": 5}
    first = MODELS.build({**vqkd, "allow_random_weights": True})
    second = MODELS.build({**vqkd, "init_cfg": {"type": "Pretrained", "checkpoint": "vqkd.pth"}})
    second.load_state_dict(
        {**mmpretrain_names(first), "quantize.cluster_size": torch.ones(4), "quantize.embedding.initted": torch.ones(1)}
    )
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(first(image), second(image))


def test_a_class_of_ones_own_keeps_its_names() -> None:
    class NonLinearNeck(MODELS.get("LinearNeck")):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.fc0 = nn.Linear(2, 2)

    neck = NonLinearNeck()
    NonLinearNeck().load_state_dict(neck.state_dict())
    assert "fc0.weight" in mmpretrain_names(neck)


def test_weights_of_another_size_and_shared_biases_load_from_a_file(tmp_path: Path) -> None:
    small = MODELS.build({"type": "BEiTPretrainViT", "img_size": 32, "use_abs_pos_emb": True, **VIT})
    nn.init.normal_(small.rel_pos_bias.relative_position_bias_table)
    torch.save(
        {"state_dict": {f"backbone.{key}": value for key, value in mmpretrain_names(small).items()}}, tmp_path / "x.pth"
    )
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "x.pth"), "prefix": "backbone"}
    large = MODELS.build({"type": "BEiTViT", "img_size": 48, "use_abs_pos_emb": True, **VIT, "init_cfg": pretrained})
    large.init_weights()
    assert torch.equal(large.pos_embed, small.position_embedding((6, 6)))
    for layer in large.layers:
        assert torch.equal(
            layer.rel_pos_bias.relative_position_bias_table[-3:], small.rel_pos_bias.relative_position_bias_table[-3:]
        )


def test_weights_of_timm_load_into_a_vision_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timm/NAME` fetches them; a small network stands in for that."""
    torch.manual_seed(0)
    net = timm.models.VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2, init_values=0.5).eval()
    nn.init.normal_(net.norm.weight)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: {"vit_tiny_patch16_224": net}[name])
    pretrained = {"type": "Pretrained", "checkpoint": "timm/vit_tiny_patch16_224"}
    vit = MODELS.build(
        {"type": "VisionTransformer", "img_size": 32, "layer_scale_init_value": 1.0, **VIT, "init_cfg": pretrained}
    )
    vit.init_weights()
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(vit.eval()(image)[0], net.forward_features(image)[:, 0])


def test_an_efficientnet_that_pads_otherwise_refuses_weights_of_torchvision() -> None:
    weights = {"features.0.0.weight": torch.zeros(32, 3, 3, 3), "classifier.1.weight": torch.zeros(1000, 1280)}
    with pytest.raises(ValueError, match=r"pads and normalises otherwise.*give conv_cfg=\{type: Conv2d\}"):
        MODELS.build({"type": "EfficientNet"}).load_state_dict(weights, strict=False)


# --- files


class HistoryBuffer:
    def __init__(self) -> None:
        self.log = np.ones(3)
        self.methods = {"mean": type(self).mean}

    @staticmethod
    def mean() -> None:
        """One of several."""

    def __reduce__(self) -> Any:
        return HistoryBuffer, (), {"log": self.log, "best": np.float64(3), "mean": HistoryBuffer.mean}


def write(path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool = False, **more: Any) -> dict[str, Tensor]:
    """Write what their trainer writes, whose classes are not there when it is read."""
    weights = mmpretrain_names(MODELS.build(CLASSIFIER))
    module = types.ModuleType("mmengine_of_theirs")
    vars(module)["HistoryBuffer"] = HistoryBuffer
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(HistoryBuffer, "__module__", module.__name__)
        content = {"meta": {"epoch": 3}, "state_dict": weights, "message_hub": {"loss": HistoryBuffer()}, **more}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return weights


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_of_their_trainer_loads_without_its_classes(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write(tmp_path / "epoch_3.pth", monkeypatch, legacy)
    found = read_weights(tmp_path / "epoch_3.pth")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_can_execute_nothing(legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open({str(tmp_path / 'done')!r}, 'w')"
    write(tmp_path / "x.pth", monkeypatch, legacy, more=Call(eval, code))
    assert "head.fc.bias" in read_weights(tmp_path / "x.pth")
    write(tmp_path / "y.pth", monkeypatch, legacy, more=Call(os.system, f"touch {tmp_path / 'done'}"))
    with pytest.raises(ValueError, match=r"y\.pth cannot be read as .*whose module \w+ is blocked"):
        read_weights(tmp_path / "y.pth")
    assert not (tmp_path / "done").exists()


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    for content, message in (
        (nn.Linear(1, 1), "no state dict but a Linear"),
        ({"epoch": 3}, "no state dict but epoch"),
        ({}, "nothing"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / "x.pth")


def test_their_checkpoint_is_that_of_a_model_whose_configuration_is_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write(tmp_path / "epoch_3.pth", monkeypatch)
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).symlink_to(tmp_path / "epoch_3.pth")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml does not exist, and .*best\.ckpt does not say"):
        get_model(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({"model": CLASSIFIER}))
    model = get_model(tmp_path)
    assert torch.equal(model.head.fc.weight, weights["head.fc.weight"])


# --- where they are


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("torchvision://resnet50", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),
        ("modelzoo://resnet50", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),
        ("torchvision://resnet50.imagenet1k_v2", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"),
        ("torchvision://ResNet50_Weights.DEFAULT", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"),
        ("open-mmlab://resnet18_v1c", "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth"),
        ("openmmlab://resnet18_v1c", "https://download.openmmlab.com/pretrain/third_party/resnet18_v1c-b5776b93.pth"),
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
    ],
)
def test_a_name_stands_for_a_place(name: str, place: str) -> None:
    assert locate(name) == place


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision://resnet51", "torchvision has no network named 'resnet51'; did you mean .*resnet50"),
        ("torchvision://resnet50.v9", "no weights V9 of resnet50; there are DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2"),
        ("open-mmlab://resnet50_v1", "no address is known here .* did you mean .*resnet50_v1c"),
        ("s3://bucket/x.pth", "s3:// cannot be read; give the file itself"),
        ("timm/resnet51", "timm has no network named 'resnet51'"),
        ("gone.pth", r"gone\.pth does not exist"),
    ],
)
def test_an_unknown_place_is_refused(name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        locate(name)


def test_an_address_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write(tmp_path / "there.pth", monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(ADDRESSES["mmcls"], "tiny", (tmp_path / "there.pth").as_uri())
    assert read_weights("mmcls://tiny").keys() == weights.keys()
    (tmp_path / "there.pth").unlink()
    assert read_weights("mmcls://tiny").keys() == weights.keys()
    with pytest.raises(OSError, match=r"there\.pt cannot be fetched .* give the file, or put it at .*there\.pt"):
        read_weights((tmp_path / "there.pt").as_uri())


# --- the check of configurations


def pretrained(checkpoint: str, **more: Any) -> dict[str, Any]:
    return {"init_cfg": {"type": "Pretrained", "checkpoint": checkpoint, **more}}


NECK = {"in_channels": 1, "out_channels": 1}
FIT = "give weights of this architecture"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": "gone.pth"}, r"^model\.pretrained: gone\.pth does not exist"),
        ({"backbone": RESNET | pretrained("gone.pth")}, r"^model\.backbone\.init_cfg: gone\.pth does not exist"),
        ({"neck": [{"type": "LinearNeck", **NECK} | pretrained("gone.pth")]}, r"^model\.neck\.0\.init_cfg: gone\.pth does"),
        ({"backbone": RESNET | pretrained("x.pth")}, r"its names begin with 'backbone\.'; give prefix: backbone\."),
        ({"backbone": RESNET | pretrained("x.pth", prefix="bone")}, r"no key begins with 'bone\.'; .* backbone\., head\."),
        ({"backbone": RESNET | {"depth": 34}, "pretrained": "x.pth"}, rf"it lacks 80 of 180 weights, .*layer1\.2.*; {FIT}"),
        ({"backbone": RESNET | {"depth": 50}, "pretrained": "x.pth"}, rf"layer1\.0\.conv1\.weight has the shape .*; {FIT}"),
        ({"backbone": RESNET, "pretrained": "deep.pth"}, rf"it has more layers, backbone\.layer1\.2\.conv1\.weight.*; {FIT}"),
        ({"pretrained": "backbone.pth"}, "those of the backbone alone; give it as the init_cfg of the backbone"),
        ({"head": HEAD | pretrained("backbone.pth")}, r"it has conv1\.weight.*, and the LinearClsHead has fc\.weight, fc\.bias"),
        ({"backbone": RESNET | pretrained("torchvision://resnet19")}, "torchvision has no network named 'resnet19'"),
        ({"backbone": RESNET | pretrained("torchvision://resnet18")}, ""),
        ({"backbone": RESNET | pretrained("x.pth", prefix="backbone.")}, ""),
        ({"backbone": RESNET | {"num_stages": 3, "out_indices": [2]}, "pretrained": "x.pth"}, ""),
        ({"backbone": RESNET | {"in_channels": 1}, "head": HEAD | {"num_classes": 9}, "pretrained": "x.pth"}, ""),
    ],
)  # fmt: skip
def test_checkpoints_that_are_not_there_or_do_not_fit_are_found_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = write(tmp_path / "x.pth", monkeypatch)
    if changes.get("pretrained") == "deep.pth":
        torch.save(MODELS.build({**CLASSIFIER, "backbone": RESNET | {"depth": 34}}).state_dict(), "deep.pth")
    torch.save(
        {key.removeprefix("backbone."): value for key, value in weights.items() if "backbone" in key}, "backbone.pth"
    )
    config = Config({"model": {**CLASSIFIER, **changes}})
    try_out(config, starts=False)  # a run that goes on, and a model that is tested, do not look for them
    if message:
        with pytest.raises(ConfigError, match=message):
            try_out(config)
    else:
        try_out(config)


def test_weights_of_a_network_that_are_not_there_are_found_too() -> None:
    with pytest.raises(ConfigError, match=r"^model\.weights: gone\.pth does not exist"):
        try_out(Config({"model": {"model_name": "resnet18", "weights": "gone.pth"}}))
    try_out(Config({"model": {"model_name": "resnet18", "weights": "DEFAULT"}}))


# --- plain networks, and what stands beside weights


@pytest.mark.parametrize(
    ("backbone", "network", "head"),
    [
        ({"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8}, "resnet18_w8", "head.fc"),
        ({"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}}, "timm", "head.fc"),
        ({"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}}, "torchvision", "head.fc"),
        ({"type": "VisionTransformer", "img_size": 32, **VIT}, "vit", "head.layers.head"),
    ],
)
def test_a_plain_network_takes_backbone_and_head_of_a_model(
    backbone: dict[str, Any], network: str, head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "widefield")
    torch.manual_seed(0)
    nets: dict[str, Any] = {
        "resnet18_w8": lambda: make_model("resnet18_w8", 2, None),
        "timm": lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), conv_mlp=True, num_classes=2),
        "torchvision": lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(*row, 1) for row in ((4, 4), (4, 8), (8, 8), (8, None))], num_classes=2
        ),
        "vit": lambda: timm.models.VisionTransformer(
            32, 8, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2, num_classes=2
        ),
    }
    part, net = MODELS.build(backbone).eval(), nets[network]().eval()
    for parameter in part.parameters():
        nn.init.normal_(parameter, 0.2, 0.1)
    weights = {f"backbone.{key}": value for key, value in mmpretrain_names(part).items()}
    image = torch.rand(1, 3, 32, 32)
    features = part(image)[-1]
    features = features.mean((2, 3)) if features.ndim == 4 else features
    last = {f"{head}.weight": torch.randn(2, features.shape[1]), f"{head}.bias": torch.randn(2)}
    torch.save({"state_dict": {**weights, **last, "neck.fc.weight": torch.zeros(1)}}, tmp_path / "epoch_1.pth")
    load_weights(net, tmp_path / "epoch_1.pth")
    torch.testing.assert_close(net(image), nn.functional.linear(features, *last.values()))
    assert "epoch_1.pth is of a model with more than a backbone, which is left out: neck.fc" in caplog.text


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_efficientnet"])
def test_a_timm_backbone_loads_the_maps_alone_and_exports_them(name: str) -> None:
    theirs = timm.create_model(name, features_only=True).eval()
    ours = MODELS.build({"type": "TimmBackbone", "name": name, "features_only": True}).eval()
    given = {f"timm_model.{key}": value for key, value in theirs.state_dict().items()}
    assert not ours.load_state_dict(given, strict=False).unexpected_keys
    image = torch.rand(1, 3, 64, 64)
    for out, expected in zip(ours(image), theirs(image), strict=True):
        torch.testing.assert_close(out, expected if out.shape == expected.shape else expected.permute(0, 3, 1, 2))
    assert given.keys() <= mmpretrain_names(ours).keys()


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"dataset_meta": {"classes": ("cat", "dog", "owl")}}, ("cat", "dog", "owl")),
        ({"CLASSES": ["cat", "dog", "owl"]}, ("cat", "dog", "owl")),
        ({"dataset_meta": {"classes": ("cat", "dog")}}, None),  # of another head
        ({"dataset_meta": {}}, None),
    ],
)
def test_the_names_of_the_classes_stand_beside_the_weights(meta: Any, names: Any, tmp_path: Path) -> None:
    weights = mmpretrain_names(MODELS.build(CLASSIFIER))
    torch.save({"meta": meta, "state_dict": weights}, tmp_path / "epoch_1.pth")
    file = str(tmp_path / "epoch_1.pth")
    for model in (get_model(CLASSIFIER, pretrained=file), get_model({**CLASSIFIER, "pretrained": file})):
        assert info_of(model).class_names == names
