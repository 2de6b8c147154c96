"""The Lightning modules train as plain PyTorch does, step for step, and keep their names."""

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from tests.streaming.exactness import plain_reference, randomise, relative_error
from widefield.modules import BaseModule, ImageNetClassifier, StreamingModule
from widefield.streaming import StreamingCNN


def trunk() -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)))


def head() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Pictures(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 33, 40, generator=torch.Generator().manual_seed(index), dtype=torch.float64), index % 2


class Lazy:
    def __init__(self, height: int, width: int) -> None:
        self.pixels = np.random.default_rng(height).integers(0, 255, (3, height, width), dtype=np.uint8)
        self.shape, self.dtype = self.pixels.shape, self.pixels.dtype

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        return self.pixels[:, y : y + height, x : x + width]


def trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def test_training_agrees_with_plain_pytorch_step_for_step() -> None:
    module = StreamingModule(trunk(), head(), (8, None), nn.CrossEntropyLoss(), lr=0.01).double()
    plain = plain_reference(nn.Sequential(trunk(), head())).double()
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(2):
        for image, target in DataLoader(Pictures(), batch_size=2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(plain(image), target).backward()
            optimiser.step()
    trainer().fit(module, DataLoader(Pictures(), batch_size=2))
    found = [*module.stream_network.module.parameters(), *module.head.parameters()]
    for p, q in zip(found, plain.parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) < 1e-8


def test_loss_and_metrics_are_logged_per_phase_and_cloned() -> None:
    metrics = MulticlassAccuracy(2)
    module = ImageNetClassifier(trunk(), head(), 16, nn.CrossEntropyLoss(), metrics=metrics).double()
    run = trainer()
    loader = DataLoader(Pictures(), batch_size=2)
    run.fit(module, loader, loader)
    assert {"train_loss", "val_loss", "train_MulticlassAccuracy", "val_MulticlassAccuracy"} <= set(run.callback_metrics)
    assert metrics.update_count == 0
    run.test(module, loader, verbose=False)
    assert "test_loss" in run.callback_metrics
    predictions = run.predict(module, loader)
    assert predictions is not None and torch.allclose(torch.cat(predictions).sum(1), torch.ones(6, dtype=torch.float64))


def test_attributes_and_checkpoint_keys_are_fixed() -> None:
    module = StreamingModule(trunk(), head(), 16, nn.CrossEntropyLoss())
    assert isinstance(module.stream_network, StreamingCNN)
    assert isinstance(module.loss_fn, nn.CrossEntropyLoss)
    expected = {f"stream_network.module.{key}" for key in trunk().state_dict()} | {
        f"head.{key}" for key in head().state_dict()
    }
    assert set(module.state_dict()) == expected


def test_a_frozen_trunk_does_not_train() -> None:
    module = StreamingModule(trunk(), head(), 16, nn.CrossEntropyLoss(), train_streaming_layers=False)
    before = copy.deepcopy(module.stream_network.state_dict())
    module.training_step_loss = module.loss_fn(module(torch.rand(1, 3, 20, 20)), torch.tensor([1]))
    module.training_step_loss.backward()
    assert all(p.grad is None for p in module.stream_network.parameters())
    assert all(p.grad is not None for p in module.head.parameters())
    assert all(torch.equal(before[key], value) for key, value in module.stream_network.state_dict().items())


def test_lazy_images_of_different_sizes_make_one_batch() -> None:
    module = StreamingModule(trunk(), head(), 16, nn.CrossEntropyLoss())
    images = [Lazy(30, 40), Lazy(25, 33)]
    assert module(images).shape == (2, 2)
    assert module.transfer_batch_to_device((images, torch.tensor([0, 1])), torch.device("cpu"), 0)[0][0] is images[0]


def test_a_module_without_loss_says_what_is_missing() -> None:
    module = BaseModule(trunk())
    assert module(torch.rand(1, 3, 20, 20)).shape[1] == 4
    with pytest.raises(ValueError, match="loss_fn"):
        module.training_step((torch.rand(1, 3, 20, 20), torch.tensor([1])), 0)
