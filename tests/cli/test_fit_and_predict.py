"""`widefield fit` and `widefield predict` on small images."""

import csv
import errno
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
import torch
import yaml

import widefield
from tests.small_images import write_folder, write_image
from widefield.cli import main, predict
from widefield.cli.history import History
from widefield.data import LabelledImages
from widefield.images import open_image
from widefield.inference import models

EPOCHS = 2


def fit(folder: Path, out: Path, *more: str, epochs: int = EPOCHS) -> int:
    return main(
        [
            "fit",
            *("--images", str(folder / "images"), "--labels", str(folder / "labels.csv"), "--out", str(out)),
            *("--model", "resnet10_w16", "--epochs", str(epochs), "--tile-size", "48", "--seed", "7"),
            *more,
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert fit(folder, out) == 0
    return out


def test_fit_in_python_trains_as_the_command_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "widefield.cli.fit_run.train", lambda config, left, resume: seen.append((config.data, left, resume))
    )
    fit(
        folder,
        tmp_path / "out",
        "--trainer.precision",
        "bf16-mixed",
        "--columns",
        "{label: label, patient: null}",
        "--task",
        "multilabel",
        "--separator",
        "|",
    )
    places = {"out": tmp_path / "out", "images": folder / "images", "labels": str(folder / "labels.csv")}
    options: dict[str, Any] = {"model": "resnet10_w16", "epochs": EPOCHS, "tile_size": 48, "seed": 7}
    options |= {"columns": {"label": "label", "patient": None}, "task": "multilabel", "separator": "|"}
    widefield.fit(**places, **options, **{"trainer.precision": "bf16-mixed"})
    assert seen[0] == seen[1]
    with pytest.raises(ValueError, match="epoch"):
        widefield.fit(**places, epoch=3)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_configuration_history_report_and_checkpoints(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "config.yaml", "history.csv", "report.html", "memory.json", "split.csv"}
    rows = read_csv(run / "history.csv")
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert {"train_loss", "train_accuracy", "train_auc", "val_loss", "val_accuracy", "val_auc"} < set(rows[0])
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_a_checkpoint_is_tensors_and_plain_data_and_carries_what_predict_needs(run: Path) -> None:
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["model_name"] == "resnet10_w16"
    assert checkpoint["hyper_parameters"]["class_names"] == ["bright", "dark"]
    assert checkpoint["LabelledImages"]["level"] == 0
    assert "stream_network.module.0.weight" in checkpoint["state_dict"]
    assert "head.2.weight" in checkpoint["state_dict"]


def test_the_split_of_a_run_is_a_label_table(run: Path, folder: Path) -> None:
    rows = read_csv(run / "split.csv")
    data = LabelledImages(folder / "images", run / "split.csv", seed=1)
    again = [LabelledImages(folder / "images", folder / "labels.csv", seed=7), data]
    assert [[image.path.name for image in one.val_set.images] for one in again] == [
        [Path(row["image"]).name for row in rows if row["split"] == "val"]
    ] * 2
    assert [row["label"] for row in rows] == ["dark", "bright"] * 4


def test_shortcuts_fill_the_configuration(run: Path, folder: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["model_name"] == "resnet10_w16"
    assert config["model"]["tile_size"] == 48
    assert config["data"]["images"] == str(folder / "images")
    assert config["data"]["seed"] == config["seed_everything"] == 7
    assert config["trainer"]["max_epochs"] == EPOCHS


def test_the_saved_configuration_repeats_the_run_and_the_command_line_wins(run: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--epochs", "1", "--out", str(tmp_path / "again"), "--config", str(run / "config.yaml")]
    assert main(arguments) == 0
    assert read_csv(tmp_path / "again" / "history.csv") == read_csv(run / "history.csv")[:1]


def test_an_interrupted_run_resumes_to_the_numbers_of_an_unbroken_one(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "broken"
    whole_epoch = History.on_train_epoch_end

    def break_off(self: History, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")
        whole_epoch(self, trainer, pl_module)

    with monkeypatch.context() as patch:
        patch.setattr(History, "on_train_epoch_end", break_off)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(folder, out)
    assert main(["fit", "--resume", "--out", str(out)]) == 0
    assert read_csv(out / "history.csv") == read_csv(run / "history.csv")
    resumed, unbroken = (torch.load(path / "last.ckpt", weights_only=True)["state_dict"] for path in (out, run))
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


def test_a_run_without_a_finished_epoch_starts_over_and_says_so(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    line = ["fit", "--resume", "--out", str(tmp_path)]
    assert main([*line, "--epochs", "1"]) == 0
    assert "no epoch of the run was finished: it starts from the beginning" in " ".join(capfd.readouterr().err.split())
    (tmp_path / "last.ckpt").unlink()
    assert main(line) == 2
    assert "best.ckpt does; put it back" in " ".join(capfd.readouterr().err.split())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_applies_or_refuses_what_is_changed(
    run: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    assert fit(folder, out, "--resume", "--batch-size", "2", "--seed", "8", epochs=EPOCHS + 1) == 2
    error = capfd.readouterr().err
    assert "data.batch_size was 1 and is 2\n" in error
    assert "data.seed was 7 and is 8\n" in error
    assert fit(folder, out, "--resume", "--lr", "0.25", epochs=EPOCHS + 1) == 0
    last = torch.load(out / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["optimizer_states"][0]["param_groups"][0]["lr"]) == (EPOCHS, 0.25)


def test_a_classifier_by_name_is_tested_on_the_images_of_its_split(run: Path, tmp_path: Path) -> None:
    line = ["test", "--run", str(run), "metrics=[{type: ConfusionMatrix}]", "--out", str(tmp_path / "numbers.json")]
    assert main(line) == 0
    found, last = json.loads((tmp_path / "numbers.json").read_text()), read_csv(run / "history.csv")[-1]
    assert found["test_loss"] == float(last["val_loss"])
    assert found["test_accuracy"] == float(last["val_accuracy"])
    assert np.sum(found["test_confusion_matrix/result"]) == 2


def test_a_classifier_by_name_is_a_model_too(run: Path, folder: Path) -> None:
    (result,) = widefield.ImageClassificationInferencer(run)(folder / "images" / "im0.tif")
    assert result["pred_class"] in ("bright", "dark")
    assert result["pred_scores"].sum() == pytest.approx(1, abs=1e-5)


def test_predictions_are_a_table_and_an_overlay_per_image(run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    images = [str(folder / "images" / name) for name in ("im0.tif", "im1.tif")]
    assert main(["predict", "--checkpoint", str(run / "best.ckpt"), *images, "--out", str(out)]) == 0
    rows = read_csv(out / "predictions.csv")
    assert [Path(row["image"]).name for row in rows] == ["im0.tif", "im1.tif"]
    for row in rows:
        probabilities = {name: float(row[f"probability_{name}"]) for name in ("bright", "dark")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == max(probabilities, key=lambda name: probabilities[name])
        assert (out / row["overlay"]).read_bytes().startswith(b"\x89PNG")
        assert int(row["peak_y"]) in (0, 32, 64)  # the cells of a ResNet
        assert float(row["peak_y_um"]) == (int(row["peak_y"]) + 0.5) / 2
        assert row["error"] == ""


def test_images_of_the_same_name_get_overlays_of_their_own(run: Path, folder: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "im0.tif", np.zeros((40, 50, 3), np.uint8))
    images = [str(folder / "images" / "im0.tif"), str(tmp_path / "im0.tif")]
    assert main(["predict", "--checkpoint", str(run / "best.ckpt"), *images, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"im0.tif.png", "im0.tif.2.png"}


def test_a_folder_is_searched_and_a_file_that_fails_loses_no_other(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images, _ = write_folder(tmp_path, count=3, side=64)
    (images / "sub").mkdir()
    (images / "im2.tif").rename(images / "sub" / "im2.SVS")
    (images / "im0.tif").write_bytes((images / "im0.tif").read_bytes()[:3000])  # an interrupted copy
    for name in ("im1.tif.aux.xml", "im1.xml", "im1.tfw", ".im1.tif"):
        (images / name).write_bytes(b"beside")
    shutil.copy(images / "im1.tif", images / "im1.tif.ovr")  # overviews are TIFF files themselves
    out = tmp_path / "out"
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), "--out", str(out)]
    assert main([*line, str(images)]) == 2
    bad, *rows = read_csv(out / "predictions.csv")
    assert Path(bad["image"]).name == "im0.tif"
    assert "cannot read" in bad["error"]
    assert bad["predicted"] == bad["probability_dark"] == ""
    assert [(Path(row["image"]).name, row["error"]) for row in rows] == [("im1.tif", ""), ("im2.SVS", "")]
    assert {path.name for path in out.glob("*.png")} == {"im1.tif.png", "im2.SVS.png"}
    assert "1 of 3 images failed:\ncannot read" in capfd.readouterr().err
    named = [
        str(path) for path in sorted(images.iterdir()) if path.is_file() and path.name[0] != "."
    ]  # as images/* does
    assert main([*line[:-1], str(tmp_path / "named"), *named]) == 2
    assert [Path(row["image"]).name for row in read_csv(tmp_path / "named" / "predictions.csv")] == [
        "im0.tif",
        "im1.tif",
    ]


def test_images_that_all_fail_have_rows_with_the_reasons(run: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no image")
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(line) == 2
    assert [set(row) for row in read_csv(tmp_path / "out" / "predictions.csv")] == [{"image", "error"}] * 2
    write_image(tmp_path / "b.png", np.zeros((40, 50, 3), np.uint8))
    assert main([*line, "--resume"]) == 2
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert [(Path(row["image"]).name, bool(row["error"]), bool(row["predicted"])) for row in rows] == [
        ("a.png", True, False),
        ("b.png", False, True),
    ]


def test_a_prediction_that_is_interrupted_goes_on_where_it_was(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []

    def draw(path: Path, *_: Any) -> None:
        if path.name.startswith("im2") and not drawn[2:]:
            raise KeyboardInterrupt
        drawn.append(path.name)

    monkeypatch.setattr(predict, "save_overlay", draw)
    table, line = (
        tmp_path / "predictions.csv",
        ["predict", "--checkpoint", str(run / "best.ckpt"), "--out", str(tmp_path)],
    )
    line.append(str(folder / "images"))
    assert main(line) == 130
    assert [Path(row["image"]).name for row in read_csv(table)] == ["im0.tif", "im1.tif"]
    finished = table.read_bytes()
    table.write_bytes(finished + finished.splitlines()[-1][:-20])  # the power went while a row was written
    assert main(line) == 2
    assert "go on with it by --resume" in capfd.readouterr().err
    assert main([*line, "--resume", "--level", "1"]) == 2
    assert "was made with another level" in capfd.readouterr().err
    drawn.append("")
    assert main([*line, "--resume"]) == 0
    assert [Path(row["image"]).name for row in read_csv(table)] == [f"im{index}.tif" for index in range(8)]
    assert table.read_bytes().startswith(finished)
    assert drawn == ["im0.tif.png", "im1.tif.png", "", *(f"im{index}.tif.png" for index in range(2, 8))]
    assert main([*line, "--resume"]) == 0
    assert len(read_csv(table)) == 8


def test_a_full_disk_ends_a_prediction_at_once(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(models, "open_image", lambda path, **_: opened.append(path) or open_image(path))
    monkeypatch.setattr("widefield.writing.Path.replace", full)
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(folder / "images"), "--out", str(tmp_path / "out")]
    assert main(line) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert len(opened) == 1


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_heatmaps_are_written_in_the_formats_asked_for(run: Path, folder: Path, tmp_path: Path) -> None:
    image = folder / "images" / "im0.tif"
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(image), "--out", str(tmp_path)]
    assert main([*line, "--heatmap", "tiff,geojson", "--thresholds", "0.3,0.6", "--level", "1"]) == 0
    (row,) = read_csv(tmp_path / "predictions.csv")
    assert row["overlay"] == "im0.tif.ome.tif;im0.tif.geojson"
    heatmap = open_image(tmp_path / "im0.tif.ome.tif")
    assert (heatmap.shape, heatmap.spacing) == ((1, 3, 3), (16.0, 16.0))  # half a cell of 64 pixels of 0.5 µm
    found = json.loads((tmp_path / "im0.tif.geojson").read_text())
    assert {feature["properties"]["classification"]["name"] for feature in found["features"]} == {row["predicted"]}
    with pytest.raises(SystemExit):
        main([*line, "--heatmap", "jpeg"])
    with pytest.raises(SystemExit):
        main([*line, "--thresholds", "50"])


def test_the_heatmap_of_a_map_is_a_geotiff_without_what_holds_no_data(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 256, 192), dtype=np.uint8)
    pixels[:, :, 96:] = 0
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000), "nodata": 0}
    shape = {"height": 256, "width": 192, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", **shape, **place) as file:
        file.write(pixels)
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(tmp_path / "scene.tif"), "--out", str(tmp_path)]
    assert main([*line, "--heatmap", "png,tiff"]) == 0
    (row,) = read_csv(tmp_path / "predictions.csv")
    assert row["overlay"] == "scene.tif.png;scene.tif.tif"
    with rasterio.open(tmp_path / "scene.tif.tif") as file:
        evidence = file.read(1)
        assert np.isnan(evidence).tolist() == [[False] * 3 + [True] * 3] * 8  # cells of 32 pixels, from pixel 0 on
        peak = file.index(float(row["peak_x_map"]), float(row["peak_y_map"]))
        assert evidence[peak] == np.nanmax(evidence)


def test_without_rasterio_a_heatmap_of_a_map_says_so_before_computing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    extra = [(33550, "d", 3, (10, 10, 0)), (33922, "d", 6, (0, 0, 0, 5e5, 5e6, 0))]
    tifffile.imwrite(tmp_path / "scene.tif", np.ones((64, 64, 3), np.uint8), photometric="rgb", extratags=extra)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setattr("widefield.cli.predict._predict", None)
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(tmp_path / "scene.tif"), "--out", str(tmp_path)]
    assert main([*line, "--heatmap", "tiff"]) == 2
    assert (
        "(GeoTIFF) needs rasterio, which is not installed; run: pip install 'widefield[geo]'" in capfd.readouterr().err
    )


def no_images(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        path.unlink()


def unreadable_image(folder: Path) -> None:
    (folder / "images" / "im3.tif").write_bytes(b"not an image")


def missing_image(folder: Path) -> None:
    (folder / "images" / "im3.tif").unlink()


def one_grey_image(folder: Path) -> None:
    (folder / "images" / "im3.tif").unlink()
    write_image(folder / "images" / "im3.png", np.zeros((40, 40), np.uint8))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (no_images, [], "is empty"),
        (unreadable_image, [], "im3.tif"),
        (missing_image, [], "im3 (line 5)"),
        (one_grey_image, [], "im0.tif has 3 channel(s) and im3.png has 1"),
        (None, ["--images", "nowhere"], "nowhere does not exist"),
        (None, ["--labels", "none.csv"], "none.csv does not exist"),
        (None, ["--model", "resnet81"], "did you mean resnet18"),
        (None, ["--weights", "gone.pth"], "gone.pth does not exist"),
        (None, ["--level", "7"], "level"),
        (None, ["--config", "gone.yaml"], "gone.yaml does not exist"),
        (None, ["--lr", "-1", "--model.no_such_thing", "1"], "no_such_thing"),
        (None, ["--tile-size", "many"], "--tile-size"),
        (None, ["--memory-budget", "1kB", "--config", "TILE"], "memory_budget"),
        (None, ["--resume"], "no run to resume"),
        (None, ["--columns", "{lable: label}"], "--columns.lable: Columns has no argument 'lable'; did you mean label"),
        (None, ["data.columns.label=grade"], "no column 'grade' (columns.label); its columns are image, label"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_no_output(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None] | None,
    arguments: list[str],
    message: str,
) -> None:
    write_folder(tmp_path / "data")
    if damage is not None:
        damage(tmp_path / "data")
    tile = tmp_path / "tile.yaml"
    tile.write_text("model:\n  tile_size: null\n")
    arguments = [str(tile) if argument == "TILE" else argument for argument in arguments]
    base = ["fit", "--images", str(tmp_path / "data" / "images"), "--labels", str(tmp_path / "data" / "labels.csv")]
    code = main([*base, "--model", "resnet10_w16", "--out", str(tmp_path / "out"), *arguments])
    error = capfd.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_a_run_with_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, count=4, side=48)
    assert fit(tmp_path, tmp_path / "out", "--lr", "1e30", epochs=1) == 2
    error = capfd.readouterr().err
    assert "(epoch 1) is NaN or infinite" in error
    assert "no epoch was finished, so there is no checkpoint" in error
    assert not list((tmp_path / "out").glob("*.ckpt"))


def test_pixels_that_are_no_numbers_count_as_background(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, _ = write_folder(tmp_path, count=4, side=48)
    for index in range(4):
        (images / f"im{index}.tif").unlink()
        pixels = np.random.default_rng(index).random((3, 48, 48), dtype=np.float32)
        pixels[:, : 10 * index] = np.nan
        np.save(images / f"im{index}.npy", pixels)
    assert fit(tmp_path, tmp_path / "out", epochs=1) == 0
    assert "pixels without data (NaN, or the value that a file names for them) count as" in " ".join(
        capfd.readouterr().err.split()
    )
    assert (
        main(["predict", "--checkpoint", str(tmp_path / "out/last.ckpt"), str(images), "--out", str(tmp_path / "p")])
        == 0
    )
    assert all(math.isfinite(float(row["probability_dark"])) for row in read_csv(tmp_path / "p/predictions.csv"))


def test_a_run_is_not_overwritten(run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit(folder, run) == 2
    assert "--resume" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "image", "message"),
    [
        ("gone.ckpt", "im0.tif", "gone.ckpt does not exist"),
        ("labels.csv", "im0.tif", "cannot be read as tensors"),
        ("RUN", "gone.tif", "gone.tif"),
        ("RUN", "bad.tif", "bad.tif"),
        ("RUN", "notes", "notes holds no image files; they end in .bif"),
    ],
)
def test_bad_input_to_predict_is_one_clear_error_and_leaves_no_output(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], checkpoint: str, image: str, message: str
) -> None:
    images, _ = write_folder(tmp_path, count=2)
    (images / "bad.tif").write_bytes(b"II*\0")
    (images / "notes").mkdir()
    (images / "notes" / "scene.tif.aux.xml").write_text("<a/>")
    path = run / "best.ckpt" if checkpoint == "RUN" else tmp_path / checkpoint
    code = main(["predict", "--checkpoint", str(path), str(images / image), "--out", str(tmp_path / "out")])
    error = capfd.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
