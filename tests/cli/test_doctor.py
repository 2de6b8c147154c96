"""`widefield doctor` reads every image once and tells what is there and what is wrong."""

import csv

import numpy as np
import pytest
import tifffile
from skimage import data

from tests.label_files import write_label_map, write_segmented
from widefield.cli import main


@pytest.fixture
def folder(tmp_path):
    """Good images of two kinds, a copy, one with missing data, a damaged and an unreadable one."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    pixels = data.astronaut()[:200, :300]
    spacing = {"resolution": (20_000, 20_000), "resolutionunit": "centimeter", "metadata": None}
    for name in ("a.tif", "more/copy.tif"):
        tifffile.imwrite(images / name, pixels, photometric="rgb", tile=(64, 64), compression="zlib", **spacing)
    floats = np.full((50, 40), np.nan, np.float32)
    floats[10:] = 3.5
    tifffile.imwrite(images / "b.tif", floats, photometric="minisblack", metadata=None)
    tifffile.imwrite(
        images / "damaged.tif", pixels, photometric="rgb", tile=(64, 64), compression="zlib", metadata=None
    )
    with tifffile.TiffFile(images / "damaged.tif") as file:
        offset, count = file.pages[0].dataoffsets[7], file.pages[0].databytecounts[7]
    with (images / "damaged.tif").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    (images / "unreadable.png").write_bytes(b"no picture")
    (images / "a.tif.aux.xml").write_text("<a/>")
    return images


def test_every_image_has_a_row_of_what_it_is_like(folder, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("image,label\na,x\nb,y\ncopy,x\ngone,y\ndamaged,x\n")
    table = tmp_path / "found.csv"
    assert main(["doctor", "--images", str(folder), "--labels", str(tmp_path / "labels.csv"), "--out", str(table)]) == 1
    with table.open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"a.tif", "b.tif", "damaged.tif", "more/copy.tif", "unreadable.png"}
    a, b = rows["a.tif"], rows["b.tif"]
    assert (a["status"], a["height"], a["width"], a["channels"], a["dtype"]) == ("ok", "200", "300", "3", "uint8")
    pixels = data.astronaut()[:200, :300]
    assert (float(a["lowest"]), float(a["highest"]), a["spacing_y"], a["label"]) == (
        pixels.min(),
        pixels.max(),
        "0.5",
        "x",
    )
    assert (b["lowest"], b["highest"], b["without_data"], b["spacing_y"]) == ("3.5", "3.5", "0.2", "")
    assert rows["more/copy.tif"]["duplicate_of"] == "a.tif"
    assert rows["damaged.tif"]["status"] == "damaged" and "corrupt" in rows["damaged.tif"]["reason"]
    assert rows["unreadable.png"]["status"] == "unreadable" and "none of" in rows["unreadable.png"]["reason"]
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "5 images, 3 of them without a fault",
        "channels: 3 (3), 1 (1)",
        "micrometres per pixel: 0.5 (2), unknown (2)",
        "1 with pixels without data: b.tif",
        "1 with the pixels of another: more/copy.tif = a.tif",
        "line 5: 'gone' is none of the images",
        "1 image(s) without a label",
    ):
        assert part in said


def test_a_folder_without_a_fault_ends_with_0(folder, capsys):
    for name in ("damaged.tif", "unreadable.png"):
        (folder / name).unlink()
    assert main(["doctor", "--images", str(folder), "--workers", "1"]) == 0
    assert main(["doctor", "--images", str(folder / "gone")]) == 2
    assert "gone does not exist; check --images" in capsys.readouterr().err


def test_a_table_is_read_before_any_image_by_the_columns_that_are_named(folder, tmp_path, capsys):
    table = tmp_path / "labels.csv"
    table.write_text("scan;age;months;died\na;50;3;1\nb;61;4;0\ncopy;40;7;1\ndamaged;33;2;0\n")
    command = ["doctor", "--images", str(folder), "--labels", str(table), "--out", str(tmp_path / "found.csv")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("widefield.cli.doctor.examine", lambda *args: pytest.fail("an image was read"))
        assert main(command) == 2
    assert "columns={image: scan}" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--columns", "{image: scan}", "--task", "survival"]) == 2
    assert main([*command, "--columns", "{image: scan, time: months, event: died}", "--task", "survival"]) == 1
    with (tmp_path / "found.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"", "3, 1", "4, 0", "7, 1", "2, 0"}


def test_label_maps_are_read_and_what_does_not_fit_is_told_by_name(tmp_path, capsys):
    write_segmented(tmp_path, 6, palette=True)
    masks = tmp_path / "masks"
    (masks / "im1.png").unlink()
    write_label_map(masks / "im2.png", np.zeros((9, 9), np.uint8))
    write_label_map(masks / "im3.png", np.zeros((64, 72), np.uint8))
    labels = np.zeros((64, 72), np.uint8)
    labels[3, 5] = 7
    write_label_map(masks / "im4.png", labels)
    write_label_map(masks / "im5.png", np.full((64, 72), 255, np.uint8))
    table = tmp_path / "found.csv"
    places = ["--images", str(tmp_path / "images"), "--masks", str(masks), "--out", str(table)]
    assert main(["doctor", *places, "--classes", "[ground, tree, house, sea]"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "im2.png has 9 x 9 pixels, and its image",
        "im4.png: it has the labels 7, expected the 4 classes from 0, or 255",
        "im5.png: all of its pixels are 255, which does not count",
        "1 image(s) without a label map in",
        "4 label maps; shares of the labels: 0: ",
        "classes that no label map has: sea",
        "1 label maps without a class but the first: ",
    ):
        assert part in said, part
    with table.open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert rows["im0.png"]["mask"] == str(masks / "im0.png") and rows["im1.png"]["mask"] == ""
    assert rows["im4.png"]["mask_labels"] == "0: 1; 7: 0.000217" and rows["im0.png"]["mask_labels"].startswith("0: 0.")


def test_label_maps_of_0_and_255_are_told_and_others_end_with_0(tmp_path, capsys):
    write_segmented(tmp_path, 2)
    places = ["doctor", "--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert main(places) == 0
    for file in (tmp_path / "masks").iterdir():
        write_label_map(file, np.eye(64, 72, dtype=np.uint8) * 255)
    assert main(places) == 1
    assert "hold 0 and 255 alone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*places, "--classes", "tree"])
    assert "names no classes; give them as in" in capsys.readouterr().err
