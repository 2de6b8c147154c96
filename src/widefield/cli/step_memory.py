"""What a training step needs at its peak."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from widefield.reports import PeakMemory


class StepMemory(Callback):
    """Measures the peak memory of training above that between steps, from the second step on.

    The first one leaves what is there between all others: gradients, the optimizer's state, code that had not run before.
    """

    def __init__(self) -> None:
        self._memory: PeakMemory | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._memory is None:
            self._memory = PeakMemory(trainer.strategy.root_device)

    @property
    def peak(self) -> int | None:
        """Bytes; None after less than two steps, and where the system does not tell."""
        return None if self._memory is None else self._memory.bytes_above_start()
