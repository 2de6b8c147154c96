"""`widefield pretrain`, `export`, `embed` and `list methods`."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretraining.tiny import write_images
from widefield.cli import main
from widefield.cli.first_checks import check_paths

SOURCE = """
from torch import nn
from widefield.pretraining import METHODS, Method

class MyWrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU())
    def get_model(self):
        return self.model
    def forward_features(self, x):
        return {"features": self.model(x)}
    def forward_pool(self, x):
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}
    def feature_dim(self):
        return 6

@METHODS.register_module("test_nothing", force=True)
class Nothing(Method):
    '''Learns nothing.'''
    def loss(self, views, step):
        return {"loss": self.embedding.vectors(views[0]).mean()}
"""
QUICK = [
    "--epochs=1",
    "--batch-size=4",
    "num_workers=0",
    "accelerator=cpu",
    "transform_args.image_size=16",
    "trainer_args.enable_progress_bar=false",
    "callbacks.report=null",
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "my_wrapper_file.py").write_text(SOURCE)
    return f"{tmp_path / 'my_wrapper_file.py'}:MyWrapper"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 8)


def test_a_wrapper_in_a_file_is_trained_exported_and_embeds(
    file: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = ["method_args.hidden_dim=8", "method_args.output_dim=4", "optim_args.lr=1e-2", "loggers.tensorboard=null"]
    assert main(["pretrain", "--out", str(out), "--data", str(images), "--model", file, *QUICK, *small]) == 0
    shown = capsys.readouterr().err
    assert "training completed" in shown and "settings:" not in shown
    text = (out / "config.yaml").read_text()
    assert "lr: 0.01\n" in text and "hidden_dim: 8" in text and "model: MyWrapper" in text
    checkpoint = str(out / "checkpoints" / "last.ckpt")
    exported = tmp_path / "model.pt"
    assert main(["export", "--checkpoint", checkpoint, "--out", str(exported), "--format", "torch_state_dict"]) == 0
    assert torch.load(exported, weights_only=True).keys() == {"0.weight", "0.bias"}
    table = tmp_path / "e.csv"
    command = ["embed", "--checkpoint", checkpoint, "--data", str(images), "--out", str(table), "--format", "csv"]
    assert main([*command, "--model", file, "image_size=[16, 20]", "num_workers=0", "accelerator=cpu"]) == 0
    lines = table.read_text().splitlines()
    assert lines[0] == "filename," + ",".join(f"embedding_{k}" for k in range(6))
    assert [line.partition(",")[0] for line in lines[1:]] == [f"{k:02d}.png" for k in range(8)]
    assert main([*command, "--model", file]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_method_in_a_file_is_imported(file: str, images: Path, tmp_path: Path) -> None:
    source = file.rpartition(":")[0]
    command = [
        "pretrain",
        "--data",
        str(images),
        "--data",
        str(images),
        "--model",
        "timm/test_resnet",
        "--imports",
        source,
    ]
    assert main([*command, "--out", str(tmp_path / "out"), "--method", "test_nothing", *QUICK]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18"], "did you mean torchvision/resnet18"),
        (["epoch=3", "--model", "torchvision/resnet18"], "there is no argument 'epoch'; did you mean epochs?"),
        (["--model", "torchvision/resnet18", "epochs"], "got 'epochs', expected key=value"),
        (["--model", "torchvision/resnet18", "epochs.x=1", "--epochs=2"], "epochs has the value 2 already"),
        (["--model", "torchvision/resnet18", "optim_args.rate=1"], "optim_args.rate: SGD has no argument 'rate'"),
        (["--model", "torchvision/resnet18", "batch_size=four"], "batch_size: got 'four', expected int"),
        (["--model", "torchvision/resnet18", "--batch-size", "0"], "batch_size: got 0, expected int, at least 1"),
        (["--model", "nowhere.py:Net"], "nowhere.py; there are none"),
        ([], "give --model"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    arguments: list[str], message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", "--out", str(tmp_path / "out"), "--data", str(images), *arguments]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods", "sim*"]) == 0
    shown: Any = capsys.readouterr().out
    assert shown.startswith("simclr  method  Tells two views of an image")


def test_a_spacing_is_that_of_the_patches_of_slides(monkeypatch, tmp_path):
    called, out = {}, str(tmp_path / "o")

    def pretrain(out, data, model, slides=None):
        called["slides"] = slides

    monkeypatch.setattr("widefield.pretraining.pretrain", pretrain)
    where = ["--out", out, "--data", str(tmp_path), "--model", "timm/resnet10t"]
    assert main(["pretrain", *where, "--spacing", "0.5", "slides.patch_size=64"]) == 0
    assert called["slides"] == {"spacing": 0.5, "patch_size": 64}


def test_zero_is_a_value_and_the_seed_counts_for_a_wrapper_in_a_file(monkeypatch, tmp_path):
    (tmp_path / "my.py").write_text(
        "import torch\n\nclass Wrapper(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(3, 3)\n"
    )
    called = []

    def pretrain(out, data, model, epochs=100, seed=0):
        called.append((epochs, model.weight.tolist()))

    monkeypatch.setattr("widefield.pretraining.pretrain", pretrain)
    for seed in ("0", "7", "7"):
        model = f"{tmp_path}/my.py:Wrapper"
        where = ["--out", str(tmp_path / "o"), "--data", str(tmp_path), "--model", model]
        main(["pretrain", *where, "--epochs", "0", "--seed", seed])
    assert [epochs for epochs, _ in called] == [0, 0, 0]
    assert called[0] != called[1] == called[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "--out", "full", "--data", "full", "--model", "timm/resnet18"], "full is not empty"),
        (["pretrain", "--out", "new", "--data", "gone", "--model", "timm/resnet18"], "data: gone does not exist"),
        (["pretrain", "--out", "new", "--data", "full", "--model", "timm/resnet81"], "did you mean timm/resnet18"),
        (["pretrain", "--out", "new", "--data", "full", "--model", "resnet18"], "did you mean torchvision/resnet18"),
        (["pretrain", "--out", "new", "--data", "full", "--model", "dinov3/vitb16"], "timm/vit_base_patch16_dinov3"),
        (
            [
                "pretrain",
                *["--out", "new", "--data", "full", "--model", "timm/resnet18", "method_args.teacher_weights=gone.pt"],
            ],
            "method_args.teacher_weights: gone.pt does not exist",
        ),
        (["pretrain", "--out", "new", "--data", "full", "--model", "m", "--epoch", "3"], "did you mean --epochs?"),
        (["pretrain", "--out", "new", "--data", "full", "--model", "m", "epoch=3"], "did you mean epochs?"),
        (["pretrain", "--out", "new", "--model", "m"], "give --data"),
        (
            ["pretrain", "--out", "new", "--data", "full", "--model", "m.py:M", "--method", "simlcr"],
            "did you mean simclr?",
        ),
        (["pretrain", "--out", "new", "--data", "full", "--model", "m.py:M", "--batch-size", "0"], "int, at least 1"),
        (
            ["pretrain", "--out", "new", "--data", "full", "--model", "m.py:M", "transform_args.image=3"],
            "mean image_size",
        ),
        (
            ["embed", "--out", "new", "--data", "full", "--checkpoint", "full/x", "format=numpy"],
            "one of 'torch', 'csv'",
        ),
        (["export", "--out", "full/x", "--checkpoint", "full/x"], "already exists! Set overwrite=True"),
        (
            ["embed", "--out", "new", "--data", "full", "--checkpoint", "gone.ckpt"],
            "checkpoint: gone.ckpt does not exist",
        ),
        (["fit", "--images", "gone", "--out", "new"], "the folder of images gone does not exist"),
        (["fit", "--model", "torchvision/resnet81"], "did you mean torchvision/resnet18"),
        (["fit", "--out", "full/x"], "full/x is a file"),
        (["fit", "--weights", "full/gone.pt"], "--weights: full/gone.pt does not exist"),
        (["predict", "gone", "--checkpoint", "full/x"], "cannot read gone: there is no such file"),
        (["test", "--run", "gone"], "there is no run in gone"),
        (["check", "timm/resnet81"], "did you mean timm/resnet18"),
    ],
)
def test_paths_and_spelling_are_checked_before_torch_is_imported(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "widefield.cli.run", None)  # the import of torch comes with it
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["timm/convnext_tiny_in22k", "timm/resnet18.a1_in1k", "torchvision/resnet18"])
def test_names_of_former_versions_and_of_weights_pass_the_first_checks(name):
    check_paths(argparse.Namespace(model=name), [])
    with pytest.raises(ValueError, match="there is no model 'timm/mine'"):
        check_paths(argparse.Namespace(model="timm/mine"), [])
    check_paths(argparse.Namespace(model="timm/mine", imports=["mine.py"]), [])


def test_the_first_checks_import_no_torch():
    code = "import sys, widefield.cli.first_checks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
