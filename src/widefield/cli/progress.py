"""The progress of a training or an evaluation, for its line."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from widefield.cli.run import console
from widefield.modules import BaseModule
from widefield.reports import ProgressLine
from widefield.streaming import StreamingCNN


def streamed_network(model: Any) -> StreamingCNN | None:
    """Return the part of a model that is streamed, the trunk or a backbone, if there is one."""
    if isinstance(model, BaseModule):
        return model.stream_network
    network: StreamingCNN | None = getattr(getattr(model, "backbone", None), "streamed", None)
    return network


class StreamingProgress(ProgressBar):
    """The line of `ProgressLine` about the images of a Lightning trainer: those of the epoch, or of a validation or test."""

    def __init__(self) -> None:
        super().__init__()
        self._line: ProgressLine | None = None

    def disable(self) -> None:
        self._stop()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._line is None and trainer.is_global_zero:
            unit = "image" if getattr(getattr(trainer, "datamodule", None), "batch_size", 1) == 1 else "batch"
            self._line = ProgressLine(streamed_network(pl_module), unit, console).__enter__()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = f"loss {float(outputs['loss']):.3f}" if isinstance(outputs, dict) and "loss" in outputs else ""
        self._training(trainer, batch_idx + 1, loss)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *others: int
    ) -> None:
        self._evaluation("validation", batch_idx, sum(trainer.num_val_batches))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *others: int
    ) -> None:
        self._evaluation("test", batch_idx, sum(trainer.num_test_batches))

    def _training(self, trainer: Trainer, done: int, loss: str = "") -> None:
        epochs, total = trainer.max_epochs or -1, self.total_train_batches
        known = epochs > 0 and 0 < total < math.inf
        share = (trainer.current_epoch + done / total) / epochs if known else math.nan
        if self._line is not None:
            name = (
                f"epoch {trainer.current_epoch + 1} of {epochs}" if epochs > 0 else f"epoch {trainer.current_epoch + 1}"
            )
            self._line.update(done, total, name, loss, share)

    def _evaluation(self, name: str, done: int, total: float) -> None:
        if self._line is not None:
            in_training = self.trainer.state.fn == TrainerFn.FITTING
            self._line.update(done, total, name, share=self._line.share if in_training else None)

    def _stop(self) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
            self._line = None
