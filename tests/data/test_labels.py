"""The label table."""

import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from widefield.data import (
    CIFAR100,
    AnnotationFile,
    Datasets,
    ImageFolder,
    LabelError,
    LabelledImages,
    MultiView,
    read_labels,
    stratified_split,
)
from widefield.data.pipeline import RandomApply


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name in ("a.tif", "b.tif", "c.tif", "more/d.png"):
        (folder / name).write_bytes(b"x")
    return folder


def table(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_names_match_with_and_without_extension_and_in_subfolders(tmp_path: Path, images: Path) -> None:
    read = read_labels(table(tmp_path, "id,image,label", "1,a.tif,x", "2,b,y", "3,more/d,x"), images)
    assert [image.path for image in read.images] == [images / "a.tif", images / "b.tif", images / "more" / "d.png"]
    assert [image.label for image in read.images] == [0, 1, 0]
    assert read.class_names == ("x", "y")


def test_whole_numbers_are_sorted_as_numbers_and_become_indices_without_gaps(tmp_path: Path, images: Path) -> None:
    read = read_labels(table(tmp_path, "image,label", "a,10", "b,2", "c,0"), images)
    assert read.class_names == ("0", "2", "10")
    assert [image.label for image in read.images] == [2, 1, 0]


def test_long_codes_keep_their_digits(tmp_path: Path, images: Path) -> None:
    codes = ("99999999999999999991", "99999999999999999992")
    read = read_labels(table(tmp_path, "image,label", f"a,{codes[1]}", f"b,{codes[0]}"), images)
    assert read.class_names == codes
    assert read_labels(table(tmp_path, "image,label", "a,1_0", "b,9", "c,10"), images).class_names == ("10", "1_0", "9")


def test_a_byte_order_mark_and_spaces_are_harmless(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("image , label\r\na, x \r\nb,y\r\n", encoding="utf-8-sig", newline="")
    assert read_labels(path, images).class_names == ("x", "y")


def test_the_split_column_is_read(tmp_path: Path, images: Path) -> None:
    read = read_labels(table(tmp_path, "image,label,split", "a,x,train", "b,y,val"), images)
    assert [image.split for image in read.images] == ["train", "val"]


def test_an_exact_file_name_wins_over_the_same_stem(tmp_path: Path, images: Path) -> None:
    (images / "a").write_bytes(b"x")
    read = read_labels(table(tmp_path, "image,label", "a,x", "b,y"), images)
    assert read.images[0].path == images / "a"


def test_files_beside_an_image_do_not_make_its_name_ambiguous(tmp_path: Path, images: Path) -> None:
    for name in ("a.tfw", "a.xml", "a.tif.aux.xml", "a.tif.ovr"):
        (images / name).write_bytes(b"x")
    read = read_labels(table(tmp_path, "image,label", "a,x", "b,y"), images)
    assert read.images[0].path == images / "a.tif"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,kind", "a,x"], r"no column 'label'; its columns are image, kind. Name .* as in columns={label: kind}"),
        (["scan;label", "a;x"], r"no column 'image'; its columns are scan, label"),
        (["image,label,label", "a,x,y"], "several columns named label"),
        (["image,label", "a,x", "b,y,z"], "line 3 has 3 cells and the first row 2"),
        (["image,label"], "a header but no rows"),
        ([""], "no header and no rows"),
        (["image,label", "a,x", "b,", "c,NaN"], "lines 3, 4: the label is empty or nan; fill it in or remove the row"),
        (
            ["case_id,image,label", ",a,x", "1,b,y"],
            "line 2: the patient \\(case_id\\) is empty or nan; .* columns.patient=null",
        ),
        (["image,label", "a,x;y", "b,x"], "'x;y' looks like several labels of one image"),
        (["image,label", "a,1", "b,1.0"], "'1' and '1.0' are one number and two labels"),
        (["image,label", ",x"], "line 2: the image is empty"),
        (["image,label", "a,x", "b,y", "a.tif,x"], r"names a.tif 2 times, in lines 2, 4"),
        (["image,label", "a,x", "gone,y", "lost.tif,y"], r"2 image\(s\).*gone \(line 3\), lost.tif \(line 4\)"),
        (["image,label", "a,x", "b,x"], "every image has the label 'x'"),
        (["image,label,split", "a,x,trian"], "line 2: the split is 'trian'; it must be one of train, val, test"),
    ],
)
def test_a_bad_table_is_refused_with_the_place_and_the_remedy(
    tmp_path: Path, images: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(LabelError, match=message):
        read_labels(table(tmp_path, *lines), images)


def test_an_ambiguous_stem_is_refused(tmp_path: Path, images: Path) -> None:
    (images / "a.png").write_bytes(b"x")
    with pytest.raises(LabelError, match=r"'a' may be a.png, a.tif; write the name with its extension"):
        read_labels(table(tmp_path, "image,label", "a,x", "b,y"), images)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_text_table_of_any_dialect_is_read(tmp_path: Path, images: Path, delimiter: str, encoding: str) -> None:
    rows = [
        ["Image", "note", "LABEL"],
        ["a.tif", f'"ü{delimiter} 1"', "x"],
        ["", "", ""],
        ["b", "2", "y"],
        ["c", "3", ""],
    ]
    path = tmp_path / "labels.csv"
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(end.join(map(delimiter.join, rows)).encode(encoding))
        with pytest.raises(LabelError, match=r"labels.csv: line 5: the label is empty"):
            read_labels(path, images)
        path.write_bytes(end.join(map(delimiter.join, rows[:-1])).encode(encoding))
        assert [image.path.name for image in read_labels(path, images).images] == ["a.tif", "b.tif"]


def test_the_separator_that_excel_declares_is_obeyed(tmp_path: Path, images: Path) -> None:
    read = read_labels(table(tmp_path, "", "sep=;", "image;label;note,with,commas", "a;x;", "b;y;"), images)
    assert read.class_names == ("x", "y")


def test_a_parquet_table_is_read_and_its_rows_are_counted(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "labels.table"
    frame = pandas.DataFrame({"slide_id": ["a", "b", "c"], "label": [0.0, 10.0, 2.0], "vector": [[1.0, 2.0]] * 3})
    frame.to_parquet(path)
    assert read_labels(path, images).class_names == ("0.0", "2.0", "10.0")
    frame["label"] = [0.0, None, 2.0]
    frame.to_parquet(path)
    with pytest.raises(LabelError, match="row 2: the label is empty or nan"):
        read_labels(path, images)
    path.write_bytes(b"PAR1, says the first line")
    with pytest.raises(LabelError, match="cannot be read as a Parquet file"):
        read_labels(path, images)
    path.write_bytes(b"PK\3\4 as zip files begin")
    with pytest.raises(LabelError, match="Excel workbook"):
        read_labels(path, images)


@pytest.mark.parametrize("image", ["slide_id", "Slide ID", "filename", "File", "path", "image_path"])
@pytest.mark.parametrize("label", ["label", "class", "Target"])
def test_columns_are_found_by_usual_names(tmp_path: Path, images: Path, image: str, label: str) -> None:
    read = read_labels(table(tmp_path, f"case_id,{image},{label}", "p,a,x", "q,b,y"), images)
    assert [(one.path.name, one.label, one.patient) for one in read.images] == [("a.tif", 0, "p"), ("b.tif", 1, "q")]


def test_columns_that_are_named_win_over_those_that_are_guessed(tmp_path: Path, images: Path) -> None:
    path = table(tmp_path, "image,label,case_id,split,scan,grade", "c,z,p,none,a,1", "c,z,,none,b,2")
    read = read_labels(path, images, {"image": "scan", "label": "grade", "patient": None, "split": None})
    assert read.class_names == ("1", "2")
    assert [(one.path.name, one.patient, one.split) for one in read.images] == [
        ("a.tif", None, None),
        ("b.tif", None, None),
    ]
    with pytest.raises(LabelError, match=r"no column 'grad' \(columns.label\); its columns .*; did you mean 'grade'"):
        read_labels(path, images, {"label": "grad"})
    with pytest.raises(ValueError, match=r"columns.imag: .* no argument 'imag'; did you mean image"):
        read_labels(path, images, {"imag": "scan"})  # type: ignore[typeddict-unknown-key]


def test_a_path_may_be_written_in_many_ways(tmp_path: Path, images: Path) -> None:
    (images / "more" / "é.tif").write_bytes(b"x")
    (tmp_path / "elsewhere.png").write_bytes(b"x")
    decomposed = unicodedata.normalize("NFD", "more/é")
    written = {
        "./a.tif": "a.tif",
        r"more\d": "more/d.png",
        str(images / "b"): "b.tif",
        "images/c.tif": "c.tif",
        decomposed: "more/é.tif",
        "more/../a": "a.tif",
    }
    for name, file in written.items():
        rows = (f"{name},x", "elsewhere.png,y")
        assert [one.path for one in read_labels(table(tmp_path, "image,label", *rows), images).images] == [
            images / file,
            tmp_path / "elsewhere.png",
        ]
    (images / "more" / "é.tif").rename(images / "more" / unicodedata.normalize("NFD", "ö.tif"))
    read = read_labels(table(tmp_path, "image,label", "more/ö.tif,x", "a,y"), images)
    assert unicodedata.normalize("NFC", read.images[0].path.name) == "ö.tif"


@pytest.mark.parametrize(
    ("file", "names"), [("g.ome.tif", ["g", "g.ome"]), ("h.svs.tif", ["h", "h.svs"]), ("i.1.svs", ["i.1"])]
)
def test_a_file_of_two_endings_is_found_without_them(tmp_path: Path, images: Path, file: str, names: list[str]) -> None:
    (images / file).write_bytes(b"x")
    for name in (file, *names):
        read = read_labels(table(tmp_path, "image,label", f"{name},x", "a,y"), images)
        assert read.images[0].path == images / file
    with pytest.raises(LabelError, match="1 image"):
        read_labels(table(tmp_path, "image,label", "i,x", "a,y"), images)


def test_one_error_tells_all_that_is_wrong(tmp_path: Path, images: Path) -> None:
    rows = ("a.tif,x", "a,y", "gone,x", "bb.tif,y", ",x", "b,", *(f"no{k},x" for k in range(20)))
    with pytest.raises(LabelError) as caught:
        read_labels(table(tmp_path, "image,label", *rows), images)
    assert str(caught.value).splitlines()[1:] == [
        "  line 6: the image is empty or nan; fill it in or remove the row",
        "  line 7: the label is empty or nan; fill it in or remove the row",
        "  names a.tif 2 times, in lines 2, 3; keep one of them",
        f"  names 22 image(s) that are not in {images}: gone (line 4), bb.tif (line 5, did you mean b.tif?), "
        + ", ".join(f"no{k} (line {k + 8})" for k in range(8))
        + " and 12 more; 3 image(s) there have no row: b.tif, c.tif, more/d.png; "
        + "correct the paths in the table, or remove these rows",
    ]


def test_images_without_a_row_are_left_out_and_named(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(read_labels(table(tmp_path, "image,label", "a,x", "b,y"), images).images) == 2
    assert "2 image(s)" in caplog.text
    assert "c.tif, more/d.png" in caplog.text


def test_missing_paths_are_named(tmp_path: Path, images: Path) -> None:
    with pytest.raises(FileNotFoundError, match="label table"):
        read_labels(tmp_path / "none.csv", images)
    labels = table(tmp_path, "image,label", "a,x")
    with pytest.raises(FileNotFoundError, match="folder of images"):
        read_labels(labels, tmp_path / "none")
    with pytest.raises(NotADirectoryError):
        read_labels(labels, labels)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LabelError, match="is empty"):
        read_labels(labels, tmp_path / "empty")


def test_a_table_that_is_not_text_is_refused(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"image,label\na,\xff\xfe\n")
    with pytest.raises(LabelError, match="not UTF-8"):
        read_labels(path, images)


def test_a_folder_that_is_an_image_and_a_name_in_a_folder_below_are_found(tmp_path: Path, images: Path) -> None:
    (images / "z.zarr").mkdir()
    (images / "z.zarr" / "zarr.json").write_text("{}")
    path = table(tmp_path, "image,label", "z,x", "z.zarr,x", "b,y", "d,x")
    with pytest.raises(LabelError, match=r"names z\.zarr 2 times"):
        read_labels(path, images)
    read = read_labels(table(tmp_path, "image,label", "z.zarr,x", "b,y", "d,x"), images)
    assert [image.path for image in read.images] == [images / "z.zarr", images / "b.tif", images / "more" / "d.png"]


def test_a_field_that_never_ends_is_an_error_that_names_the_file(tmp_path: Path, images: Path) -> None:
    with pytest.raises(LabelError, match=r"labels\.csv"):
        read_labels(table(tmp_path, "image,label", "a," + "x" * 200_000), images)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": None}, "read_labels cannot be called so: images: got None, expected a text or a Path"),
        ({"columns": ["grade"]}, r"columns: got \['grade'\], expected"),
        ({"columns": {"label": 3}}, "columns.label: got 3, expected"),
    ],
)
def test_arguments_of_wrong_types_are_named(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_labels(**{"labels": tmp_path / "a.csv", "images": tmp_path, **wrong})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: stratified_split([0, 1], "x", 0),
            "stratified_split cannot be called so: fraction: got 'x', expected a number",
        ),
        (
            lambda: LabelledImages("a", "b", batch_size=1.5),
            "LabelledImages .*: batch_size: got 1.5, expected int, at least 1",
        ),
        (lambda: LabelledImages("a", "b", level="1"), "level: got '1', expected int"),
        (lambda: LabelledImages("a", "b", channels="red"), "channels: got 'red', expected a list"),
        (lambda: ImageFolder("a", extensions=".tif"), "ImageFolder .*: extensions: got '.tif', expected a list"),
        (lambda: AnnotationFile("a", 3), "AnnotationFile .*: ann_file: got 3, expected a Path"),
        (lambda: CIFAR100(None), "CIFAR10 .*: root: got None, expected a Path"),
        (lambda: Datasets(train=3), "Datasets .*: train: got 3"),
        (lambda: RandomApply([], p="a"), "RandomApply .*: p: got 'a', expected a number"),
        (lambda: MultiView([], num_views=0), "MultiView .*: num_views: got 0"),
    ],
)
def test_data_sets_name_arguments_of_wrong_types_before_they_look_for_files(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_of_numpy_are_taken(tmp_path: Path) -> None:
    assert stratified_split(np.array([0, 0, 1, 1]), np.float32(0.5), np.int64(0)) == stratified_split(
        [0, 0, 1, 1], 0.5, 0
    )
