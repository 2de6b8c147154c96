"""Files of features of patches, as CLAM and TRIDENT write them, read and written."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from widefield.images import ImageReadError, open_image
from widefield.images.feature_files import PatchFeatures, read_features
from widefield.inference.patch_features import write_features

FEATURES = np.arange(21, dtype=np.float32).reshape(7, 3)
COORDS = np.stack([np.arange(7) * 224, np.arange(7) * 0 + 448], 1)


@pytest.mark.parametrize("ending", ["h5", "zarr"])
def test_a_file_of_features_is_an_image_of_one_row(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"slide.{ending}"
    write_features(path, PatchFeatures(FEATURES, COORDS, {"patch_size": 224, "patch_size_level0": 448}))
    image = open_image(path)
    assert image.shape == (3, 1, 7)
    assert image.dtype == np.float32
    assert np.array_equal(image.read(0, 0, 1, 7)[:, 0].T, FEATURES)
    assert np.array_equal(image.read(0, 2, 1, 3)[:, 0].T, FEATURES[2:5])
    found = read_features(path)
    assert np.array_equal(found.features, FEATURES)
    assert np.array_equal(found.coords, COORDS)
    assert {name: int(value) for name, value in found.attributes.items()} == {
        "patch_size": 224,
        "patch_size_level0": 448,
    }


def test_the_layout_is_that_of_trident_and_clam(tmp_path: Path) -> None:
    write_features(tmp_path / "ours.h5", PatchFeatures(FEATURES, COORDS, {"patch_size": 224}))
    with h5py.File(tmp_path / "ours.h5") as file:
        assert set(file) == {"features", "coords"}
        assert file["features"].shape == (7, 3)
        assert file["coords"].shape == (7, 2)
        assert file["coords"].attrs["patch_size"] == 224
    with h5py.File(tmp_path / "theirs.h5", "w") as file:  # some versions write a first axis of 1
        file["features"], file["coords"] = FEATURES[None].astype(np.float16), COORDS[None]
    assert open_image(tmp_path / "theirs.h5").shape == (3, 1, 7)
    assert np.array_equal(open_image(tmp_path / "theirs.h5").read(0, 0, 1, 7)[:, 0].T, FEATURES)
    assert np.array_equal(read_features(tmp_path / "theirs.h5").coords, COORDS)


def test_other_files_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["pixels"] = np.zeros((4, 4))
    with pytest.raises(ImageReadError, match=r"it has pixels; expected an array features \(n, D\)"):
        open_image(tmp_path / "other.h5")
    with pytest.raises(ImageReadError, match="it has the arrays pixels; expected features and coords"):
        read_features(tmp_path / "other.h5")
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["features"] = np.zeros((0, 4))
    with pytest.raises(ImageReadError, match=r"it has features of shape \(0, 4\)"):
        open_image(tmp_path / "empty.h5")
    with pytest.raises(FileNotFoundError, match="no file of features"):
        read_features(tmp_path / "none.h5")
