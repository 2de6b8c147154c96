"""The page for users of LightlyTrain: its example runs as printed, and it names every argument."""

import inspect
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

import widefield
from tests.pretraining.tiny import write_images

PAGE = (Path(__file__).parents[2] / "docs" / "from-lightlytrain.md").read_text(encoding="utf-8")
THEIRS = json.loads(Path(__file__).with_name("lightlytrain_0_18.json").read_text())


def test_the_example_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "my_data_dir", 8)
    (tmp_path / "example.py").write_text(PAGE.split("```python\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py", run_name="__main__")
    model: Any = resnet18()
    weights = torch.load("out/my_experiment/exported_models/exported_last.pt", weights_only=True)
    model.load_state_dict(weights)


def test_every_argument_and_method_of_theirs_is_on_the_page() -> None:
    for name in (*inspect.signature(widefield.train).parameters, *THEIRS["methods"]):
        assert f"`{name}`" in PAGE, name
