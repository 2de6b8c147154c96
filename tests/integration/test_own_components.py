"""A user's package of components, named in configurations of Python, from the training to the predictions."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from tests.small_images import write_folder
from widefield.cli import main
from widefield.cli.fit_sections import SECTIONS
from widefield.config import build, check_config, load, override
from widefield.registry import MODELS

PACKAGE = {
    "__init__": "from . import head, loss, neck\n",
    "neck": """\
from torch import nn
from widefield.registry import MODELS

@MODELS.register_module()
class Pool(nn.Module):
    def forward(self, maps):
        return (maps[-1].mean((2, 3)),)
""",
    "head": """\
from torch import nn
from widefield.components import ClsHead
from widefield.registry import MODELS

@MODELS.register_module()
class TwoLayers(ClsHead):
    def __init__(self, in_channels, hidden, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = nn.Linear(in_channels, hidden), nn.Linear(hidden, num_classes)

    def pre_logits(self, features):
        return self.first(features[-1]).tanh()

    def forward(self, features):
        return self.second(self.pre_logits(features))
""",
    "loss": """\
from torch import nn
from widefield.components import weighted_loss
from widefield.registry import MODELS

@weighted_loss
def distance(scores, target):
    return (scores - target).abs()

@MODELS.register_module()
class Distance(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, scores, target, weight=None, avg_factor=None):
        return self.factor * distance(scores, target, weight, reduction="mean", avg_factor=avg_factor)
""",
}
BASE = """\
_stem = dict(stem_channels=4, base_channels=4, num_stages=2, out_indices=(1,))
model = dict(
    type="ImageClassifier",
    backbone=dict(type="ResNet", depth=18, **_stem),
    neck=dict(type="Pool"),
    head=dict(type="TwoLayers", in_channels=8, hidden=6, num_classes=2, loss=dict(type="Distance")),
    data_preprocessor=dict(type="ClsDataPreprocessor", to_onehot=True, num_classes=2),
)
"""
MINE = """\
_base_ = "base.py"
model = dict(head=dict(hidden=5, loss=dict(factor=2.0)))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(MODELS, "_registered", dict(MODELS._registered))  # forgets the user's components
    for name in ("my_parts", *(f"my_parts.{part}" for part in PACKAGE)):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_parts").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / "my_parts" / f"{name}.py").write_text(text)
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def built(*overrides: str) -> Any:
    import my_parts  # noqa: F401

    config = override(load(Path("mine.py")), overrides, SECTIONS)
    check_config(config, SECTIONS)
    torch.manual_seed(0)
    model = build(config, ("model",))
    model.init_weights()
    return model


def test_a_package_is_trained_resumed_tested_and_predicts(folder: Path) -> None:
    write_folder(folder, side=24)
    fit = ["fit", "--config", "mine.py", "--imports", "my_parts", "--images", "images", "--labels", "labels.csv"]
    assert main([*fit, "--batch-size", "3", "--epochs", "1", "trainer.enable_progress_bar=false", "--out", "run"]) == 0
    assert main(["fit", "--resume", "--out", "run", "--epochs", "2"]) == 0
    assert main(["test", "--run", "run"]) == 0
    assert main(["predict", "--checkpoint", "run/last.ckpt", "--out", "predictions", "images"]) == 0
    with (folder / "predictions" / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["hyper_parameters"]["head"]["hidden"]) == (1, 5)
    assert checkpoint["state_dict"]["head.first.weight"].shape == (5, 8)


def test_a_loss_of_scores_gets_the_labels_as_scores(folder: Path) -> None:
    model, labels = built().eval(), torch.tensor([1, 0])
    inputs, samples = model.preprocess((torch.rand(2, 3, 32, 32), labels), training=True)
    expected = 2 * (model(inputs) - one_hot(labels, 2)).abs().sum(1).mean()
    torch.testing.assert_close(model.loss(inputs, samples)["loss"], expected)
    assert model.extract_feat(inputs, stage="pre_logits").shape == (2, 5)


def test_a_backbone_begins_with_its_weights_of_another_models_checkpoint(folder: Path) -> None:
    saved = built("model.head.hidden=7")
    torch.save(saved.state_dict(), "other.pth")
    loaded = built("model.backbone.init_cfg={type: Pretrained, checkpoint: other.pth, prefix: backbone}")
    wanted = saved.backbone.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.backbone.state_dict().items())


def test_a_part_that_forgets_its_base_class_is_told(folder: Path) -> None:
    forgetful = PACKAGE["loss"].replace(
        "        super().__init__()\n        self.factor", "        self.part = nn.ReLU()\n        self.factor"
    )
    (folder / "my_parts" / "loss.py").write_text(forgetful)
    with pytest.raises((AttributeError, ValueError), match="cannot assign module before"):
        built()
