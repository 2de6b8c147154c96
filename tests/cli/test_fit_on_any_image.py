"""`widefield fit` on images of any type, number of channels and spacing, from the plain command line."""

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from widefield.cli import main
from widefield.cli.configuration import _from_flags
from widefield.config import load
from widefield.data import LabelledImages
from widefield.data.statistics import pixel_statistics
from widefield.images import open_image
from widefield.models import Classifier


def write_folder(folder: Path, dtype: str, channels: int, scale: float, count: int = 6) -> list[str]:
    """Images of spacing 0.5, dark or bright, two of each patient; the arguments that name them."""
    random, rows = np.random.default_rng(0), ["slide_id,label,case_id"]
    (folder / "images").mkdir(parents=True)
    for index in range(count):
        pixels = (random.random((96, 80, channels)) * (0.5 + 0.5 * (index // 2 % 2)) * scale).astype(dtype)
        options = {"resolution": (20_000, 20_000), "resolutionunit": "centimeter", "metadata": None}
        if channels > 1:
            options["planarconfig"] = "contig"
        else:
            pixels = pixels[..., 0]
        tifffile.imwrite(folder / "images" / f"im{index}.tif", pixels, photometric="minisblack", **options)
        rows.append(f"im{index},{('dark', 'bright')[index // 2 % 2]},p{index // 2}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return ["--images", str(folder / "images"), "--labels", str(folder / "labels.csv")]


@pytest.mark.parametrize(
    ("dtype", "channels", "scale", "more", "expected"),
    [
        ("u1", 1, 255, [], (1, None)),
        ("u2", 5, 4095, ["--spacing", "1.0"], (5, "percentiles")),
        pytest.param("u2", 5, 65_535, ["--channels", "4,0"], (2, None), marks=pytest.mark.slow),
        ("f4", 4, 1e4, ["--level", "0"], (4, "percentiles")),
        pytest.param("u1", 3, 100, ["--value-range", "percentiles"], (3, "percentiles"), marks=pytest.mark.slow),
    ],
)
def test_images_of_any_kind_are_trained_on_and_predicted(tmp_path, dtype, channels, scale, more, expected, caplog):
    named = write_folder(tmp_path / "data", dtype, channels, scale)
    out = tmp_path / "run"
    arguments = ["--model", "resnet10_w16", "--epochs", "1", "--tile-size", "64", "--out", str(out), *named, *more]
    with caplog.at_level(logging.INFO):
        assert main(["fit", *arguments]) == 0
    model, checkpoint = Classifier.from_checkpoint(out / "last.ckpt")
    used = model.stream_network.normalisation
    assert model.stream_network.module[0].in_channels == expected[0]
    data = checkpoint["LabelledImages"]
    images = [
        open_image(path, level=data["level"], spacing=data["spacing"], channels=data["channels"])
        for path in sorted((tmp_path / "data" / "images").iterdir())
    ]
    assert images[0].shape[0] == expected[0]
    every = np.concatenate([image.read(0, 0, *image.shape[1:]).ravel() for image in images])
    if expected[1] == "percentiles":
        assert used.value_range == pytest.approx(
            tuple(np.percentile(every, (0.1, 99.9))), abs=0.05 * float(every.max())
        )
    else:
        assert used.value_range == expected[1]
    seen = torch.cat(
        [used.apply(torch.from_numpy(i.read(0, 0, *i.shape[1:])), torch.float32).flatten(1) for i in images], 1
    )
    assert seen.mean(1).abs().max() < 0.3 and (seen.std(1) - 1).abs().max() < 0.2  # the validation images are in it
    assert (
        main(["predict", "--checkpoint", str(out / "last.ckpt"), str(images[0].path), "--out", str(tmp_path / "p")])
        == 0
    )
    assert "nan" not in (tmp_path / "p" / "predictions.csv").read_text()


def test_all_images_of_a_patient_are_on_one_side_and_the_split_is_written(tmp_path):
    named = write_folder(tmp_path / "data", "u1", 3, 255, count=20)
    data = LabelledImages(Path(named[1]), Path(named[3]), val_fraction=0.4)
    rows = data.split_rows()
    sides = {
        patient: {row["split"] for row in rows if row["case_id"] == patient} for patient in {r["case_id"] for r in rows}
    }
    assert len(rows) == 20 and len(sides) == 10
    assert all(len(one) == 1 for one in sides.values())
    assert {row["label"] for row in rows if row["split"] == "val"} == {"dark", "bright"}
    assert [row["slide_id"] for row in rows if row["split"] == "val"] == [
        str(image.path) for image in data.val_set.images
    ]


def test_a_patient_on_both_sides_and_spacings_that_differ_are_said(tmp_path, caplog):
    named = write_folder(tmp_path / "data", "u1", 3, 255)
    table = tmp_path / "data" / "labels.csv"
    rows = table.read_text().splitlines()
    table.write_text(
        "\n".join([rows[0] + ",split", *(f"{row},{('train', 'val')[k % 2]}" for k, row in enumerate(rows[1:]))])
    )
    pixels = np.zeros((40, 40, 3), np.uint8)
    tifffile.imwrite(tmp_path / "data" / "images" / "im0.tif", pixels, photometric="rgb", metadata=None)
    LabelledImages(Path(named[1]), Path(named[3]))
    said = caplog.text
    assert (
        "puts images of one case_id into several splits, so that what is measured may be too good: p0, p1, p2" in said
    )
    assert "different spacings: unknown (im0.tif), 0.5 (im" in said
    with pytest.raises(ValueError, match=r"im0\.tif, which does not say its own"):
        LabelledImages(Path(named[1]), Path(named[3]), spacing=1.0)


def test_statistics_are_those_of_the_foreground_with_data(tmp_path):
    pixels = np.full((3, 600, 600), np.nan, np.float32)
    pixels[:, 100:500, 100:500] = np.random.default_rng(0).normal(7, 2, (3, 400, 400))
    np.save(tmp_path / "a.npy", pixels)
    found = pixel_statistics([open_image(tmp_path / "a.npy")], seed=0)
    assert found.mean == pytest.approx((7, 7, 7), abs=0.1) and found.std == pytest.approx((2, 2, 2), abs=0.1)
    assert (found.low, found.high) == pytest.approx((7 - 3.09 * 2, 7 + 3.09 * 2), abs=0.3)
    np.save(tmp_path / "a.npy", np.full((3, 60, 60), np.nan, np.float32))
    with pytest.raises(ValueError, match="hold no data in a channel"):
        pixel_statistics([open_image(tmp_path / "a.npy")], seed=0)


def test_lists_are_given_with_or_without_brackets():
    given = argparse.Namespace(channels="DAPI,2", classes="[ground, tree]", value_range="0,1200")
    lists = ["data.classes=[ground, tree]", "data.channels=[DAPI,2]", "model.value_range=[0,1200]"]
    assert _from_flags(given, load()) == lists
    assert _from_flags(argparse.Namespace(channels="GFP", value_range="dtype"), load()) == [
        "data.channels=[GFP]",
        "model.value_range=dtype",
    ]
