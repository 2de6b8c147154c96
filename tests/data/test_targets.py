"""Labels that are no classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_images import write_image
from widefield.data import LabelError, LabelledImages, read_labels
from widefield.data.labelled_images import collate


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for k in range(12):
        write_image(folder / f"{k}.png", np.full((8, 8, 3), 20 * k, np.uint8))
    return folder


def table(folder: Path, header: str, rows: list[str]) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join([f"image;{header}", *(f"{k};{row}" for k, row in enumerate(rows))]), encoding="utf-8")
    return path


def test_several_labels_stand_in_one_cell(tmp_path: Path, images: Path) -> None:
    read = read_labels(table(tmp_path, "label", ["10, 2", "-", "2", "1"]), images, task="multilabel", separator=",")
    assert read.class_names == ("1", "2", "10")
    assert [image.label for image in read.images] == [(0, 1, 1), (0, 0, 0), (0, 1, 0), (1, 0, 0)]


def test_several_labels_stand_in_columns_of_0_and_1(tmp_path: Path, images: Path) -> None:
    rows = table(tmp_path, "b;a", ["1;0", "0.0;True", "1;1"])
    read = read_labels(rows, images, {"label": ["b", "a"]}, task="multilabel")
    assert read.class_names == ("b", "a")
    assert [image.label for image in read.images] == [(1, 0), (0, 1), (1, 1)]


def test_numbers_and_times_come_in_batches_of_floats(tmp_path: Path, images: Path) -> None:
    rows = [f"{k}.5;{k % 2}" for k in range(12)]
    for task, columns in (("regression", {"label": ["x", "y"]}), ("survival", {"time": "x", "event": "y"})):
        data = LabelledImages(images, table(tmp_path, "x;y", rows), columns=columns, task=task, seed=3)  # type: ignore[arg-type]
        _, target = collate([data.train_set[0], data.train_set[1]])
        assert target.dtype == torch.float32
        assert target.tolist() == [
            list(map(float, rows[int(one.path.stem)].split(";"))) for one in data.train_set.images[:2]
        ]


def test_the_target_comes_from_the_images_to_train_on(tmp_path: Path, images: Path) -> None:
    splits = ["train"] * 9 + ["val"] * 3
    rows = [f"{k};{int(k != 3)};{split}" for k, split in enumerate(splits)]
    path = table(tmp_path, "time;event;split", rows)
    data = LabelledImages(images, path, columns={"label": "time"}, task="regression")
    assert data.target == {"task": "regression", "mean": [4.0], "std": [np.std(range(9))]}
    assert data.class_names == ["time"]
    data = LabelledImages(images, path, task="survival")
    edges = np.quantile([0, 1, 2, 4, 5, 6, 7, 8], [0.25, 0.5, 0.75]).tolist()
    assert data.target == {"task": "survival", "edges": edges}
    assert data.class_names == ["below 1.75", "1.75 to 4.5", "4.5 to 6.25", "6.25 and later"]
    data.load_state_dict(data.state_dict())
    with pytest.raises(LabelError, match="trained with the target"):
        data.load_state_dict({**data.state_dict(), "target": {"task": "survival", "edges": [1.0, 2.0, 3.0]}})


@pytest.mark.parametrize(
    ("task", "header", "rows", "kept"),
    [
        ("regression", "label", [str(k) for k in range(12)], lambda row: float(row) // 3),
        ("survival", "time;event", [f"{k};{k // 6}" for k in range(12)], lambda row: row[-1]),
        ("multilabel", "label", ["a|b", "a|b", "a|b", "a|b", *["-"] * 8], lambda row: row),
    ],
)
def test_a_drawn_split_has_all_kinds_of_labels(
    tmp_path: Path, images: Path, task: Any, header: str, rows: list[str], kept: Any
) -> None:
    separator = "|" if task == "multilabel" else None
    data = LabelledImages(images, table(tmp_path, header, rows), task=task, separator=separator, val_fraction=0.34)
    assert {kept(rows[int(image.path.stem)]) for image in data.val_set.images} == set(map(kept, rows))


@pytest.mark.parametrize(
    ("task", "header", "rows", "options", "message"),
    [
        (
            "regression",
            "label",
            ["1", "3,5", "x", "2"],
            {},
            "lines 3, 4: label is '3,5', expected a number, with a decimal",
        ),
        ("regresion", "label", ["1"], {}, "task: got 'regresion', expected .*; did you mean 'regression'"),
        ("regression", "label", ["1", "inf"], {}, "line 3: label is 'inf', expected a number"),
        ("regression", "label", ["2", "2.0"], {}, "every image has the label 2, so there is nothing to learn"),
        ("regression", "a;b", ["1;2", ";3"], {"columns": {"label": ["a", "b"]}}, r"line 3: the label \(a\) is empty"),
        ("regression", "a;b", ["1;2"], {"columns": {"label": []}}, "columns.label names 0 columns"),
        (
            "multilabel",
            "a;b",
            ["1;2", "0;3"],
            {"columns": {"label": ["a", "b"]}},
            "lines 2, 3: b is '2', expected 0 or 1$",
        ),
        ("multilabel", "label", ["x"], {}, "expected 0 or 1, or give separator=';'"),
        ("multilabel", "label", ["-", "-"], {"separator": "|"}, "no image has a label"),
        ("multilabel", "label", ["a"], {"separator": " "}, "separator=' ' is what stands between"),
        (
            "survival",
            "time;event",
            ["-1;1", "2;1"],
            {},
            "line 2: time is '-1', expected a time, a number of at least 0",
        ),
        ("survival", "time;event", ["1;2"], {}, r"event is '2', expected 0 or 1 \(1: the event was observed\)"),
        (
            "survival",
            "time;censored",
            ["1;0"],
            {"columns": {"event": "censored"}},
            "1 where the event was not observed",
        ),
        ("survival", "time;event", ["1;0", "2;0", "3;0"], {}, r"have 0 observed event\(s\), expected some at two"),
        ("survival", "time;event", ["2;1", "2;1", "2;1"], {}, r"3 observed event\(s\), expected some at two"),
    ],
)
def test_labels_that_are_none_of_the_task_are_refused(
    tmp_path: Path, images: Path, task: Any, header: str, rows: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledImages(images, table(tmp_path, header, rows), task=task, val_fraction=0, **options)
