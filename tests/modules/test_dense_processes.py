"""`DenseModule` over several processes, which share each image or see different ones: the losses, scores and weights of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from tests.fresh import fresh
from tests.modules.test_dense_module import image, labels, module, network
from tests.modules.test_split_images import train_in
from widefield.modules import SplitImages

SIZES = [(45, 51), (38, 51), (45, 30), (52, 44)]
TOLERANCE = 1e-11
"""Relative, of numbers of 64 bits that differ by the order in which they are summed, through 4 steps of AdamW."""


def train(file: Path, strategy: Any = "auto", processes: int = 1) -> None:
    """Train on two images a step, for two epochs, and write weights, numbers and the confusion matrix to `file`."""
    dense = module(network(stride=2), loss="dice", lr=1e-2)
    pairs = [(image(1, size), labels(1, size)) for size in SIZES]
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(
        strategy=strategy, devices=processes, accelerator="cpu", precision="64-true", max_epochs=2,
        accumulate_grad_batches=1 if isinstance(strategy, DDPStrategy) and not isinstance(strategy, SplitImages) else 2,
        num_sanity_val_steps=0, **quiet,
    )  # fmt: skip
    loader = DataLoader(pairs, 1, collate_fn=lambda batch: batch[0])
    trainer.fit(dense, loader, loader)
    if trainer.is_global_zero:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        confusion = dense.tables["val_confusion_matrix"]
        torch.save({"weights": dense.state_dict(), "numbers": numbers, "confusion": confusion}, file)


@fresh
@pytest.mark.parametrize("shared", [True, False], ids=["shared images", "different images"])
def test_two_processes_train_and_count_as_one(tmp_path: Path, shared: bool) -> None:
    train_in(2, tmp_path / "two", SplitImages() if shared else DDPStrategy(), train)
    train(tmp_path / "one")
    found, expected = (torch.load(tmp_path / name) for name in ("two", "one"))
    for name, value in expected["weights"].items():
        assert_near(found["weights"][name], value)
    assert {"train_loss", "val_loss", "val_mean_iou", "val_dice", "val_accuracy"} <= set(expected["numbers"])
    assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-6)  # Lightning logs 32 bits
    assert torch.equal(found["confusion"], expected["confusion"])
    counted = sum(int((labels(1, size) != 255).sum()) for size in SIZES)
    assert int(expected["confusion"].sum()) == counted


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
