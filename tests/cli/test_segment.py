"""`widefield fit --task segment`, and `test` and `predict` of what it trained."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import widefield
from tests.label_files import write_segmented
from widefield.cli import main
from widefield.images import open_image
from widefield.models import Segmenter

NAMES = ["background", "red", "green"]


def fit(folder: Path, *more: str) -> list[str]:
    places = ("--images", str(folder / "images"), "--masks", str(folder / "masks"), "--out", str(folder / "run"))
    return ["fit", "--task", "segment", *places, "--model", "timm/test_resnet", "--tile-size", "48", *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segment")
    write_segmented(folder, palette=True)
    classes = (
        "--classes",
        "[background, red, green]",
        "model.loss=dice",
        "--lr",
        "0.01",
        "--class-weights",
        "balanced",
    )
    assert main(fit(folder, *classes, "--epochs", "1", "--crop", "48", "--batch-size", "2")) == 0
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_scores_a_report_and_a_checkpoint(trained: Path) -> None:
    (row,) = rows(trained / "run" / "history.csv")
    scores = {f"val_{name}" for name in ("loss", "mean_iou", "dice", "accuracy", *(f"iou_{one}" for one in NAMES))}
    assert set(row) == {"epoch", "train_loss", "train_loss_min", "train_loss_max"} | scores
    report = (trained / "run" / "report.html").read_text(encoding="utf-8")
    assert "Confusion matrix" in report and "Learning curves" in report and report.count("data:image/") == 2
    model, checkpoint = Segmenter.from_checkpoint(trained / "run" / "best.ckpt")
    train = [Path(row["mask"]) for row in rows(trained / "run" / "split.csv") if row["split"] == "train"]
    labels = np.concatenate([np.asarray(PIL.Image.open(path)) for path in train])
    counts = np.bincount(labels[labels < 3])
    assert checkpoint["class_weights"] == pytest.approx(counts.sum() / (3 * counts))
    assert f"Class weights of the loss: background {checkpoint['class_weights'][0]:.4g}, red " in report
    assert model.class_names == NAMES and checkpoint["hyper_parameters"]["loss"] == "dice"
    assert [row["split"] for row in rows(trained / "run" / "split.csv")].count("val") == 1


def test_predicted_label_maps_are_those_of_plain_pytorch_and_their_scores_are_those_of_test(
    trained: Path, tmp_path: Path
) -> None:
    run = trained / "run"
    assert main(["test", "--run", str(run), "--out", str(tmp_path / "numbers.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "numbers.json").read_text())
    (tested,) = (Path(row["image"]) for row in rows(run / "split.csv") if row["split"] == "val")
    out = tmp_path / "predicted"
    checkpoint = str(run / "last.ckpt")
    assert main(["predict", "--checkpoint", checkpoint, "--out", str(out), "--tile-size", "32", str(tested)]) == 0
    (row,) = rows(out / "predictions.csv")
    label_map, overlay = row["overlay"].split(";")
    labels = open_image(out / label_map).read(0, 0, 64, 72)[0]
    model, _ = Segmenter.from_checkpoint(checkpoint)
    image = torch.from_numpy(open_image(tested).read(0, 0, 64, 72))[None]
    normalisation = model.stream_network.normalisation
    with torch.no_grad():
        logits = model.network.eval()(normalisation.apply(image, torch.float32))[0]
    two = logits.topk(2, dim=0).values
    sure = (two[0] - two[1] > 1e-4).numpy()  # elsewhere rounding decides
    np.testing.assert_array_equal(labels[sure], logits.argmax(0).numpy()[sure])
    assert sure.mean() > 0.99 and (out / overlay).stat().st_size > 1000
    for k, name in enumerate(NAMES):
        assert float(row[f"share_{name}"]) == pytest.approx(float((labels == k).mean()), abs=1e-5)
    true = open_image(trained / "masks" / tested.name, channels=[0]).read(0, 0, 64, 72)[0]  # of the palette: the index
    counts = [[int(((true == t) & (labels == p)).sum()) for p in range(3)] for t in range(3)]
    np.testing.assert_allclose(found["test_confusion_matrix"], counts, atol=int((~sure).sum()))
    assert np.sum(found["test_confusion_matrix"]) == 63 * 72


MODELS: dict[str, dict[str, Any]] = {
    "a network by its import path": {
        "type": "widefield.modules.DenseModule",
        "network": {"type": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 3, "kernel_size": 3, "padding": 1},
        "num_classes": 3,
    },
    "components": {
        "type": "DenseClassifier",
        "backbone": {"type": "TimmBackbone", "name": "test_resnet", "features_only": True, "out_indices": [0, 1]},
        "head": {"type": "PyramidHead", "num_classes": 3, "in_channels": [32, 32], "width": 8},
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_described_model_is_trained_tested_and_predicts(tmp_path: Path, kind: str) -> None:
    write_segmented(tmp_path)
    model = {**MODELS[kind], "loss": {"type": "DiceLoss", "whole_batch": True}, "tile_size": 40}
    data = {
        "type": "SegmentedImages",
        "images": str(tmp_path / "images"),
        "masks": str(tmp_path / "masks"),
        "classes": NAMES,
    }
    config = {"model": model, "data": data, "trainer": {"max_epochs": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run, out = tmp_path / "run", tmp_path / "predicted"
    assert main(["fit", "--config", str(tmp_path / "config.json"), "--out", str(run)]) == 0
    assert main(["test", "--run", str(run), "--out", str(tmp_path / "numbers.json")]) == 0
    assert np.sum(json.loads((tmp_path / "numbers.json").read_text())["test_confusion_matrix"]) == 63 * 72
    image = str(tmp_path / "images" / "im0.png")
    assert main(["predict", "--checkpoint", str(run / "last.ckpt"), "--out", str(out), "--tile-size", "32", image]) == 0
    (row,) = rows(out / "predictions.csv")
    assert sum(float(row[f"share_{name}"]) for name in NAMES) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "fcn_resnet55"], "there is no model 'fcn_resnet55'"),
        (["--model", "timm/mixer_s32_224"], "Input height (64) doesn't match model (224)"),
        (["--masks", "nowhere"], "the folder of label maps nowhere does not exist; check --masks"),
        (["--classes", "[a, b]"], "the label 2 is neither a class, from 0 to 1, nor ignore_index=255"),
        (["--task", "classification"], "--masks is for label maps; add --task segment"),
        (["model.loss=dicee"], "dicee"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_segmented(tmp_path, 2)
    assert main(fit(tmp_path, "--epochs", "1", *arguments)) == 2
    shown = capfd.readouterr().err
    assert message in " ".join(shown.split()) and "Traceback" not in shown


def test_lists_of_python_are_taken_as_those_of_the_command_line(tmp_path: Path) -> None:
    given = {"images": tmp_path / "none", "masks": tmp_path / "none", "classes": ["cell", "gland"], "channels": [0, 2]}
    with pytest.raises(FileNotFoundError, match="none does not exist; check --images"):
        widefield.fit(out=tmp_path / "run", task="segment", model="resnet10_w16", **given)
