"""A few random images in the files of CIFAR, for tests."""

import pickle
from pathlib import Path

import numpy as np

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar10(root: Path, per_batch: int = 8, batches: int = 2, classes: int = 10) -> None:
    """Batches of noise around a level that depends on the class."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{k + 1}" for k in range(batches)), "test_batch"]:
        labels = [k % classes for k in range(per_batch)]
        levels = np.array(labels, np.uint8)[:, None] * np.uint8(200 // classes)
        pixels = generator.integers(0, 40, (per_batch, 3072), dtype=np.uint8) + levels
        _dump(folder / name, {"data": pixels, "labels": labels})
    _dump(folder / "batches.meta", {"label_names": CIFAR10_NAMES[:classes]})


def _dump(path: Path, content: object) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=2)
