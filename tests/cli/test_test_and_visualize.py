"""`widefield test`, `validate`, `predict` and `visualize` with models of components."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from skimage import data, io

from tests.inference.small_runs import cifar_config, write_run
from widefield.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    return write_run(folder, cifar_config(folder))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(verb: str, *arguments: str, out: Path) -> dict[str, Any]:
    assert main([verb, *arguments, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_test_gives_the_metrics_of_the_last_validation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = read_csv(run / "history.csv")[-1]
    for verb, prefix in (("test", "test_"), ("validate", "val_")):
        found = numbers(verb, "--run", str(run), out=tmp_path / "numbers.json")
        for name in ("loss", "accuracy/top1", "accuracy/top2", "accuracy_top-1", "multi-label/mAP"):
            assert found[prefix + name] == float(last[f"val_{name}"])
        assert np.sum(found[f"{prefix}confusion_matrix/result"]) == 8
        assert f"{prefix}loss" in capsys.readouterr().out
    again = ("--config", str(run / "config.yaml"), "--checkpoint", str(run / "last.ckpt"), "data.batch_size=3")
    found = numbers("test", *again, "metrics=[{type: Accuracy}]", out=tmp_path / "numbers.json")
    assert found["test_accuracy/top1"] == float(last["val_accuracy/top1"])
    assert "test_accuracy/top2" not in found


def test_metrics_of_averaged_views_are_those_of_averaged_scores(run: Path, tmp_path: Path) -> None:
    found = numbers("test", "--run", str(run), "--tta", "hflip,crop=24", out=tmp_path / "numbers.json")
    assert 0 <= found["test_accuracy/top1"] <= 100
    assert np.sum(found["test_confusion_matrix/result"]) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which model? name the folder of a run"),
        (("--run", "nowhere"), "there is no run in nowhere"),
        (("--run", "RUN", "--checkpoint", "gone.ckpt"), "gone.ckpt does not exist"),
        (("--run", "RUN", "--checkpoint", "RUN/config.yaml"), "cannot be read as tensors"),
        (("--run", "RUN", "model.head.num_class=3"), "there is no 'num_class'; did you mean num_classes"),
        (("--run", "RUN", "model.head.num_classes=3"), "is no checkpoint of this model"),
        (("--run", "RUN", "metrics=[{type: Acuracy}]"), "no metric named 'Acuracy'; did you mean Accuracy"),
        (("--run", "RUN", "metrics.0.topk=[five]"), "metrics.0.topk.0: got 'five', expected int"),
        (("--run", "RUN", "metrics.0.topk=[3]"), "Top-3 accuracy is unavailable since the number of categories is 2"),
        (("--run", "RUN", "data.val=null"), "there are no images to test with"),
        (("--run", "RUN", "--tta", "flip"), "got 'flip'; give hflip, vflip and crop=SIDE"),
        (("--run", "RUN", "data.val.type=ImageFold"), "no dataset named 'ImageFold'; did you mean ImageFolder"),
        (("--run", "RUN", "data.val.transforms=[{type: Resize, sizes: 3}]"), "Resize has no argument 'sizes'"),
    ],
)
def test_bad_input_to_test_is_one_clear_error(
    run: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["test", *(argument.replace("RUN", str(run)) for argument in arguments)]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_of_components_predicts_with_heatmaps(run: Path, tmp_path: Path) -> None:
    io.imsave(tmp_path / "astronaut.png", data.astronaut()[:64, :96], check_contrast=False)
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(tmp_path / "astronaut.png")]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    (row,) = read_csv(tmp_path / "out" / "predictions.csv")
    assert set(row) >= {"probability_airplane", "probability_automobile", "predicted"}
    assert (tmp_path / "out" / row["overlay"]).read_bytes().startswith(b"\x89PNG")
    assert 0 <= int(row["peak_y"]) < 64
    assert main([*line, "--tta", "hflip", "--out", str(tmp_path / "flipped")]) == 0
    (flipped,) = read_csv(tmp_path / "flipped" / "predictions.csv")
    assert flipped["probability_airplane"] != row["probability_airplane"]


def test_the_heatmap_is_that_of_the_class_that_averaged_views_predict(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io.imsave(tmp_path / "cat.png", data.chelsea()[:64, :64], check_contrast=False)
    explained: list[int | None] = []

    def explain(model: Any, picture: Any, layer: str | None = None, class_index: int | None = None) -> None:
        explained.append(class_index)

    monkeypatch.setattr("widefield.cli.predict.explain", explain)
    line = ["predict", "--checkpoint", str(run / "best.ckpt"), str(tmp_path / "cat.png"), "--tta", "hflip"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    (row,) = read_csv(tmp_path / "out" / "predictions.csv")
    assert explained == [("airplane", "automobile").index(row["predicted"])]


def test_a_model_that_has_no_map_predicts_without_heatmaps(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    io.imsave(tmp_path / "cat.png", data.chelsea(), check_contrast=False)
    config = yaml.safe_load((run.parent / "config.yaml").read_text())
    config["model"] = {
        "type": "ImageClassifier",
        "backbone": {"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 4, 8]}},
        "head": {"type": "LinearClsHead", "num_classes": 2, "in_channels": 8},
    }
    config["data"]["val"]["transforms"] = [{"type": "Resize", "size": [32, 32]}]
    config["trainer"]["max_epochs"] = 1
    line = ["predict", "--checkpoint", str(write_run(tmp_path, config) / "best.ckpt"), str(tmp_path / "cat.png")]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    (row,) = read_csv(tmp_path / "out" / "predictions.csv")
    assert (row["overlay"], row["peak_y"]) == ("", "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.csv", "predictions.json"}
    assert main([*line, "--heatmap", "geojson", "--out", str(tmp_path / "other")]) == 2
    assert "the transforms of the run change images" in capfd.readouterr().err


def test_a_head_of_fewer_classes_than_the_data_has_is_refused(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["fit", "--config", str(run.parent / "config.yaml"), "--out", str(tmp_path / "out"), "--seed", "5"]
    assert main([*line, "model.head.num_classes=1"]) == 2
    assert "the data has 2 classes, and model.head.num_classes=1" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*line, "trainer.max_epochs=1"]) == 0
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["data"]["init_args"]["seed"] == 5


def test_evidence_is_drawn_at_any_layer(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    io.imsave(tmp_path / "cat.png", data.chelsea()[:64, :64], check_contrast=False)
    line = ["visualize", "cam", str(tmp_path / "cat.png"), "--checkpoint", str(run), "--out", str(tmp_path / "cam")]
    for more in ([], ["--layer", "backbone.layer1"], ["--layer", "backbone.layer1.0.conv1", "--class", "automobile"]):
        assert main([*line, *more]) == 0
        assert (tmp_path / "cam" / "cat.png.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "cam" / "cat.png.png").unlink()
    (tmp_path / "more").mkdir()
    for name in ("a.png", "b.png"):
        io.imsave(tmp_path / "more" / name, data.chelsea()[:64, :64], check_contrast=False)
    (tmp_path / "more" / "a.png").write_bytes(b"no image")
    assert main(["visualize", "cam", str(tmp_path / "more"), *line[3:]]) == 2
    assert "1 of 2 images failed" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "cam").iterdir()] == ["b.png.png"]
    for more, message in (
        (["--layer", "backbone.layer9"], "there is no layer 'backbone.layer9'"),
        (["--layer", "head.fc"], "the image does not run through head.fc"),
        (["--class", "cat"], "there is no class 'cat'; the classes are airplane, automobile"),
        (["--class", "7"], "there is no class 7; there are 2"),
    ):
        assert main([*line, *more]) == 2
        assert message in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*line, "nonsense=1"])
    assert "unknown arguments: nonsense=1" in capfd.readouterr().err


def test_features_schedules_and_confusions_are_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["visualize", "tsne", "--run", str(run), "--stage", "pre_logits", "--split", "train"]) == 0
    assert main(["visualize", "confusion", "--run", str(run), "--out", "matrix.png"]) == 0
    assert main(["visualize", "schedule", "--config", "resnet18_cifar", "trainer.max_epochs=20"]) == 0
    for name in ("tsne.png", "matrix.png", "schedule.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    for line, message in (
        (["tsne", "--run", str(run), "--split", "test"], "there are no test images; choose others with --split"),
        (["tsne", "--run", str(run), "--perplexity", "99"], "perplexity=99.0 must be positive and below 8"),
        (["tsne", "--run", str(run), "--count", "2"], "t-SNE of 2 images shows nothing"),
        (["schedule", "--config", "resnet18_cifar", "lr_scheduler.gama=3"], "there is no 'gama'; did you mean gamma"),
        (["schedule", "--config", "resnet18_cifar", "optimizer=null"], "the configuration has no optimizer"),
    ):
        assert main(["visualize", *line]) == 2
        assert message in capfd.readouterr().err
