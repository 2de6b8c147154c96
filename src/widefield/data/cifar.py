"""CIFAR-10 and CIFAR-100, as their authors pickled them."""

import codecs
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from widefield.components.transforms.masks import MaskGeneratorConfig
from widefield.config import checked
from widefield.data.described import DescribedDataset
from widefield.data.pipeline import Picture, TransformsConfig
from widefield.data.tables import LabelError
from widefield.registry import DATASETS

_SIDE = 32
_ALLOWED = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,
    "multiarray._reconstruct": np.empty(0).__reduce_ex__(2)[0],
    "numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
}
"""The functions that rebuild an array; modules of NumPy by their last part, as their home differs between versions."""


@DATASETS.register_module()
class CIFAR10(DescribedDataset):
    """CIFAR-10: 32 x 32 pixels, ten classes (Krizhevsky, 2009).

    Nothing is downloaded: `root` holds the folder `cifar-10-batches-py` of the unpacked archive, or is that folder. Batches may
    have any number of images. Pickles are read without executing what they hold: arrays and plain data are all that is allowed.

    Args:
        root: The folder.
        train: The training images, all `data_batch_*`; False the test images, `test_batch`.
        transforms: See `Pipeline`.
        mask_generator: Gives each sample a random `mask`.

    Raises:
        FileNotFoundError: There are no such files.
        LabelError: A file has another content.
    """

    folder: ClassVar[str] = "cifar-10-batches-py"
    batches: ClassVar[dict[bool, str]] = {True: "data_batch_*", False: "test_batch"}
    meta: ClassVar[tuple[str, str]] = ("batches.meta", "label_names")
    labels_key: ClassVar[str] = "labels"

    @checked
    def __init__(
        self,
        root: Path,
        train: bool = True,
        transforms: TransformsConfig = None,
        mask_generator: MaskGeneratorConfig = None,
    ) -> None:
        super().__init__(transforms, mask_generator)
        root = Path(root)
        folder = root / self.folder if (root / self.folder).is_dir() else root
        files = sorted(folder.glob(self.batches[train]))
        if not files:
            raise FileNotFoundError(
                f"there is no {self.batches[train]} in {folder}; give the folder that holds the unpacked {self.folder}"
            )
        name, key = self.meta
        self.class_names = _names(folder / name, key) if (folder / name).is_file() else None
        contents = [(file, _read(file)) for file in files]
        for file, content in contents:
            data, labels = content.get("data"), content.get(self.labels_key, ())
            if not isinstance(data, np.ndarray) or data.shape[1:] != (3 * _SIDE**2,) or len(labels) != len(data):
                raise LabelError(
                    f"{file} has no data (N, 3072) with {self.labels_key}; give the python version of the archive"
                )
        self._pixels = np.concatenate([content["data"] for _, content in contents]).reshape(-1, 3, _SIDE, _SIDE)
        self._labels = [int(label) for _, content in contents for label in content[self.labels_key]]

    def __len__(self) -> int:
        return len(self._labels)

    def picture(self, index: int) -> Picture:
        return torch.from_numpy(self._pixels[index].copy())

    def label(self, index: int) -> int:
        return self._labels[index]


@DATASETS.register_module()
class CIFAR100(CIFAR10):
    """CIFAR-100: 32 x 32 pixels, a hundred classes.

    Args:
        root: The folder that holds `cifar-100-python`, or that folder.
        train: The training images; False the test images.
        transforms: See `Pipeline`.
        mask_generator: Gives each sample a random `mask`.
    """

    folder = "cifar-100-python"
    batches: ClassVar[dict[bool, str]] = {True: "train", False: "test"}
    meta = ("meta", "fine_label_names")
    labels_key = "fine_labels"


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays and plain data; whatever else a pickle names may be code."""

    def find_class(self, module: str, name: str) -> Any:
        made = _ALLOWED.get(f"{module.removeprefix('numpy.core.').removeprefix('numpy._core.')}.{name}")
        if made is None:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only arrays and plain data are allowed")
        return made


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = _ArraysOnly(opened, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, ImportError) as error:
        raise LabelError(f"{file} cannot be read as a batch of CIFAR: {error}") from error
    if not isinstance(content, dict):
        raise LabelError(f"{file} holds a {type(content).__name__}, not a batch of CIFAR")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def _names(file: Path, key: str) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in _read(file)[key]]
