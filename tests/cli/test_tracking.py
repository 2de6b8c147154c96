"""What `widefield fit` tells of a run: to loggers, and on its page."""

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch import loggers as lightning
from lightning.pytorch.loggers import Logger

import widefield
from tests.small_images import write_folder
from widefield.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder)
    return folder


def fit(folder: Path, out: Path, *more: str) -> int:
    data = ["--images", str(folder / "images"), "--labels", str(folder / "labels.csv"), "--out", str(out)]
    small = ["--model", "resnet10_w16", "--epochs", "1", "--tile-size", "48", "--seed", "7"]
    return main(["fit", *data, *small, *more])


class Recorder(Logger):
    """A stand-in for a logger of a service, which keeps what it is told."""

    made: ClassVar[list["Recorder"]] = []

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.numbers: dict[str, float] = {}
        self.settings: Mapping[str, Any] = {}
        self.made.append(self)

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *others: Any) -> None:
        self.settings = params

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.numbers.update(metrics)


def test_a_run_logs_to_the_loggers_that_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lightning, "WandbLogger", Recorder)
    monkeypatch.setattr(lightning, "MLFlowLogger", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    out = tmp_path / "run"
    named = ["loggers.wandb.project=slides", "loggers.mlflow={}", "loggers.csv={}", "loggers.jsonl={}"]
    assert fit(folder, out, *named) == 0, capsys.readouterr().err
    mlflow, wandb = Recorder.made
    assert wandb.arguments == {"save_dir": out, "project": "slides"}
    assert mlflow.arguments == {"save_dir": str(out)}
    assert wandb.settings["model"]["model_name"] == "resnet10_w16"
    with (out / "history.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    logged = {"train_loss", "val_loss", "val_accuracy", "lr-AdamW"}
    assert {name: wandb.numbers[name] for name in logged} == {name: pytest.approx(float(row[name])) for name in logged}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged <= {name for line in lines for name in line}
    assert "val_accuracy" in (out / "csv" / "version_0" / "metrics.csv").read_text()
    assert float(row["train_loss_min"]) < float(row["train_loss"]) < float(row["train_loss_max"])
    assert fit(folder, out, "--resume", "--epochs", "2") == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert (out / "csv" / "version_1" / "metrics.csv").is_file()


def test_a_logger_without_its_package_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(**arguments: Any) -> None:
        raise ModuleNotFoundError("no wandb")

    monkeypatch.setattr(lightning, "WandbLogger", absent)
    places = {"out": tmp_path / "run", "images": folder / "images", "labels": folder / "labels.csv"}
    with pytest.raises(ValueError, match=r"loggers\.wandb needs the package wandb, .*; pip install wandb"):
        widefield.fit(**places, model="resnet10_w16", loggers={"wandb": {}})
    with pytest.raises(ValueError, match=r"loggers\.wanb: .*did you mean wandb"):
        widefield.fit(**places, model="resnet10_w16", loggers={"wanb": {}})
    with pytest.raises(ValueError, match=r"trainer\.logger and loggers both say"):
        widefield.fit(**places, model="resnet10_w16", loggers={"csv": {}}, **{"trainer.logger": True})
    assert not (tmp_path / "run").exists()


def test_the_page_has_curves_the_confusion_matrix_mistakes_and_the_plan(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fit(folder, out, "data.val_fraction=0.5", "--lr", "0", "--memory-budget", "1GiB") == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Learning curves", "Confusion matrix", "Worst mistakes", "Memory of a training step"):
        assert f"<h2>{heading}" in page
    (right, of) = map(int, re.findall(r"(\d+) of (\d+) of these were classified right", page)[0])
    cells = [int(count) for count in re.findall(r'<td class="right[^>]*>(\d+)<', page)]
    assert (sum(cells), of) == (right, 4)
    assert page.count("data:image/") == min(4, of - right) > 0
    assert "measured peak" in page and "1.00 GiB, is the dashed line" in page


def test_the_page_about_numbers_has_their_points_and_the_worst_of_them(folder: Path, tmp_path: Path) -> None:
    with (folder / "labels.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    lines = ["image,label", *(f"{row['image']},{k}" for k, row in enumerate(rows))]
    (tmp_path / "ages.csv").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "run"
    task = ["--labels", str(tmp_path / "ages.csv"), "--task", "regression", "data.val_fraction=0.5"]
    assert fit(folder, out, *task) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count(": true label ") == 4 and "predicted label" in page
    assert page.count("data:image/") == 4 and "in standard deviations" in page
