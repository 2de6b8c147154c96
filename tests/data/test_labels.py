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
    ("lines", "message"),
    [
        (["image,class", "a,x"], r"no column 'label'; its columns are image, class"),
        (["image;label", "a;x"], r"no column 'image'; its columns are image;label"),
        (["image,label"], "a header but no rows"),
        (["image,label", "a,x", "b,"], "line 3: the label is empty"),
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
