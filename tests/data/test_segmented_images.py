"""Images with label maps: which belong together, which classes there are, and crops that are seeded and balanced."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.label_files import write_label_map, write_segmented
from widefield.data import LabelError, SegmentedImages
from widefield.images import LabelMapError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_segmented(tmp_path)
    return tmp_path


def test_images_and_label_maps_go_together_by_their_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "masks" / "im0.png").rename(folder / "masks" / "im0.ome.png")
    (folder / "masks" / "im3.png").unlink()
    data = SegmentedImages(folder / "images", folder / "masks", val_fraction=0.4)
    assert data.class_names == ["0", "1", "2"]
    assert (len(data.train_set), len(data.val_set)) == (2, 1)
    assert "1 image(s) in" in caplog.text and "im3.png" in caplog.text
    for image, labels in data.train_set:
        assert image.path.name.partition(".")[0] == labels.path.name.partition(".")[0]
        assert image.shape[1:] == labels.shape[1:]
    rows = data.split_rows()
    assert sorted(row["split"] for row in rows) == ["train", "train", "val"]


def test_classes_of_polygons_are_their_names(tmp_path: Path) -> None:
    write_segmented(tmp_path, 2)
    shutil.rmtree(tmp_path / "masks")
    (tmp_path / "masks").mkdir()
    for k, name in enumerate(("tree", "house")):
        ring = [[2, 2], [30, 2], [30, 30], [2, 30]]
        content = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name}},
        }
        (tmp_path / "masks" / f"im{k}.geojson").write_text(json.dumps(content), encoding="utf-8")
    data = SegmentedImages(tmp_path / "images", tmp_path / "masks", val_fraction=0)
    assert data.class_names == ["background", "house", "tree"]
    assert [np.unique(labels.read(0, 0, 64, 72)).tolist() for _, labels in data.train_set] == [[0, 2], [0, 1]]


def test_crops_depend_on_seed_epoch_and_image_alone_and_are_balanced(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for k in range(2):
        labels = np.zeros((256, 320), np.uint8)
        labels[10:14, 300:305] = 1  # a class of 20 pixels in 80,000
        write_label_map(tmp_path / "masks" / f"{k}.png", labels)
        write_label_map(tmp_path / "images" / f"{k}.png", random.integers(0, 255, labels.shape, dtype=np.uint8))
    data, other, again = (
        SegmentedImages(tmp_path / "images", tmp_path / "masks", crop=side, seed=seed, val_fraction=0, batch_size=2)
        for side, seed in ((96, 0), (96, 1), (96, 0))
    )
    crops = [data.train_set[epoch, 0] for epoch in range(60)]
    assert all(pixels.shape == (1, 96, 96) and labels.shape == (96, 96) for pixels, labels in crops)
    with_class = sum(bool(labels.any()) for _, labels in crops)
    assert 20 <= with_class <= 45  # half of them, and a few by chance
    for one, same in ((data.train_set[3, 1], again.train_set[3, 1]),):
        np.testing.assert_array_equal(one[0], same[0])
    assert any(not np.array_equal(data.train_set[e, 1][0], other.train_set[e, 1][0]) for e in range(3))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={})
    (pixels, labels), *_ = data.train_dataloader()
    assert pixels.shape == (2, 1, 96, 96) and labels.shape == (2, 96, 96)
    whole, maps = next(iter(data.train_set))
    assert whole.shape == (1, 256, 320) and maps.shape == (1, 256, 320)


def test_crops_are_turned_and_mirrored_with_their_labels(folder: Path) -> None:
    places = folder / "images", folder / "masks"
    plain, data = (SegmentedImages(*places, crop=40, augment=how) for how in (None, "flips"))
    found = set()
    for epoch in range(40):
        (image, labels), changed = (one.train_set[epoch, 0] for one in (plain, data))
        every = [(k, m) for k in range(4) for m in (False, True)]
        both = np.concatenate([image, labels[None]])
        turned = [np.rot90(both, k, (1, 2))[..., :: -1 if m else 1] for k, m in every]
        (which,) = (
            k for k, one in enumerate(turned) if np.array_equal(one, np.concatenate([changed[0], changed[1][None]]))
        )
        found.add(which)
    assert len(found) == 8
    assert changed[1].dtype == labels.dtype and np.array_equal(changed[0], data.train_set[39, 0][0])
    assert data.val_set[0][1].shape == (1, 64, 72)


def test_transforms_of_torchvision_change_labels_alike_and_what_they_bring_in_is_ignored(folder: Path) -> None:
    described = [
        {"type": "RandomAffine", "degrees": [90, 90], "translate": [0.4, 0.4]},
        {"type": "ColorJitter", "brightness": 0.3},
    ]
    data = SegmentedImages(folder / "images", folder / "masks", crop=48, augment=described, ignore_index=200)
    state = torch.get_rng_state()
    pixels, labels = data.train_set[3, 1]
    assert torch.equal(state, torch.get_rng_state())
    again = data.train_set[3, 1]
    assert np.array_equal(pixels, again[0]) and np.array_equal(labels, again[1])
    assert pixels.shape == (3, 48, 48) and labels.shape == (48, 48) and labels.dtype == np.uint8
    outside = (pixels == 0).all(0)
    assert outside.any() and (labels[outside] == 200).mean() > 0.95
    red = (pixels[0] > 100) & (pixels[1] < 80)
    assert red.sum() > 50 and (labels[red] == 1).mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "flips"}, "augment changes crops, and whole images are trained on"),
        ({"augment": "flip", "crop": 9}, "augment='flip' must be 'flips', or a list of transforms"),
        ({"augment": [{"type": "TimmRandAugment"}], "crop": 9}, "TimmRandAugment changes images alone"),
    ],
    ids=["without crops", "another name", "of images alone"],
)
def test_augmentation_that_cannot_be_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentedImages(folder / "images", folder / "masks", **options)


def test_a_crop_larger_than_an_image_is_all_of_it(folder: Path) -> None:
    data = SegmentedImages(folder / "images", folder / "masks", crop=70)
    pixels, labels = data.train_set[0, 0]
    assert pixels.shape == (3, 64, 70) and labels.shape == (64, 70)


def test_what_does_not_fit_is_one_clear_error(folder: Path) -> None:
    images, masks = folder / "images", folder / "masks"
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; check --masks"):
        SegmentedImages(images, folder / "nowhere")
    with pytest.raises(LabelError, match="the classes are a, a; expected two at least, all different"):
        SegmentedImages(images, masks, classes=["a", "a"])
    shutil.copy(masks / "im0.png", masks / "other.png")
    with pytest.raises(LabelError, match=r"1 label map\(s\) in .* have no image in .*other.png"):
        SegmentedImages(images, masks)
    (masks / "other.png").unlink()
    shutil.copy(masks / "im0.png", masks / "im0.bmp")
    with pytest.raises(LabelError, match=r"im0.png may have the label maps .*keep one of them|have no image"):
        SegmentedImages(images, masks)
    (masks / "im0.bmp").unlink()
    write_label_map(masks / "im1.png", np.zeros((10, 10), np.uint8))
    with pytest.raises(LabelMapError, match=r"im1.png has 10 x 10 pixels, and its image .*im1.png"):
        SegmentedImages(images, masks)
    for path in masks.iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(LabelError, match=r"no image in .* has a label map in"):
        SegmentedImages(images, masks)
