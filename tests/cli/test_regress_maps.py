"""`widefield fit --task regression --targets`, and `test` and `predict` of what it trained."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import widefield
from tests.label_files import write_paired, write_segmented
from widefield.cli import main
from widefield.images import open_image
from widefield.models import MapRegressor


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("regress")
    write_paired(folder)
    places = ("--images", str(folder / "images"), "--targets", str(folder / "targets"), "--out", str(folder / "run"))
    net = (
        "--model",
        "timm/test_resnet",
        "--tile-size",
        "48",
        "--crop",
        "48",
        "--augment",
        "flips",
        "--batch-size",
        "2",
    )
    assert main(["fit", "--task", "regression", *places, *net, "--epochs", "1", "--lr", "0.01", "model.loss=l2"]) == 0
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predicted_maps_are_those_of_plain_pytorch_in_the_units_of_the_targets_and_test_measures_them(
    trained: Path, tmp_path: Path
) -> None:
    run = trained / "run"
    assert set(rows(run / "history.csv")[0]) >= {"train_loss", "val_loss", "val_mae", "val_rmse", "val_r2"}
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Maps of validation images" in report and report.count("data:image/") == 1
    assert main(["test", "--run", str(run), "--out", str(tmp_path / "numbers.json")]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "numbers.json").read_text())
    (row,) = (row for row in rows(run / "split.csv") if row["split"] == "val")
    out, checkpoint = tmp_path / "predicted", str(run / "last.ckpt")
    assert main(["predict", "--checkpoint", checkpoint, "--out", str(out), "--tile-size", "32", row["image"]]) == 0
    ((written),) = (out / one["overlay"] for one in rows(out / "predictions.csv"))
    values, true = open_image(written).read(0, 0, 64, 72), open_image(row["target"]).read(0, 0, 64, 72)
    assert written.name.endswith(".map.ome.tif") and values.dtype == np.float32
    model, content = MapRegressor.from_checkpoint(checkpoint)
    assert content["hyper_parameters"]["target"]["mean"][0] == pytest.approx(100, abs=3)
    image = torch.from_numpy(open_image(row["image"]).read(0, 0, 64, 72))[None]
    with torch.no_grad():
        expected = model.network.eval()(model.stream_network.normalisation.apply(image, torch.float32))[0]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    error = values.astype(np.float64) - true
    assert found["test_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert found["test_rmse"] == pytest.approx(np.sqrt(np.square(error).mean()), rel=1e-4)
    assert found["test_r2"] == pytest.approx(1 - np.square(error).mean() / true.astype(np.float64).var(), rel=1e-3)
    assert found["test_loss"] == pytest.approx(np.square(error).mean(), rel=1e-4)


def test_a_saved_folder_gives_the_same_model(trained: Path, tmp_path: Path) -> None:
    model = widefield.get_model(widefield.save_pretrained(trained / "run", tmp_path / "saved"))
    expected, _ = MapRegressor.from_checkpoint(trained / "run" / "best.ckpt")
    assert isinstance(model, MapRegressor) and model.target == expected.target
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    torch.testing.assert_close(model.network.std, expected.network.std)


def test_a_described_regressor_is_trained_tested_and_predicts(tmp_path: Path) -> None:
    write_paired(tmp_path, 3)
    backbone = {
        "type": "TimmBackbone",
        "name": "test_resnet",
        "features_only": True,
        "out_indices": [0],
        "in_channels": 1,
    }
    head = {"type": "PyramidHead", "num_classes": 1, "in_channels": [32], "width": 8}
    data = {"type": "PairedImages", "images": str(tmp_path / "images"), "targets": str(tmp_path / "targets")}
    model = {"type": "DenseRegressor", "backbone": backbone, "head": head, "loss": "l1", "tile_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "data": data, "trainer": {"max_epochs": 1}}))
    run, out = tmp_path / "run", tmp_path / "predicted"
    assert main(["fit", "--config", str(tmp_path / "config.json"), "--out", str(run)]) == 0
    assert main(["test", "--run", str(run), "--out", str(tmp_path / "numbers.json")]) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["test_mae"] == pytest.approx(numbers["test_loss"], rel=1e-5)
    image = str(tmp_path / "images" / "im0.tif")
    assert main(["predict", "--checkpoint", str(run / "last.ckpt"), "--out", str(out), image]) == 0
    assert open_image(out / "im0.tif.map.ome.tif").shape == (1, 32, 36), "the map of the network, at its stride"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "segment", "--masks", "MASKS"], "--targets is for maps of numbers; add --task regression"),
        (
            ["--task", "regression", "--class-weights", "balanced"],
            "--class-weights is for label maps; add --task segment",
        ),
        (["--task", "regression", "model.loss=dice"], "got 'dice', expected one of 'l1', 'l2', 'huber'"),
        (["model.type=Segmenter", "data.type=PairedImages"], "--targets is for maps of numbers"),
    ],
)
def test_what_does_not_belong_to_the_task_is_one_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_paired(tmp_path, 2)
    given = [str(tmp_path / "targets") if one == "MASKS" else one for one in arguments]
    places = (
        "--images",
        str(tmp_path / "images"),
        "--targets",
        str(tmp_path / "targets"),
        "--out",
        str(tmp_path / "run"),
    )
    assert main(["fit", *places, "--model", "timm/test_resnet", *given]) == 2
    shown = capfd.readouterr().err
    assert message in " ".join(shown.split()) and "Traceback" not in shown


def test_data_of_another_task_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_segmented(tmp_path, 2)
    network = {"type": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 1, "kernel_size": 1}
    model = {"type": "widefield.modules.DenseModule", "network": network, "num_classes": 1, "task": "regression"}
    data = {"type": "SegmentedImages", "images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "data": data}))
    assert main(["fit", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
    shown = " ".join(capfd.readouterr().err.split())
    assert (
        "the data gives label maps, which a DenseModule does not learn here; give model.type=DenseClassifier" in shown
    )
