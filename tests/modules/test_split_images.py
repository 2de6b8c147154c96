"""Training in which several processes share each image: that of one process, or of as many as there are groups."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAUROC

import widefield
from tests.fresh import SERVER, fresh
from tests.small_images import CLASSES, write_tiff
from widefield.cli import main
from widefield.data import EpochShuffle
from widefield.modules import ImageNetClassifier, SplitImages

EPOCHS = 2
TOLERANCE = 1e-11
"""Relative, of numbers of 64 bits that differ by the order in which they are summed, through 8 steps of AdamW."""


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images of several sizes, with noise that is drawn anew for each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 50 + 9 * (index % 3), 40, dtype=torch.float64, generator=generator)
        return image + torch.randn_like(image), index % 2


class Network(ImageNetClassifier):
    """A small network with random masks in the trunk and in the head."""

    def __init__(self) -> None:
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 8, 3), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 2))
        metrics = {"auc": MulticlassAUROC(2)}
        super().__init__(trunk, head, (16, 24), nn.CrossEntropyLoss(), metrics=metrics, value_range=(0, 1), lr=0.01)
        self.images = SumMetric()

    def train_dataloader(self) -> Any:
        data = Images()
        return DataLoader(data, sampler=EpochShuffle.of(len(data), 3, self.trainer))

    def val_dataloader(self) -> Any:
        return DataLoader(Images())

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.images.update(len(batch[1]))
        self.log("images", self.images)
        return super().validation_step(batch, batch_idx)


class Numbers(Callback):
    """Keeps the logged numbers of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(file: Path, strategy: Any = "auto", processes: int = 1) -> None:
    """Train the network, and write its weights and numbers to `file`."""
    seed_everything(5, verbose=False)
    model, numbers = Network(), Numbers()
    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")}
    trainer = Trainer(
        strategy=strategy, devices=processes, accelerator="cpu", precision="64-true", max_epochs=EPOCHS,
        num_sanity_val_steps=0, callbacks=[numbers], **quiet,
    )  # fmt: skip
    trainer.fit(model)
    if trainer.is_global_zero:
        assert isinstance(model.stream_network(torch.zeros(1, 3, 40, 40, dtype=torch.float64)), Tensor)  # alone
        torch.save({"weights": model.state_dict(), "numbers": numbers.epochs}, file)


def train_as(rank: int, processes: int, port: int, file: Path, strategy: Any) -> None:
    """Train as one of the processes that torchrun starts."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
    }
    torch.set_num_threads(1)  # renews torch's pool of threads after the fork
    train(file, strategy, processes)


def train_in(processes: int, file: Path, strategy: Any) -> None:
    """Train in several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=train_as, args=(k, processes, port, file, strategy)) for k in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes


def assert_same(found: Path, expected: Path) -> None:
    one, other = torch.load(found), torch.load(expected)
    for name, value in other["weights"].items():
        assert (one["weights"][name] - value).abs().max() <= TOLERANCE * value.abs().max(), name
    assert len(one["numbers"]) == EPOCHS
    assert {"train_loss", "val_loss", "val_auc", "images"} < set(one["numbers"][0])
    for numbers, right in zip(one["numbers"], other["numbers"], strict=True):
        assert numbers == pytest.approx(right, rel=1e-6)  # Lightning logs 32 bits
        assert numbers["images"] == len(Images())


@fresh
def test_processes_that_share_each_image_train_as_one(tmp_path: Path) -> None:
    train_in(2, tmp_path / "shared", SplitImages())
    train(tmp_path / "alone")
    assert_same(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.slow
@fresh
def test_two_groups_of_processes_train_as_two_processes(tmp_path: Path) -> None:
    train_in(4, tmp_path / "groups", SplitImages(2))
    train_in(2, tmp_path / "replicas", DDPStrategy())
    assert_same(tmp_path / "groups", tmp_path / "replicas")
