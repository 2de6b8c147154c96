"""Files of features of patches, in the layout of CLAM and TRIDENT, as images of one row: a patch a position, a feature a channel.

A file holds `features` (n, D), or (1, n, D), and `coords` (n, 2): x and y of the upper left corner of each patch, in pixels of the
slide's largest level. It is HDF5 (`.h5`), read by h5py, or a Zarr group (`.zarr`) with the same two arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from widefield.errors import MissingExtraError
from widefield.images.arrays import ArrayPixels, DeferredArray
from widefield.images.formats import Choice, Contents, PerProcess, cannot_read, image_format, one_image

_HDF5 = b"\x89HDF\r\n\x1a\n"
_SHOWN = 8
"""Names of arrays that an error lists."""


@dataclass(frozen=True)
class PatchFeatures:
    """Features of the patches of one slide.

    Attributes:
        features: (n, D), floats.
        coords: (n, 2), x and y of upper left corners in pixels of the largest level.
        attributes: What the file says of the patches: `patch_size` in pixels of the level that was read, `patch_size_level0` in
            pixels of the largest, and so on.
    """

    features: np.ndarray
    coords: np.ndarray
    attributes: Mapping[str, Any]


@image_format("features in HDF5", endings=(".h5",), recognises=lambda path, start: start.startswith(_HDF5))
def open_hdf5(path: Path, choice: Choice) -> Contents:
    """Open the features in an HDF5 file."""
    with import_h5py().File(path, "r") as file:
        shape, dtype = _shape(path, file.get("features"), list(file))

    def read() -> np.ndarray:
        with import_h5py().File(path, "r") as file:
            return np.asarray(file["features"])

    return _contents(path, choice, read, shape, dtype)


@image_format(
    "features in Zarr", endings=(), recognises=lambda path, start: is_feature_group(path), before=("OME-Zarr and Zarr",)
)
def open_zarr(path: Path, choice: Choice) -> Contents:
    """Open the features in a Zarr group."""
    import zarr

    array = zarr.open_group(path, mode="r")["features"]
    shape, dtype = _shape(path, array, [])
    return _contents(path, choice, lambda: np.asarray(array[:]), shape, dtype)  # type: ignore[index]


def is_feature_group(path: Any) -> bool:
    """Return True if `path` is a Zarr group with the arrays of a file of features."""
    return isinstance(path, Path) and all((path / name / "zarr.json").is_file() for name in ("features", "coords"))


def _shape(path: Path, array: Any, names: list[str]) -> tuple[tuple[int, int], np.dtype]:
    """Return the shape (n, D) and the type of `array`, which may have a first axis of 1."""
    shape: tuple[int, ...] = getattr(array, "shape", ())
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or 0 in shape:
        found = f"features of shape {tuple(array.shape)}" if shape else f"{', '.join(names[:_SHOWN]) or 'no array'}"
        raise cannot_read(path, f"it has {found}; expected an array features (n, D), of one patch at least")
    return (shape[0], shape[1]), np.dtype(array.dtype)


def _contents(
    path: Path, choice: Choice, read: Callable[[], np.ndarray], shape: tuple[int, int], dtype: np.dtype
) -> Contents:
    """Return the image of one row that the features which `read` gives are."""
    row = DeferredArray(PerProcess(lambda: read().reshape(1, *shape)), (1, *shape), dtype)
    return one_image(path, choice, ArrayPixels(row, "YXC"))


def read_features(path: str | Path) -> PatchFeatures:
    """Read a file of features, see the module.

    Raises:
        ImageReadError: The file has no such arrays.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file of features {path}")
    if is_feature_group(path):
        import zarr

        return _read(path, zarr.open_group(path, mode="r"))
    with import_h5py().File(path, "r") as file:
        return _read(path, file)


def _read(path: Path, group: Any) -> PatchFeatures:
    names = list(group)
    if not {"features", "coords"} <= set(names):
        raise cannot_read(path, f"it has the arrays {', '.join(names[:_SHOWN])}; expected features and coords")
    shape, _ = _shape(path, group["features"], names)
    coords = group["coords"]
    return PatchFeatures(
        np.asarray(group["features"][:]).reshape(shape), np.asarray(coords[:]).reshape(-1, 2), dict(coords.attrs)
    )


def import_h5py() -> Any:
    """Return the module h5py. Raises MissingExtraError if it is not installed."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingExtraError("a file of features (HDF5)", "h5py", "hdf5") from error
    return h5py
