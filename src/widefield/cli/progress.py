"""Progress bars with images and tiles."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from widefield.cli.run import console
from widefield.modules import BaseModule
from widefield.streaming import StreamingCNN


def make_progress() -> Progress:
    """A rich progress display with a description, a bar, "done/total" and the time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def tile_bar(progress: Progress) -> Callable[[str, int, int], None]:
    """A bar for the tiles of the image that is being streamed: what to set as `StreamingCNN.progress`."""
    task = progress.add_task("tiles", total=None)

    def update(phase: str, done: int, total: int) -> None:
        progress.update(task, description=f"  tiles, {phase}", completed=done, total=total)

    return update


def streamed_network(model: Any) -> StreamingCNN | None:
    """Return the part of a model that is streamed, the trunk or a backbone, if there is one."""
    if isinstance(model, BaseModule):
        return model.stream_network
    network: StreamingCNN | None = getattr(getattr(model, "backbone", None), "streamed", None)
    return network


class StreamingProgress(ProgressBar):
    """Two bars: the images of the epoch, and the tiles of the image at hand."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._images: TaskID | None = None

    def disable(self) -> None:
        self._stop()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._progress is None and trainer.is_global_zero:
            self._progress = make_progress()
            self._images = self._progress.add_task("", total=None)
            self._progress.start()
            network = streamed_network(pl_module)
            if network is not None:
                network.progress = tile_bar(self._progress)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        network = streamed_network(pl_module)
        if network is not None:
            network.progress = None
        self._stop()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", 0, self.total_train_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = f", loss {float(outputs['loss']):.3f}" if isinstance(outputs, dict) and "loss" in outputs else ""
        self._show(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{loss}", batch_idx + 1, self.total_train_batches
        )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *others: int
    ) -> None:
        self._show("validation", batch_idx + 1, sum(trainer.num_val_batches))

    def _show(self, description: str, done: int, total: float) -> None:
        if self._progress is not None and self._images is not None:
            self._progress.update(self._images, description=description, completed=done, total=total)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
