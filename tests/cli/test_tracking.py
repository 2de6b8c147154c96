"""What `widefield fit` tells of a run: to loggers, and on its page."""

import csv
import json
import re
import shutil
from collections.abc import Iterator, Mapping
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


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Recorder]]]:
    """The folder of a run, and the loggers of services that it made."""
    out = tmp_path_factory.mktemp("runs") / "run"
    named = ["loggers.wandb.project=slides", "loggers.mlflow={}", "loggers.csv={}", "loggers.jsonl={}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning, "WandbLogger", Recorder)
        patch.setattr(lightning, "MLFlowLogger", Recorder)
        patch.setattr(Recorder, "made", made := [])
        assert fit(folder, out, *named, "data.val_fraction=0.5", "--lr", "0", "--memory-budget", "1GiB") == 0
        yield out, made


def test_a_run_logs_to_the_loggers_that_are_named(run: tuple[Path, list[Recorder]]) -> None:
    out, (mlflow, wandb) = run
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


def test_the_page_has_curves_the_confusion_matrix_mistakes_and_the_plan(run: tuple[Path, list[Recorder]]) -> None:
    page = (run[0] / "report.html").read_text(encoding="utf-8")
    for heading in ("Learning curves", "Confusion matrix", "Worst mistakes", "Memory of a training step"):
        assert f"<h2>{heading}" in page
    (right, of) = map(int, re.findall(r"(\d+) of (\d+) of these were classified right", page)[0])
    cells = [int(count) for count in re.findall(r'<td class="right[^>]*>(\d+)<', page)]
    assert (sum(cells), of) == (right, 4)
    assert page.count("data:image/") == min(4, of - right) > 0
    assert "measured peak" in page and "1.00 GiB, is the dashed line" in page


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of the copy
def test_a_resumed_run_goes_on_with_what_was_logged(
    run: tuple[Path, list[Recorder]], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train_loss": 0.0}\n')  # of an epoch that was broken off
    assert fit(folder, out, "--resume", "--epochs", "2") == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and max(steps) < 99
    assert (out / "csv" / "version_1" / "metrics.csv").is_file()


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
