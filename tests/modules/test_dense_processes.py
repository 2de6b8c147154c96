"""`DenseModule` over several processes, which share each image or see different ones: the losses, scores and weights of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests.fresh import fresh
from tests.modules.test_dense_module import image, labels, module, network
from tests.modules.test_split_images import train_in
from widefield.data import EpochShuffle
from widefield.modules import SplitImages

SIZES = [(45, 51), (38, 44), (38, 44), (45, 51)]
TOLERANCE = 1e-11
"""Relative, of numbers of 64 bits that differ by the order in which they are summed, through 2 steps of AdamW."""


class Pairs(LightningDataModule):
    """Images of several sizes with their label maps."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = [(image(1, size), labels(1, size)) for size in SIZES]

    def train_dataloader(self) -> Any:
        return self._loader(EpochShuffle.of(len(SIZES), 3, self.trainer))

    def val_dataloader(self) -> Any:
        return self._loader(None)

    def _loader(self, sampler: Any) -> Any:
        return DataLoader(self.pairs, 1, sampler=sampler, collate_fn=lambda batch: batch[0])


def train(file: Path, strategy: Any = "auto", processes: int = 1) -> None:
    """Train on two images a step, and write weights, numbers and the confusion matrix to `file`."""
    dense = module(network(stride=2), loss="dice", lr=1e-2)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(
        strategy=strategy, devices=processes, accelerator="cpu", precision="64-true", max_epochs=1,
        accumulate_grad_batches=1 if isinstance(strategy, DDPStrategy) and not isinstance(strategy, SplitImages) else 2,
        num_sanity_val_steps=0, **quiet,
    )  # fmt: skip
    trainer.fit(dense, Pairs())
    if trainer.is_global_zero:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        confusion = dense.tables["val_confusion_matrix"]
        torch.save({"weights": dense.state_dict(), "numbers": numbers, "confusion": confusion}, file)


@fresh
def test_two_processes_that_share_images_or_see_different_ones_train_and_count_as_one(tmp_path: Path) -> None:
    train_in(2, tmp_path / "shared", SplitImages(), train)
    train_in(2, tmp_path / "different", DDPStrategy(), train)
    train(tmp_path / "one")
    shared, different, expected = (torch.load(tmp_path / name) for name in ("shared", "different", "one"))
    assert {"train_loss", "val_loss", "val_mean_iou", "val_dice", "val_accuracy"} <= set(expected["numbers"])
    assert int(expected["confusion"].sum()) == sum(int((labels(1, size) != 255).sum()) for size in SIZES)
    for found in (shared, different):
        for name, value in expected["weights"].items():
            assert (found["weights"][name] - value).abs().max() <= TOLERANCE * value.abs().max(), name
        assert found["numbers"] == pytest.approx(expected["numbers"], rel=1e-6)  # Lightning logs 32 bits
        assert torch.equal(found["confusion"], expected["confusion"])
