"""The demo's images and its report; the whole demo is a slow test."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from widefield.cli import demo_images as composition
from widefield.cli import main
from widefield.cli.demo_images import (
    CLUSTER_RADIUS,
    CLUSTERS,
    SIDE,
    SPACING,
    THUMBNAIL,
    compose,
    load_photograph,
    make_images,
)
from widefield.images import open_image


def flat_image(monkeypatch: pytest.MonkeyPatch, speckled: bool) -> composition.Composition:
    """An image of the class on a flat background, with the randomness that both classes share."""
    monkeypatch.setattr(composition, "SIDE", 1536)
    monkeypatch.setattr(composition, "_background", lambda *_: np.full((1536, 1536, 3), 120, np.float32))
    return compose(np.zeros((512, 512, 3), np.float32), speckled, np.random.default_rng(3))


def test_classes_differ_at_the_marks_and_not_in_a_thumbnail(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth, speckled = (flat_image(monkeypatch, flag) for flag in (False, True))
    assert smooth.speckled == ()
    assert len(speckled.speckled) == CLUSTERS // 2
    difference = speckled.pixels.astype(float) - smooth.pixels
    rows, columns = np.nonzero(np.abs(difference).max(axis=2) > 20)
    nearest = np.min([np.hypot(rows - y, columns - x) for y, x in speckled.speckled], axis=0)
    assert len(rows) > 1000
    assert nearest.max() <= CLUSTER_RADIUS + 12
    factor = SIDE // THUMBNAIL
    boxes = difference.reshape(1536 // factor, factor, 1536 // factor, factor, 3).mean(axis=(1, 3))
    assert np.abs(difference).max() > 70
    assert np.abs(boxes).max() < 25
    assert np.abs(boxes).sum() < 0.2 * np.abs(difference).sum() / factor**2


def test_the_seed_decides_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "SIDE", 1024)
    photograph = load_photograph()
    one, same, other = (compose(photograph, True, np.random.default_rng(seed)).pixels for seed in (0, 0, 1))
    assert one.shape == (1024, 1024, 3)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_images_are_pyramids_with_spacing_and_a_label_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "SIDE", 1024)
    done: list[int] = []
    made = make_images(tmp_path / "data", 2, seed=0, done=lambda: done.append(1))
    assert len(done) == 2
    assert [image.label for image in made] == ["smooth", "speckled"]
    image = open_image(tmp_path / "data" / "images" / "image-001.tif")
    assert image.shape == (3, 1024, 1024)
    assert len(image.levels) > 1
    assert image.spacing == pytest.approx((SPACING, SPACING))
    assert open_image(tmp_path / "data" / "thumbnails" / "image-001.png").shape == (3, THUMBNAIL, THUMBNAIL)
    with (tmp_path / "data" / "labels.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["smooth", "speckled"]


def test_without_scikit_image_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "widefield[demo]" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "already exists" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_demo_learns_what_its_thumbnails_lose(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    shown = capfd.readouterr().err
    full, small = re.search(r"full resolution ([\d.]+), on thumbnails of 192 pixels ([\d.]+)", shown).groups()  # type: ignore[union-attr]
    hits, positives = re.search(r"on a mark in (\d+) of (\d+)", shown).groups()  # type: ignore[union-attr]
    assert float(full) >= 0.8
    assert 0.25 <= float(small) <= 0.75
    assert int(hits) > int(positives) / 2
    assert (tmp_path / "demo" / "report.html").is_file()
