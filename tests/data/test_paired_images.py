"""Images with maps of numbers: which belong together, crops of both, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.label_files import write_paired
from widefield.data import LabelError, PairedImages
from widefield.images import open_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_paired(tmp_path, 3)
    return tmp_path


def test_images_and_targets_go_together_by_their_names_and_the_targets_are_measured(folder: Path) -> None:
    data = PairedImages(folder / "images", folder / "targets", val_fraction=0.4)
    assert (len(data.train_set), len(data.val_set), data.class_names) == (2, 1, ["0"])
    targets = [open_image(one.label).read(0, 0, 64, 72) for one in data.train_set.images]  # type: ignore[arg-type]
    assert data.target["task"] == "map"
    assert data.target["mean"] == pytest.approx([float(np.mean(targets, dtype=np.float64))])
    assert data.target["std"] == pytest.approx([float(np.std(targets, dtype=np.float64))])
    assert {row["image"][-7:-4] for row in data.split_rows()} == {row["target"][-7:-4] for row in data.split_rows()}
    state = data.state_dict()
    data.load_state_dict(state)
    with pytest.raises(LabelError, match="trained on targets of the channels a, b, and here are 0"):
        data.load_state_dict({**state, "class_names": ["a", "b"]})


def test_crops_of_image_and_target_are_of_one_place_seeded_and_turned_alike(folder: Path) -> None:
    shutil.rmtree(folder / "targets")
    (folder / "targets").mkdir()
    for path in (folder / "images").iterdir():  # the targets are the images themselves, as numbers
        tifffile.imwrite(folder / "targets" / path.name, tifffile.imread(path).astype(np.float64) * 2)
    places = folder / "images", folder / "targets"
    data, again, other = (PairedImages(*places, crop=40, augment="flips", seed=seed) for seed in (0, 0, 1))
    crops = [data.train_set[epoch, 0] for epoch in range(6)]
    for k, (image, target) in enumerate(crops):
        assert image.shape == target.shape == (1, 40, 40) and target.dtype == np.float64
        np.testing.assert_array_equal(image.astype(np.float64) * 2, target)
        np.testing.assert_array_equal(image, again.train_set[k, 0][0])
    assert any(not np.array_equal(image, other.train_set[k, 0][0]) for k, (image, _) in enumerate(crops))
    whole, target = data.train_set[0]
    assert whole.shape == target.shape == (1, 64, 72)


def test_what_does_not_fit_is_one_clear_error(folder: Path) -> None:
    places = folder / "images", folder / "targets"
    with pytest.raises(ValueError, match="augment changes crops, and whole images are trained on"):
        PairedImages(*places, augment="flips")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; check --targets"):
        PairedImages(folder / "images", folder / "nowhere")
    first = folder / "targets" / "im0.tif"
    values = tifffile.imread(first)
    for found, message in (
        (values[:10], r"the target map .*im0.tif has 10 x 72 pixels, and its image .*, level 0, 64 x 72"),
        (
            np.stack([values] * 3, axis=-1),
            r"im0.tif has 3 channel\(s\) and .*im1.tif has 1; give as many in each",
        ),
        (np.where(values > 100, values, np.nan), r"im0.tif has pixels without a number \(NaN, infinite"),
    ):
        tifffile.imwrite(first, found, photometric="rgb" if found.ndim == 3 else "minisblack")
        with pytest.raises(LabelError, match=message):
            PairedImages(*places, val_fraction=0)
    first.unlink()
    shutil.copy(folder / "targets" / "im1.tif", folder / "targets" / "alone.tif")
    with pytest.raises(LabelError, match=r"1 target map\(s\) in .* have no image in .*alone.tif"):
        PairedImages(*places)
