"""Small trained models, for tests."""

from pathlib import Path
from typing import Any

import yaml

from tests.data.cifar_files import write_cifar10
from widefield.cli import main

CLASSIFIER: dict[str, Any] = {
    "type": "ImageClassifier",
    "backbone": {
        "type": "ResNet_CIFAR",
        "depth": 18,
        "stem_channels": 4,
        "base_channels": 4,
        "num_stages": 2,
        "out_indices": [1],
    },
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 2, "in_channels": 8, "cal_acc": True},
}


def cifar_config(root: Path) -> dict[str, Any]:
    """A configuration that trains `CLASSIFIER` for two epochs on random images in the files of CIFAR."""
    write_cifar10(root, classes=2)
    cifar = {"type": "CIFAR10", "root": str(root)}
    return {
        "model": CLASSIFIER,
        "data": {
            "type": "Datasets",
            "train": {**cifar, "transforms": [{"type": "RandomHorizontalFlip"}]},
            "val": {**cifar, "train": False},
            "batch_size": 4,
        },
        "metrics": [{"type": "Accuracy", "topk": [1, 2]}, {"type": "ConfusionMatrix"}, {"type": "AveragePrecision"}],
        "trainer": {"max_epochs": 2, "enable_progress_bar": False},
        "optimizer": {"type": "SGD", "lr": 0.05},
    }


def write_run(folder: Path, config: dict[str, Any]) -> Path:
    """The folder of a run of `config`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"
