"""The data module."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.small_images import write_folder, write_image
from widefield.data import EpochShuffle, LabelError, LabelledImages


def test_batches_are_lazy_images_and_class_indices(tmp_path: Path) -> None:
    data = LabelledImages(*write_folder(tmp_path), batch_size=2)
    images, targets = next(iter(data.train_dataloader()))
    assert [image.shape for image in images] == [(3, 96, 96)] * 2
    assert targets.dtype == torch.int64
    assert data.class_names == ["bright", "dark"]
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (6, 2, 0)


def test_the_level_is_that_of_the_pyramid(tmp_path: Path) -> None:
    data = LabelledImages(*write_folder(tmp_path), level=1)
    assert data.train_set[0][0].shape == (3, 48, 48)
    with pytest.raises(ValueError, match="level"):
        LabelledImages(*write_folder(tmp_path / "other"), level=9)


def test_the_split_column_decides(tmp_path: Path) -> None:
    images, labels = write_folder(tmp_path, count=6)
    splits = ["train", "train", "val", "val", "test", "test"]
    header, *rows = labels.read_text().splitlines()
    lines = [f"{header},split", *(f"{row},{split}" for row, split in zip(rows, splits, strict=True))]
    labels.write_text("\n".join(lines))
    data = LabelledImages(images, labels)
    assert [image.path.stem for image in data.val_set.images] == ["im2", "im3"]
    assert [image.path.stem for image in data.test_set.images] == ["im4", "im5"]


def with_column(labels: Path, name: str, values: list[str]) -> None:
    header, *rows = labels.read_text().splitlines()
    labels.write_text("\n".join([f"{header},{name}", *(f"{row},{one}" for row, one in zip(rows, values, strict=True))]))


def test_images_of_a_patient_stay_together(tmp_path: Path) -> None:
    images, labels = write_folder(tmp_path, count=12, side=32)
    with_column(labels, "patient", [f"p{k // 4}" for k in range(12)])
    for seed in range(4):
        data = LabelledImages(images, labels, seed=seed, val_fraction=0.3)
        assert len(data.val_set) == 4
        assert len({image.patient for image in data.val_set.images}) == 1
    apart = LabelledImages(images, labels, columns={"patient": None}, val_fraction=0.3)
    assert {image.patient for image in apart.val_set.images} == {None}


def test_a_split_that_tears_a_patient_apart_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = write_folder(tmp_path, count=4, side=32)
    with_column(labels, "case_id", ["p", "q", "p", "r"])
    with_column(labels, "split", ["train", "train", "test", "val"])
    with caplog.at_level(logging.WARNING):
        data = LabelledImages(images, labels)
    assert "images of one case_id into several splits, so that what is measured may be too good: p" in caplog.text
    assert data.split_rows()[2] == {
        "image": str(images / "im2.tif"),
        "label": "dark",
        "case_id": "p",
        "split": "test",
    }


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = EpochShuffle(20, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    again = EpochShuffle(20, seed=3)
    again.set_epoch(1)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(again) == second
    assert list(EpochShuffle(20, seed=4)) != first


def test_different_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    images, labels = write_folder(tmp_path, count=4)
    write_image(images / "grey.png", np.zeros((20, 20), np.uint8))
    labels.write_text(labels.read_text() + "grey,dark\n")
    with pytest.raises(LabelError, match=r"grey.png has 1|grey.png.* 1 channel"):
        LabelledImages(images, labels)


def test_an_unreadable_image_is_named_at_once(tmp_path: Path) -> None:
    images, labels = write_folder(tmp_path, count=4)
    (images / "im2.tif").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"im2\.tif"):
        LabelledImages(images, labels)


def test_resuming_with_other_classes_is_refused(tmp_path: Path) -> None:
    data = LabelledImages(*write_folder(tmp_path))
    data.load_state_dict(data.state_dict())
    with pytest.raises(LabelError, match="cat, dog"):
        data.load_state_dict({"level": 0, "class_names": ["cat", "dog"]})
