"""`widefield fit` and `widefield predict` leave out the background of slides, and say so."""

import contextlib
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.slides import write_blank_slide
from tests.streaming.masked import foreground, masked
from widefield.cli import main
from widefield.images import ForegroundChoice, open_image
from widefield.models import Classifier


def fit(folder: Path, out: Path, *more: str) -> int:
    named = ["--images", str(folder / "images"), "--labels", str(folder / "labels.csv"), "--out", str(out)]
    small = ["--model", "resnet10_w16", "--tile-size", "256", "--epochs", "1", "data.val_fraction=0.5"]
    return main(["fit", *named, *small, "trainer.enable_progress_bar=false", *more])


def predictions(run: Path, out: Path, *more: str) -> list[dict[str, str]]:
    main(["predict", "--checkpoint", str(run / "last.ckpt"), "--heatmap", "tiff", "--out", str(out), *more])
    with (out / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides, an eighth of each tissue."""
    folder, rows = tmp_path_factory.mktemp("slides"), ["image,label"]
    for index in range(4):
        start = 300 + 800 * index
        write_blank_slide(folder / "images" / f"{index}.tif", tissue=slice(start, start + 512), shift=index % 2)
        rows.append(f"{index},{'ab'[index % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and what was said of it."""
    out, said = tmp_path_factory.mktemp("run") / "run", io.StringIO()
    with contextlib.redirect_stderr(said):
        assert fit(folder, out) == 0
    return out, " ".join(said.getvalue().split())


@pytest.fixture
def run(trained: tuple[Path, str]) -> Path:
    return trained[0]


def test_slides_are_predicted_over_their_foreground_as_they_were_trained(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    path = folder / "images" / "1.tif"
    (row,) = predictions(run, tmp_path / "p", str(path))
    assert 0.6 < float(row["skipped"]) < 0.9
    assert 1100 - 64 <= int(row["peak_x"]) < 1100 + 512 + 64
    model, _ = Classifier.from_checkpoint(run / "last.ckpt")
    image = open_image(path)
    found = ForegroundChoice().of(image)
    assert found is not None and model.eval().double()
    cells = torch.from_numpy(found.mask.cells)[None]
    pixels, fill = torch.from_numpy(image.read(0, 0, 64, 4096))[None], torch.tensor(found.fill).view(3, 1, 1)
    used = model.stream_network.normalisation
    filled = used.apply(torch.where(foreground(cells, (64, 4096)), pixels, fill).to(torch.uint8), torch.float64)
    fill = used.apply(fill[None].to(torch.uint8), torch.float64)[0]
    with torch.no_grad():
        logits = masked(nn.Sequential(model.stream_network.module, model.head), filled, cells, fill)
    expected = logits.softmax(1)[0].numpy()
    np.testing.assert_allclose([float(row[f"probability_{name}"]) for name in "ab"], expected, atol=1e-4)
    (whole,) = predictions(run, tmp_path / "whole", str(path), "--foreground", "none")
    assert whole["skipped"] == "0" and whole["probability_a"] != row["probability_a"]


def test_an_image_without_foreground_has_a_row_with_the_reason_and_stops_a_training_at_its_start(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blank = write_blank_slide(tmp_path / "blank" / "0.tif", side=256, tissue=slice(0, 0))
    rows = predictions(run, tmp_path / "p", str(blank), str(folder / "images" / "1.tif"), "--foreground", "otsu")
    assert "0.tif has no foreground by otsu" in rows[0]["error"] and not rows[1]["error"]
    (row,) = predictions(run, tmp_path / "auto", str(blank))
    assert (row["error"], row["skipped"]) == ("", "0")
    (tmp_path / "blank").rename(tmp_path / "images")
    for index in range(1, 4):
        write_blank_slide(tmp_path / "images" / f"{index}.tif", side=256, tissue=slice(90, 200))
    (tmp_path / "labels.csv").write_text((folder / "labels.csv").read_text())
    capsys.readouterr()
    assert fit(tmp_path, tmp_path / "run", "--foreground", "otsu") != 0
    assert "0.tif has no foreground by otsu" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_says_how_much_it_skips_and_keeps_the_choice(
    folder: Path, trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, said = trained
    assert "4 of 4 images have a background, 88% of their pixels, which is skipped (--foreground auto)" in said
    assert re.search("an image of 64 x 4096 pixels in 4 steps of 64 x 256, [78][0-9]% skipped", said)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["foreground"] == "auto"
    assert fit(folder, tmp_path / "run", "--foreground", "missing.geojson") != 0
    assert "missing.geojson does not exist; give auto, none, otsu, hsv" in " ".join(capsys.readouterr().err.split())
