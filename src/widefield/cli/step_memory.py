"""Peak memory of a training step."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from widefield.reports import PeakMemory


class StepMemory(Callback):
    """Measures the peak memory of training steps above that between them, from the second one on.

    The first one leaves what is there between all others: gradients, the optimizer's state, code that had not run before.
    `peak` is in bytes; None after less than two steps, and where the system does not tell.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._memory: PeakMemory | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._memory is None and trainer.global_step > 0:
            self._memory = PeakMemory(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        found = None if self._memory is None else self._memory.bytes_above_start()
        if found is not None:
            self.peak = max(found, self.peak or 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory = None  # what a validation needs does not count
