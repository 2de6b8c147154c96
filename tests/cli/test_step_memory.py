"""The peak of training steps: from the second on, without what validation needs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from widefield.cli.history import StepMemory
from widefield.reports import PeakMemory


def test_steps_count_and_validation_does_not() -> None:
    if PeakMemory(torch.device("cpu")).bytes_above_start() is None:
        pytest.skip("this system does not tell the peak memory")
    memory = StepMemory()
    trainer: Any = SimpleNamespace(global_step=0, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    module: Any = None

    def step(mebibytes: int) -> None:
        memory.on_train_batch_start(trainer, module)
        torch.ones(mebibytes << 20, dtype=torch.uint8)
        memory.on_train_batch_end(trainer, module)

    step(300)
    assert memory.peak is None, "the first step"
    trainer.global_step = 1
    step(64)
    memory.on_validation_start(trainer, module)
    torch.ones(300 << 20, dtype=torch.uint8)
    step(32)
    assert memory.peak is not None and 60 << 20 <= memory.peak <= 150 << 20
