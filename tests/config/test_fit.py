"""One class in a file of the user's, named in a configuration, changed on the command line, trained and resumed."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data.cifar_files import write_cifar10
from tests.small_images import write_folder
from widefield.cli import main
from widefield.config import load
from widefield.registry import MODELS

MY_MODELS = """\
from torch import nn

from widefield.components import ResNet, build_conv_layer, build_norm_layer
from widefield.registry import MODELS


@MODELS.register_module()
class ResNet_CIFAR(ResNet):
    '''ResNet backbone for CIFAR.'''

    def __init__(self, depth, deep_stem=False, **kwargs):
        super(ResNet_CIFAR, self).__init__(depth, deep_stem=deep_stem, **kwargs)
        assert not self.deep_stem, 'ResNet_CIFAR do not support deep_stem'

    def _make_stem_layer(self, in_channels, base_channels):
        self.conv1 = build_conv_layer(
            self.conv_cfg, in_channels, base_channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm1_name, norm1 = build_norm_layer(self.norm_cfg, base_channels, postfix=1)
        self.add_module(self.norm1_name, norm1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        outs = []
        for i, layer_name in enumerate(self.res_layers):
            x = getattr(self, layer_name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)
"""
PLAIN = """

@MODELS.register_module(kind='model')
class Plain(nn.Module):
    pass
"""
KILLER = """\
import os, signal
from lightning.pytorch import Callback

class Killer(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""
BASE = """\
model:
  type: ImageClassifier
  lr: 1e-3
  backbone:
    type: ResNet_CIFAR
    depth: 18
    stem_channels: 4
    base_channels: 4
    num_stages: 2
    out_indices: [1]
  neck: {type: GlobalAveragePooling}
  head:
    type: LinearClsHead
    num_classes: 2
    in_channels: 8
    cal_acc: true
"""
CONFIG = """\
_base_: base.yaml
data:
  images: images
  labels: labels.csv
  batch_size: 3
trainer:
  max_epochs: 1
  enable_progress_bar: false
optimizer: {type: SGD, lr: 0.05, momentum: 0.9}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(MODELS, "_registered", dict(MODELS._registered))  # forgets the user's components
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, side=24)
    (tmp_path / "my_models.py").write_text(MY_MODELS + PLAIN)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "my.yaml").write_text(CONFIG)
    return tmp_path


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


FIT = ("fit", "--config", "my.yaml", "--imports", "my_models.py")


def test_a_users_component_is_trained_killed_and_resumed_from_a_configuration(folder: Path) -> None:
    overrides = ("model.backbone.depth=34", "model.backbone.norm_cfg.eps=1e-4")
    assert main([*FIT, *overrides, "trainer.max_epochs=2", "--out", "whole"]) == 0
    run = folder / "whole"
    assert {"train_loss", "val_loss", "train_accuracy_top-1", "val_accuracy_top-1"} < set(rows(run)[0])
    assert main(["test", "--run", "whole", "--out", "numbers.json", "metrics=[{type: Accuracy}]"]) == 0
    numbers, last = json.loads((folder / "numbers.json").read_text()), rows(run)[-1]
    assert numbers["test_loss"] == float(last["val_loss"])
    assert numbers["test_accuracy/top1"] == numbers["test_accuracy_top-1"] == float(last["val_accuracy_top-1"])
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["backbone"]["depth"] == 34
    assert "momentum_buffer" in checkpoint["optimizer_states"][0]["state"][0]
    assert (
        sum(key.startswith("backbone.layer2") and key.endswith("conv1.weight") for key in checkpoint["state_dict"]) == 4
    )

    (folder / "killer.py").write_text(KILLER)
    killed = [*FIT, *overrides, "trainer.max_epochs=2", "--out", "broken", "--imports", "killer.py"]
    code = f"import torch, widefield.cli; torch.set_num_threads({torch.get_num_threads()}); widefield.cli.main(%r)"
    arguments = [*killed, "trainer.callbacks=[{type: killer.Killer}]"]
    assert subprocess.run([sys.executable, "-c", code % arguments], check=False).returncode == -signal.SIGKILL
    assert len(rows(folder / "broken")) == 1
    assert main(["fit", "--resume", "--out", "broken", "trainer.callbacks=[]"]) == 0
    assert rows(folder / "broken") == rows(run)
    resumed = torch.load(folder / "broken" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, resumed[key]) for key, value in checkpoint["state_dict"].items())


def test_the_configuration_of_a_run_loads_to_the_same_model(folder: Path) -> None:
    from widefield.config import build

    assert main([*FIT, "model.backbone.base_channels=2", "model.head.in_channels=4", "--out", "run"]) == 0
    saved = load(folder / "run" / "config.yaml")
    assert saved.data["imports"] == [str(folder / "my_models.py")]
    assert saved.data["model"]["backbone"]["base_channels"] == 2
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["optimizer"]["init_args"]["momentum"] == 0.9
    model = build(saved, ("model",))
    model.load_state_dict(torch.load(folder / "run" / "last.ckpt", weights_only=True)["state_dict"])
    assert type(model.backbone).__module__ == "my_models"
    assert main(["config", "check", str(folder / "run" / "config.yaml")]) == 0


SCHEDULED = """\
_base_: my.yaml
optimizer: {weight_decay: 0.01}
paramwise_cfg: {norm_decay_mult: 0.0, custom_keys: {head: {lr_mult: 10.0}}}
lr_scheduler:
  - {type: LinearLR, start_factor: 0.5, end: 1, convert_to_iter_based: true}
  - {type: CosineAnnealingLR, T_max: 2}
"""


def test_schedules_and_options_of_parameters_count_in_training_and_are_resumed(folder: Path) -> None:
    (folder / "scheduled.yaml").write_text(SCHEDULED)
    line = ["fit", "--config", "scheduled.yaml", "--imports", "my_models.py"]
    assert main([*line, "trainer.max_epochs=3", "--out", "whole"]) == 0
    assert main([*line, "trainer.max_epochs=2", "--out", "broken"]) == 0
    halfway = torch.load(folder / "broken" / "last.ckpt", weights_only=True)
    groups = halfway["optimizer_states"][0]["param_groups"]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [
        (0.01, pytest.approx(0.025)),  # halfway down the cosine
        (0.0, pytest.approx(0.025)),
        (0.01, pytest.approx(0.25)),
    ]
    assert main(["fit", "--resume", "--out", "broken", "trainer.max_epochs=3"]) == 0
    whole, resumed = (torch.load(folder / run / "last.ckpt", weights_only=True) for run in ("whole", "broken"))
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert [group["lr"] for group in resumed["optimizer_states"][0]["param_groups"]] == pytest.approx([0, 0, 0])
    assert rows(folder / "broken") == rows(folder / "whole")


def test_flags_files_and_lightning_yaml_are_one_parser(folder: Path) -> None:
    lightning = {
        "model": {
            "class_path": "widefield.components.models.image_classifier.ImageClassifier",
            "init_args": {
                "backbone": {
                    "class_path": "ResNet",
                    "init_args": {"depth": 18, "base_channels": 2, "stem_channels": 4},
                },
                "neck": {"class_path": "widefield.components.GlobalAveragePooling"},
                "head": {"class_path": "LinearClsHead", "init_args": {"num_classes": 2, "in_channels": 16}},
            },
        },
        "trainer": {
            "max_epochs": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}],
        },
    }
    (folder / "lightning.yaml").write_text(yaml.safe_dump(lightning))
    line = ["fit", "--config", "lightning.yaml", "--images", "images", "--labels", "labels.csv", "--out", "run"]
    line += ["--batch-size", "3"]
    assert main([*line, "--model.init_args.backbone.init_args.base_channels", "1", "model.head.in_channels=8"]) == 0
    backbone = torch.load(folder / "run" / "last.ckpt", weights_only=True)["hyper_parameters"]["backbone"]
    assert backbone["base_channels"] == 1


MY_LIGHTNING = """\
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Data(pl.LightningDataModule):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(self.count, 4)), batch_size=2)


class Model(pl.LightningModule):
    def __init__(self, net: nn.Module, loss: nn.Module, options: dict) -> None:
        super().__init__()
        self.net, self.loss, self.options = net, loss, options

    def training_step(self, batch, batch_idx):
        output = self.net(batch[0])
        loss = self.loss(output, torch.zeros_like(output))
        self.log("my_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
"""
MY_LIGHTNING_CONFIG = """\
imports: my_lightning.py
model:
  type: my_lightning.Model
  net: {type: torch.nn.Linear, in_features: 4, out_features: 2}
  loss: {class_path: torch.nn.MSELoss}
  options: {type: anything, goes: here}
data: {type: my_lightning.Data, count: 4}
trainer: {max_epochs: 1, enable_progress_bar: false}
"""


def test_modules_of_lightning_are_trained_by_their_import_path(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "my_lightning.py").write_text(MY_LIGHTNING)
    (folder / "mine.yaml").write_text(MY_LIGHTNING_CONFIG)
    line = ["fit", "--config", "mine.yaml", "--out", "run", "--seed", "3"]
    assert main([*line, "model.net.out_feature=3"]) == 2
    assert "model.net.out_feature: there is no 'out_feature'; did you mean out_features" in capfd.readouterr().err
    assert main([*line, "model.net.out_features=3"]) == 0
    weights = torch.load(folder / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert weights["net.weight"].shape == (3, 4)
    assert "my_loss" in rows(folder / "run")[0]
    assert main(["fit", "--resume", "--out", "run", "trainer.max_epochs=2"]) == 0
    assert len(rows(folder / "run")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.backbone.dept=34"], "model.backbone.dept: there is no 'dept'; did you mean depth?"),
        (["model.head.num_classes=-5"], "model.head: num_classes=-5 must be a positive integer"),
        (["model.head.type=LinearHead"], "model.head: no head named 'LinearHead'; did you mean LinearClsHead"),
        (["--epochs", "2", "--batch-size", "3", "--trainer.max_step=3"], "trainer.max_step: there is no 'max_step'"),
        (["model={type: Plain, _delete_: true}"], "model: Plain is no LightningModule, so it cannot be trained"),
        (["optimizer.lr=-1"], "optimizer.lr: got -1, expected a number, at least 0"),
        (["data.batch_size=0"], "--batch-size: got 0, expected int, at least 1"),
        (["trainer.devices=0"], "trainer.devices: got 0: `Trainer(devices=0)` value is not a valid input"),
        (["lr_scheduler=[{type: LinearLR}, {type: StepLR, step_size: 1}]"], "lr_scheduler: schedule 1 has no begin"),
        (["optimizer=null", "lr_scheduler={type: LinearLR}"], "lr_scheduler: there is no optimizer"),
        (["trainer.accelerator"], "got 'trainer.accelerator', expected a value for a path"),
        (["--trainer.accelerator"], "--trainer.accelerator has no value"),
        (["--config", "gone.yaml"], "gone.yaml does not exist"),
    ],
)
def test_a_wrong_configuration_is_refused_before_data_is_read(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder / "labels.csv").unlink()
    assert main([*FIT, *arguments, "--out", "run"]) == 2
    error: Any = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (folder / "run").exists()


LABELLED = ["data.images=images", "data.labels=labels.csv"]
READY = {
    "resnet18_cifar": [
        *LABELLED,
        "data.batch_size=3",
        "model.backbone.base_channels=2",
        "model.backbone.stem_channels=4",
        "model.head={num_classes: 2, in_channels: 16, topk: [1]}",
    ],
    "resnet18_cifar10": [
        "data.train.root=.",
        "data.val.root=.",
        "model.backbone.base_channels=2",
        "model.backbone.stem_channels=4",
        "model.head.in_channels=16",
    ],
    "mae_vit_base": [
        "data.train.root=images",
        "data.train.transforms.0.size=32",
        "data.batch_size=4",
        "model.backbone.img_size=32",
        "model.backbone.arch={_delete_: true, embed_dims: 16, num_layers: 1, num_heads: 2, feedforward_channels: 16}",
        "model.neck={num_patches: 4, embed_dim: 16, decoder_embed_dim: 16, decoder_depth: 1, decoder_num_heads: 2}",
    ],
    "convnext_slides": [
        "data.images=slides/images",
        "data.labels=slides/labels.csv",
        "model.backbone.streaming.tile_size=64",
        "model.backbone.arch={_delete_: true, depths: [1, 1, 1, 1], channels: [4, 4, 4, 8]}",
        "model.head.in_channels=8",
    ],
}
"""What makes each ready configuration a small one on small data."""


def test_every_ready_configuration_is_listed_and_tested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "configs"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == set(READY)
    assert listed["resnet18_cifar"] == "ResNet-18 for images of 32 x 32 pixels and ten classes."


@pytest.mark.parametrize("name", READY)
def test_a_ready_configuration_trains_and_is_tested(folder: Path, name: str) -> None:
    write_cifar10(folder, per_batch=10, batches=2)
    write_folder(folder / "slides", side=96)
    assert main(["config", "check", name, *READY[name]]) == 0
    small = ["trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    assert main(["fit", "--config", name, *READY[name], *small, "--out", "run"]) == 0
    (last,) = rows(folder / "run")
    assert float(last["train_loss"]) > 0
    if "val_loss" in last:
        assert main(["test", "--run", "run", "--out", "numbers.json"]) == 0
        assert json.loads((folder / "numbers.json").read_text())["test_loss"] == float(last["val_loss"])


def test_a_ready_configuration_is_a_base(folder: Path) -> None:
    (folder / "small.yaml").write_text("_base_: resnet18_cifar\nmodel: {head: {num_classes: 3}}")
    assert load(folder / "small.yaml").data["model"]["head"]["num_classes"] == 3
    assert main(["config", "check", "small.yaml", *LABELLED]) == 0


RETRIEVER = """\
_base_: my.yaml
model:
  _delete_: true
  type: ImageToImageRetriever
  image_encoder:
    - {type: ResNet, depth: 18, stem_channels: 4, base_channels: 4, num_stages: 2, out_indices: [1]}
    - {type: GlobalAveragePooling}
  head: {type: LinearClsHead, num_classes: 2, in_channels: 8}
  prototype: images
metrics: [{type: RetrievalRecall, topk: 2}]
"""


def test_a_retriever_takes_a_folder_a_file_of_features_or_a_described_loader(folder: Path) -> None:
    from widefield.inference import get_model

    (folder / "retriever.yaml").write_text(RETRIEVER)
    described = "{_delete_: true, dataset: {type: ImageFolder, root: images, with_label: false}, batch_size: 2}"
    recalls = []
    for prototype in ("images", described, "features.pth"):
        assert main(["fit", "--config", "retriever.yaml", "--out", prototype[:3], f"model.prototype={prototype}"]) == 0
        recalls.append(rows(folder / prototype[:3])[0]["val_retrieval/Recall@2"])
        get_model(folder / prototype[:3]).dump_prototype("features.pth")
    assert len(set(recalls)) == 1
    assert main(["fit", "--config", "retriever.yaml", "--out", "gone", "model.prototype=gone"]) == 2
    assert main(["predict", "--checkpoint", "ima/best.ckpt", "--out", "predicted", "images/im1.tif"]) == 0
    with (folder / "predicted" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["predicted"].startswith("1;")
    assert float(row["similarity_1"]) == pytest.approx(1)
