"""`widefield plan`: tile, steps, memory and layers of a model, without computing a pixel."""

import json
from pathlib import Path
from typing import Any

import pytest

from widefield.cli import main

SOURCE = """
from torch import nn

model = nn.Sequential(nn.Conv2d(5, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))

class Cumulative(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).cumsum(2)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(SOURCE)
    return path


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_and_its_layers(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"{file}:model"
    assert main(["plan", model, "--size", "4000x3000", "--tile-size", "500", "--batch", "2"]) == 0
    plan, table = capsys.readouterr().out.split("\n\n")
    assert "2 x 5 x 4000 x 3000" in plan
    assert "500 x 500" in plan
    header, first, last = table.splitlines()
    assert header.startswith("layer")
    assert first.split() == ["0", "conv2d", "2x4x2000x1500", "3x3", "2x2", "2", "1", "1", "0", "0"]
    assert last.split() == ["2", "conv2d", "2x6x2000x1500", "7x7", "2x2", "0", "2", "2", "1", "1"]


def test_the_plan_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, f"{file}:model", "--size", "4000x3000", "--memory-budget", "1GiB")
    assert result["model"] == f"{file}:model"
    assert result["image_shape"] == [1, 5, 4000, 3000]
    assert result["total_bytes"] == sum(result["predicted_bytes"].values()) <= 2**30
    assert result["refused"] == []
    assert [layer["module_path"] for layer in result["layers"]] == ["0", "2"]
    assert result["layers"][1]["lost"] == {"top": 2, "left": 2, "bottom": 1, "right": 1}


def test_a_forward_pass_needs_no_more_than_a_training_step(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (f"{file}:model", "--size", "4000x3000", "--tile-size", "256")
    training, inference = planned(capsys, *arguments), planned(capsys, *arguments, "--inference")
    assert inference["total_bytes"] <= training["total_bytes"]
    assert inference["layers"] == training["layers"]


def test_what_is_not_streamed_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (f"{file}:Cumulative", "--size", "400x300")
    (refused,) = planned(capsys, *arguments)["refused"]
    assert refused["op"] == "aten.cumsum"
    assert main(["plan", *arguments]) == 0
    assert "aten.cumsum" in capsys.readouterr().out


def test_a_model_of_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "torchvision/squeezenet1_1", "--size", "20000x30000", "--memory-budget", "8GiB")
    assert result["image_shape"] == [1, 3, 20000, 30000]
    assert {layer["op"] for layer in result["layers"]} == {"conv2d", "max_pool2d"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory-budget", "1KiB"), "memory_budget of 1 KiB is too small"),
        (("--memory-budget", "much"), "memory_budget='much' is not a size"),
        (("--channels", "3"), "cannot run on an image"),
    ],
)
def test_an_error_is_a_line_and_exit_code_2(
    file: Path, arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{file}:model", "--size", "4000x3000", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_name_that_is_no_model_is_exit_code_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{file}:modle", "--size", "64x64"]) == 2
    assert "did you mean model" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(), ("--size", "big")])
def test_a_size_is_needed(size: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "timm/resnet18", *size])
    assert caught.value.code == 2
    assert "--size" in capsys.readouterr().err
