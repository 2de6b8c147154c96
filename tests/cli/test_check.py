"""`widefield check` on models from files, modules and libraries."""

import json
from pathlib import Path

import pytest

from widefield.cli import main

SOURCE = """
from dataclasses import dataclass
import torch
from torch import nn
from neighbour import CHANNELS

model = nn.Sequential(nn.Conv2d(CHANNELS, 4, 3, 2), nn.ReLU())
number = 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).cumsum(2).cos().exp()

class Branching(Net):
    def forward(self, x):
        return self.conv(x) if x.max() > 0 else x

def with_width(width):
    return nn.Conv2d(3, width, 3)

def small(width=2):
    return with_width(width)

def words():
    return "words"

class holder:
    inner = model
"""
FAST = ("--size", "21x23", "--plan-size", "300x400")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("CHANNELS = 5\n")
    path = tmp_path / "my_model.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("name", ["model", "small", "holder.inner"])
def test_an_exact_model_is_exit_code_0(file: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:{name}", *FAST]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("exact: ")
    assert "300 x 400" in shown


@pytest.mark.parametrize(("name", "verdict"), [("Net", "partly"), ("Branching", "refused")])
def test_a_model_that_is_not_exact_is_exit_code_1(
    file: Path, name: str, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{file}:{name}", *FAST]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(f"{verdict}: ")
    assert "What to do" in shown


def test_an_explanation_tells_what_each_pass_makes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:model", "--explain", *FAST]) == 0
    shown = capsys.readouterr().out
    passes = ["capture", "fold", "normal form", "place", "live", "levels", "kept", "stages"]
    found = [line.split(":")[0] for line in shown.splitlines() if "operations, " in line]
    assert found == passes
    assert "stage 0: from image to " in shown


def test_the_result_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:model", "--json", "--tile-size", "100", *FAST]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "exact"
    assert result["image_shape"] == [1, 5, 21, 23]
    assert result["plan"]["image_shape"] == [1, 5, 300, 400]
    assert result["plan"]["tile_size"] == [100, 100]


@pytest.mark.parametrize(
    "name",
    [
        "timm/test_resnet",
        pytest.param("torchvision/squeezenet1_1", marks=pytest.mark.slow),
        "torch.nn:Identity",
    ],
)
def test_models_of_libraries(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name, "--size", "33x37", "--plan-size", "64x64", "--json"]) == (name == "torch.nn:Identity")
    assert json.loads(capsys.readouterr().out)["model"] == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "MODEL is 'model'; give my_file.py:model"),
        ("FILE:modle", "did you mean model"),
        ("FILE:holder.iner", "did you mean inner"),
        ("FILE:number", "is a int, not a torch.nn.Module"),
        ("FILE:words", "makes a str, not a torch.nn.Module"),
        ("FILE:with_width", "needs arguments (width)"),
        ("FOLDER/my_modle.py:model", "did you mean my_model.py"),
        ("no_such_package.module:model", "there is no module 'no_such_package.module'"),
        ("timm/resnet1", "did you mean timm/resnet18"),
        ("torchvision/resnet1", "did you mean torchvision/resnet18"),
    ],
)
def test_a_name_that_is_no_model_is_exit_code_2(
    file: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = name.replace("FILE", str(file)).replace("FOLDER", str(file.parent))
    assert main(["check", name, *FAST]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("more", [("--channels", "3"), ("--size", "1x1")])
def test_an_image_that_the_model_cannot_take_is_exit_code_2(
    file: Path, more: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", f"{file}:model", *FAST, *more]) == 2
    assert "cannot run on an image" in capsys.readouterr().err


def test_a_file_that_fails_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    assert main(["check", f"{tmp_path / 'broken.py'}:model"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["97", "0x5", "axb"])
def test_a_size_that_is_none_is_exit_code_2(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["check", "timm/resnet18", "--size", size])
    assert caught.value.code == 2
    assert "97x113" in capsys.readouterr().err
