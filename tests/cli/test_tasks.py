"""`widefield fit` for labels that are no classes."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.small_images import write_folder
from widefield.cli import main
from widefield.images import open_image
from widefield.inference import ImageClassificationInferencer
from widefield.models import Classifier


def write_table(folder: Path, header: str, rows: Sequence[str]) -> None:
    lines = [f"slide;{header}", *(f"im{k};{row}" for k, row in enumerate(rows))]
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")


def fit(folder: Path, *more: str) -> list[str]:
    places = ("--images", str(folder / "images"), "--labels", str(folder / "labels.csv"), "--out", str(folder / "run"))
    return ["fit", *places, "--model", "resnet10_w16", "--epochs", "1", "--tile-size", "48", *more]


def last_row(run: Path) -> dict[str, float]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        *_, row = csv.DictReader(file)
    return {name: float(value) for name, value in row.items()}


def numbers_of(run: Path) -> dict[str, Any]:
    assert main(["test", "--run", str(run), "--out", str(run / "numbers.json")]) == 0
    found: dict[str, Any] = json.loads((run / "numbers.json").read_text())
    return found


@pytest.mark.parametrize(
    ("header", "rows", "arguments", "names", "metrics"),
    [
        (
            "age;size",
            [f"{40 + 7 * k};{0.1 * k}" for k in range(10)],
            ["--task", "regression", "data.columns.label=[age, size]"],
            ["age", "size"],
            {"mae_age", "rmse_age", "mae_size", "rmse_size"},
        ),
        (
            "label",
            ["b|a", "a", "-", "b", "a", "b|a", "c", "b", "a|b|c", "c"],
            ["--task", "multilabel", "--separator", "|"],
            ["a", "b", "c"],
            {"auc", "map", "f1"},
        ),
        pytest.param(
            "months;died",
            [f"{k + 1};{int(k % 3 > 0)}" for k in range(10)],
            ["--task", "survival", "--columns", "{time: months, event: died}"],
            ["below 3", "3 to 5", "5 to 6", "6 and later"],
            {"c_index"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_task_is_trained_tested_and_kept_in_the_checkpoint(
    tmp_path: Path, header: str, rows: list[str], arguments: list[str], names: list[str], metrics: set[str]
) -> None:
    write_folder(tmp_path, count=10, side=48)
    write_table(tmp_path, header, rows)
    assert main(fit(tmp_path, *arguments)) == 0
    row = last_row(tmp_path / "run")
    assert metrics == {name.removeprefix("val_") for name in row if name.startswith("val_")} - {"loss"}
    found = numbers_of(tmp_path / "run")
    assert found["test_loss"] == row["val_loss"]
    image, model = tmp_path / "images" / "im0.tif", tmp_path / "run" / "last.ckpt"
    assert main(["predict", "--checkpoint", str(model), str(image), "--out", str(tmp_path / "predicted")]) == 0
    with (tmp_path / "predicted" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        (predicted,) = csv.DictReader(file)
    classifier, _ = Classifier.from_checkpoint(model)
    with torch.no_grad():
        (expected,) = classifier.eval().predict_step([open_image(image)], 0)
    prefix = "predicted" if "regression" in arguments else "probability"
    shown = [float(predicted[f"{prefix}_{name}"]) for name in names]
    assert shown == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    chosen = {"regression": [], "multilabel": [n for n, p in zip(names, shown, strict=True) if p >= 0.5]}
    assert predicted["predicted"] == ";".join(chosen.get(arguments[1], [names[int(expected.argmax())]]))
    (result,) = ImageClassificationInferencer(model)(image)
    row = {
        column: value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
        for column, value in result["row"].items()
    }
    assert {column: predicted[column] if column == "predicted" else float(predicted[column]) for column in row} == row
    several = arguments[1] != "survival"
    assert result["pred_class"] == (chosen[arguments[1]] if several else predicted["predicted"])
    classifier, checkpoint = Classifier.from_checkpoint(tmp_path / "run" / "best.ckpt")
    assert checkpoint["LabelledImages"]["target"] == classifier.target
    assert classifier.class_names == names
    assert classifier.eval().predict_step(torch.rand(2, 3, 64, 64), 0).shape == (2, len(names))


def test_a_model_of_components_learns_several_labels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, count=6, side=48)
    write_table(tmp_path, "label", ["b|a", "a", "-", "b", "a", "-"])
    head = {"type": "MultiLabelLinearClsHead", "num_classes": 2, "in_channels": 8}
    stages = {"stem_channels": 4, "base_channels": 4, "num_stages": 2, "out_indices": [1]}
    model = {
        "type": "ImageClassifier",
        "backbone": {"type": "ResNet", "depth": 18, **stages},
        "neck": {"type": "GlobalAveragePooling"},
        "head": head,
    }
    data = {"type": "LabelledImages", "task": "multilabel", "separator": "|"}
    config = {"model": model, "data": data, "trainer": {"max_epochs": 1}}
    places = ("--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels.csv"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    line = ["fit", "--config", str(tmp_path / "config.yaml"), *places, "--out", str(tmp_path / "run")]
    assert main([*line, f"model.head={json.dumps({**head, 'type': 'LinearClsHead'})}"]) == 2
    assert "data.task=multilabel does not go with a LinearClsHead" in capfd.readouterr().err
    assert main(line) == 0
    assert 0 < last_row(tmp_path / "run")["val_loss"] < 5
    assert main(["visualize", "tsne", "--run", str(tmp_path / "run")]) == 2
    assert "data.task=multilabel has no classes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "regression"], "age is 'young', expected a number"),
        (["--task", "multilabel"], "age is 'young', expected 0 or 1, or give separator=';'"),
        (["--separator", ";"], "separator=';' is what stands between the labels in a cell, for task=multilabel"),
        (["data.columns.label=[age, size]"], "columns.label names 2 columns, and task=classification takes one"),
        (["--task", "survival"], "columns.label: there is no 'label' for task=survival"),
        (
            ["--task", "regression", "data.columns.label=size", "metrics=[{type: Accuracy}]"],
            "the metrics of the configuration",
        ),
        (["model.target={task: regression}"], "target"),
    ],
)
def test_a_task_that_does_not_fit_the_table_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_folder(tmp_path, count=4, side=48)
    write_table(tmp_path, "age;size", ["young;1", "old;2", "old;3", "young;4"])
    assert main(fit(tmp_path, "--columns", "{label: age}", *arguments)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
