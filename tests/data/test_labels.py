"""The label table."""

from pathlib import Path

import pytest

from widefield.data import LabelError, read_labels


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
    "header", ["image,label", "slide_id,class", "filename,Target", "case_id,slide_id,label", "IMAGE_PATH,label"]
)
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_table_of_any_dialect_is_read(
    tmp_path: Path, images: Path, header: str, separator: str, encoding: str, newline: str
) -> None:
    lines = [
        header,
        *((("7,", "8,") if "case_id" in header else ("", ""))[k] + row for k, row in enumerate(("a,x", "b,é"))),
    ]
    path = tmp_path / "labels.csv"
    path.write_bytes(newline.join(line.replace(",", separator) for line in lines).encode(encoding))
    read = read_labels(path, images)
    assert [image.path.name for image in read.images] == ["a.tif", "b.tif"]
    assert read.class_names == ("x", "é")
    assert [image.patient for image in read.images] == (["7", "8"] if "case_id" in header else [None, None])


def test_columns_of_other_names_are_said(tmp_path: Path, images: Path) -> None:
    path = table(tmp_path, "label,Slide,Grade,MRN", "?,a,x,1", "?,b,y,2")
    read = read_labels(path, images, {"image": "Slide", "label": "Grade", "patient": "MRN"})
    assert (read.class_names, [image.patient for image in read.images]) == (("x", "y"), ["1", "2"])
    with pytest.raises(LabelError, match="no column 'Grades', which is to be the label; its columns are label, Slide"):
        read_labels(path, images, {"image": "Slide", "label": "Grades"})
    with pytest.raises(
        LabelError, match="columns: picture is no kind of column; those are image, label, split, patient"
    ):
        read_labels(path, images, {"picture": "Slide"})


def test_a_parquet_table_is_read(tmp_path: Path, images: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"slide_id": ["a", "b", "c"], "label": [10, 2, 10]}).to_parquet(tmp_path / "labels.parquet")
    assert read_labels(tmp_path / "labels.parquet", images).class_names == ("2", "10")
    (tmp_path / "bad.parquet").write_bytes(b"x")
    with pytest.raises(LabelError, match=r"bad\.parquet is no Parquet file"):
        read_labels(tmp_path / "bad.parquet", images)


def test_numbers_of_any_kind_are_sorted_as_numbers(tmp_path: Path, images: Path) -> None:
    read = read_labels(table(tmp_path, "image,label", "a,10.0", "b,2.0", "c,-1.5"), images)
    assert read.class_names == ("-1.5", "2.0", "10.0")


@pytest.mark.parametrize(
    ("written", "file"),
    [
        ("./a.tif", "a.tif"),
        ("more\\d.png", "more/d.png"),
        ("d", "more/d.png"),
        ("d.png", "more/d.png"),
        ("g", "g.ome.tif"),
        ("g.ome", "g.ome.tif"),
        ("h", "h.svs"),
        ("caf\u00e9", "cafe\u0301.tif"),
        ("cafe\u0301.tif", "cafe\u0301.tif"),
        ("z", "z.zarr"),
        ("FOLDER/a.tif", "a.tif"),
        ("FOLDER/a", "a.tif"),
    ],
)
def test_an_image_is_found_however_its_name_is_written(tmp_path: Path, images: Path, written: str, file: str) -> None:
    for name in ("g.ome.tif", "h.svs", "h.xml", "cafe\u0301.tif"):
        (images / name).write_bytes(b"x")
    (images / "z.zarr").mkdir()
    (images / "z.zarr" / "zarr.json").write_text("{}")
    path = table(tmp_path, "image,label", f"{written.replace('FOLDER', str(images))},x", "b,y")
    assert read_labels(path, images).images[0].path == images / file


def test_an_absolute_path_may_lie_elsewhere(tmp_path: Path, images: Path) -> None:
    (tmp_path / "e.tif").write_bytes(b"x")
    read = read_labels(table(tmp_path, "image,label", f"{tmp_path / 'e.tif'},x", "b,y"), images)
    assert read.images[0].path == tmp_path / "e.tif"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,grade", "a,x"], r"no column 'label' \(it may also be called class, .*; its columns are image, grade"),
        (
            ["picture;label", "a;x"],
            r"no column 'image' \(it may also be called slide_id, .*; its columns are picture, label",
        ),
        (
            ["image,label", "a,nan", "b,", ",y"],
            r"line 2: the label is empty \('nan'\), line 3: .*, line 4: the image is empty",
        ),
        (["image,label", "a,1", "b,1.0"], "the labels '1', '1.0' are the same number"),
        (["image,label", "a,x", "b,y", "c,x;y"], "'x;y' names several classes"),
        (["image,label"], "a header but no rows"),
        (["image,label", "a,x", "b,"], "line 3: the label is empty"),
        (["image,label", ",x"], "line 2: the image is empty"),
        (["image,label", "a,x", "b,y", "a.tif,x"], r"names a.tif 2 times, in lines 2, 4"),
        (
            ["image,label", "a,x", "gone,y", "lost.tif,y"],
            r"2 image\(s\).*gone \(line 3\), lost.tif \(line 4\)\. No row names 3 image\(s\) there: b.tif, c.tif, d.png",
        ),
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


def test_a_field_that_never_ends_is_an_error_that_names_the_line(tmp_path: Path, images: Path) -> None:
    with pytest.raises(LabelError, match=r"labels\.csv, line .*it is no CSV file"):
        read_labels(table(tmp_path, "image,label", "a," + "x" * 200_000), images)
