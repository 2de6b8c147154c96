"""`widefield list`, `help` and `config`."""

import subprocess
import sys
from pathlib import Path

import pytest

from widefield.cli import main
from widefield.config import load
from widefield.inference.names import NARROW_RESNETS, model_names
from widefield.registry import MODELS

MY_MODELS = """\
import torch.nn as nn
from widefield.components import ResNet, build_conv_layer, build_norm_layer
from widefield.registry import MODELS

@MODELS.register_module()
class ResNet_CIFAR(ResNet):
    '''ResNet backbone for CIFAR.

    Args:
        depth(int): Network depth.
        gate (float): How far it is open.
    '''
    def __init__(self, depth, deep_stem=False, gate: float = 1.0, **kwargs):
        super().__init__(depth, deep_stem=deep_stem, **kwargs)
        if gate > 1:
            raise ValueError(f"gate={gate} is wide open")

@MODELS.register_module(kind="model")
class MyClassifier(nn.Module):
    def __init__(self, backbone, neck=None, head: dict = None):
        super().__init__()
        self.backbone, self.neck, self.head = (part and MODELS.build(part) for part in (backbone, neck, head))
"""
MY_CONFIG = """\
imports: my_models.py
model:
  type: MyClassifier
  backbone:
    type: ResNet_CIFAR
    depth: 18
    base_channels: 4
    stem_channels: 4
  neck: {type: GlobalAveragePooling}
  head:
    type: LinearClsHead
    num_classes: 10
    in_channels: 32
    loss: {type: CrossEntropyLoss, loss_weight: 1.0}
    topk: [1, 5]
data:
  images: nowhere
  labels: nowhere.csv
trainer:
  max_epochs: 2
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from widefield.registry import MODELS

    monkeypatch.setattr(MODELS, "_registered", dict(MODELS._registered))  # forgets the user's components
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    (tmp_path / "my.yaml").write_text(MY_CONFIG)
    return tmp_path / "my.yaml"


def test_lists_and_help_import_no_torch() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from widefield.cli import main\n"
        "for line in (['--help'], ['list', 'components'], ['list', 'models', 'vit*'], ['list', 'configs'],\n"
        "             ['list', 'datasets'], ['list', 'transforms'], ['list', 'metrics'], ['help', 'list'],\n"
        "             ['help', 'dinov3'], ['help', 'ResNet'], ['help', 'Accuracy']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(line)\n"
        "print({'torch', 'timm', 'lightning', 'numpy', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_components_are_listed_with_kind_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "components"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} >= set(MODELS.index)
    assert main(["list", "components", "res*", "--kind", "backbone"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "backbone"] for name in ("ResNet", "ResNet_CIFAR", "ResNetV1c", "ResNetV1d")
    ]
    assert main(["list", "datasets", "cifar"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["CIFAR10", "dataset"],
        ["CIFAR100", "dataset"],
    ]
    assert main(["list", "components", "nothing"]) == 0
    assert "no components match" in capsys.readouterr().err


def test_models_are_listed_as_their_libraries_list_them(capsys: pytest.CaptureFixture[str]) -> None:
    import timm
    import torchvision

    from widefield.models.networks import NARROW_RESNETS as MADE

    assert tuple(MADE) == NARROW_RESNETS
    expected = {f"timm/{name}" for name in timm.list_models()}
    expected |= {f"torchvision/{name}" for name in torchvision.models.list_models()}
    assert set(model_names()) - set(NARROW_RESNETS) == expected
    assert main(["list", "models", "resnet18"]) == 0
    shown = set(capsys.readouterr().out.split())
    assert {"resnet18_w8", "timm/resnet18", "torchvision/resnet18"} <= shown
    assert main(["list", "models", "resnet18"]) == 0


def test_help_shows_arguments_with_types_defaults_and_docs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "ResNet_CIFAR", "--imports", "my_models.py"]) == 0
    shown = capsys.readouterr().out
    assert "ResNet_CIFAR, a backbone: my_models.ResNet_CIFAR\n\nResNet backbone for CIFAR." in shown
    assert "  depth: anything (required)\n      Network depth.\n" in shown
    assert "  gate: a number (default 1.0)\n      How far it is open.\n" in shown
    assert "  norm_cfg: {type: a norm layer, ...} (default {type: BN, requires_grad: true})\n" in shown
    assert "  style: one of 'pytorch', 'caffe' (default pytorch)\n" in shown
    assert main(["help", "torch.nn.Linear"]) == 0
    assert "in_features: int (required)" in capsys.readouterr().out
    for name, shown in (
        ("CIFAR10", "CIFAR10, a dataset: widefield.data.cifar.CIFAR10"),
        ("RandomCrop", "RandomCrop, a transform: "),
        ("AveragePrecision", "average: 'macro' or null (default macro)"),
    ):
        assert main(["help", name]) == 0
        assert shown in capsys.readouterr().out
    for slip, meant in (("ResNett", "ResNet"), ("simlcr", "SimCLR or simclr?"), ("pretrian", "pretrain")):
        assert main(["help", slip]) == 2
        assert f"did you mean {meant}" in capsys.readouterr().err


def test_a_configuration_with_a_users_component_is_printed_and_checked(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", str(file), "model.backbone.depth=34", "trainer.max_epochs=3"]) == 0
    assert "my.yaml: nothing wrong" in capsys.readouterr().out
    assert main(["config", "print", str(file), "model.backbone.frozen_stages=1", "--trainer.max_epochs=3"]) == 0
    shown = capsys.readouterr().out
    (file.parent / "again.yaml").write_text(shown)
    again, once = load("again.yaml").data, load(file).data
    assert again["model"]["backbone"].pop("frozen_stages") == 1
    assert again["trainer"].pop("max_epochs") == 3
    assert once["trainer"].pop("max_epochs") == 2
    assert again == once
    assert again["imports"] == [str(file.parent / "my_models.py")]


def test_what_is_printed_builds_the_same_model(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from widefield.config import build

    main(["config", "print", str(file), "model.backbone.strides=(1,2,1,1)"])
    (file.parent / "again.py").write_text("_base_ = 'again.yaml'")
    (file.parent / "again.yaml").write_text(capsys.readouterr().out)
    models = []
    for name in ("again.yaml", "again.py"):
        torch.manual_seed(0)
        models.append(build(load(name), ("model",)))
    assert str(models[0]) == str(models[1])
    assert models[0].backbone.layer3[0].conv1.stride == (1, 1)
    weights = [model.state_dict() for model in models]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone.dept=34", "model.backbone.dept: there is no 'dept'; did you mean depth?"),
        ("model.backbone.type=ResNet_CIFA", "model.backbone: no component named 'ResNet_CIFA'"),
        ("model.backbone.gate=2", "model.backbone: gate=2 is wide open"),
        ("model.backbone.depth=19", "model.backbone: depth=19 is not one of 18, 34, 50, 101, 152"),
        ("model.backbone.norm_cfg.type=BM", "model.backbone.norm_cfg: no norm layer named 'BM'; there are BN"),
        (
            "model.backbone.norm_cfg.epsilon=1",
            "model.backbone.norm_cfg.epsilon: there is no 'epsilon'; did you mean eps",
        ),
        ("model.backbone.norm_cfg.eps=x", "model.backbone.norm_cfg.eps: got 'x', expected a number"),
        ("model.backbone.init_cfg={type: Normal, std: x}", "model.backbone.init_cfg.std: got 'x', expected a number"),
        ("model.backbone.init_cfg=[{type: Norm}]", "model.backbone.init_cfg.0: no initialisation named 'Norm'"),
        ("model.head.num_classes=-5", "model.head: num_classes=-5 must be a positive integer"),
        ("model.head.loss.type=ResNet", "model.head.loss: ResNet is a backbone, expected a loss: "),
        ("model.head.loss.use_sigmoid=maybe", "model.head.loss.use_sigmoid: got 'maybe', expected true or false"),
        ("trainer.max_epoch=3", "trainer.max_epoch: there is no 'max_epoch'; did you mean max_epochs"),
        ("trainer.precision=[16]", "trainer.precision: got [16], expected"),
        ("data.batchsize=3", "data.batchsize: there is no 'batchsize'; did you mean batch_size?"),
        ("data.level=low", "data.level: got 'low', expected int"),
        ("optimizer={type: AdamW, lr: fast}", "optimizer.lr: got 'fast', expected a number"),
        (
            "optimizer={type: AdamW, parms: 3}",
            "optimizer.parms: AdamW has no argument 'parms'; there are amsgrad, betas",
        ),
        ("optimizer={type: AdamW, betas: [0.9, 2]}", "optimizer.betas: got [0.9, 2]: Invalid beta parameter"),
        ("optimizer={type: AdaW}", "optimizer: no Optimizer named 'AdaW'; did you mean AdamW"),
        ("model.type=Nothing", "model: no model named 'Nothing'"),
        ("model.type=torch.nn.Linear", "model: torch.nn.Linear is no LightningModule"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_1(
    file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["config", "check", "my.yaml", override]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(message)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("train_cfg", "message"),
    [
        ("{}", ""),
        ("{augments: {type: Mixup, alpha: 1.0}}", ""),
        ("{augments: [{type: Mixup, alpha: 1.0}, {type: CutMix, alpha: 1.0}], probs: [0.5, 0.5]}", ""),
        (
            "{augment: []}",
            "model.train_cfg.augment: BatchAugmentsConfig has no argument 'augment'; did you mean augments",
        ),
        ("{augments: [{type: Mixup}]}", "model.train_cfg.augments.0: Mixup needs alpha"),
        ("{augments: [{type: Mixup, alpha: 1.0}], probs: 2.0}", "model: probs=2.0 must be a probability"),
    ],
)
def test_augmentations_of_batches_are_checked(capsys: pytest.CaptureFixture[str], train_cfg: str, message: str) -> None:
    small = ["model.backbone.base_channels=2", "model.backbone.stem_channels=4", "model.head.in_channels=16"]
    assert main(["config", "check", "resnet18_cifar10", *small, f"model.train_cfg={train_cfg}"]) == bool(message)
    assert capsys.readouterr().err.startswith(message)


def test_a_file_that_is_not_there_is_exit_code_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "mi.yaml"]) == 2
    assert "did you mean my.yaml?" in capsys.readouterr().err
    assert main(["config", "print", "my.yaml", "--imports", "mine.py"]) == 2
    assert main(["config", "check", "my.yaml", "--images", "slides"]) == 2
    assert "there is no --images here; values are given as path=value" in capsys.readouterr().err
    assert main(["config", "check", "resnet18_cifr10"]) == 2
    assert "did you mean resnet18_cifar10" in capsys.readouterr().err


def test_whoever_reads_may_stop_reading() -> None:
    command = f"{sys.executable} -m widefield list models | head -n 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
