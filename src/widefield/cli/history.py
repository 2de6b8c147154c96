"""Records that `fit` keeps of a run: the numbers of every epoch, the memory of a step, and what was predicted last."""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from widefield.models import Classifier
from widefield.reports import PeakMemory
from widefield.writing import write_csv

_log = logging.getLogger(__name__)


class History(Callback):
    """Collects the logged numbers of each epoch and writes them to a CSV file; a resumed run goes on with its rows.

    Beside what is logged are the least and the greatest loss of the training steps, as `train_loss_min` and `train_loss_max`.

    Attributes:
        rows: The numbers of each epoch.
        has_started: Whether training began, all that a checkpoint holds being loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.has_started = False
        self.rows: list[dict[str, float]] = []
        self._losses: tuple[Tensor, Tensor] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_started = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:  # stays on the device, so that nothing waits for it
            loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
            low, high = self._losses or (loss, loss)
            self._losses = torch.minimum(low, loss), torch.maximum(high, loss)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        ends = {
            f"train_loss_{name}": float(trainer.strategy.reduce(value, reduce_op=name))
            for name, value in zip(("min", "max"), self._losses or (), strict=False)
        }
        self.rows.append({"epoch": trainer.current_epoch + 1, **numbers, **ends})
        if trainer.is_global_zero:
            write_csv(self._path, self.rows)
        lost = [name for name, value in numbers.items() if name.endswith("loss") and not math.isfinite(value)]
        if lost:
            _log.warning("%s is no number any more; try a smaller learning rate, or 32 bits", " and ".join(lost))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        _log.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, shown)


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


class Seen(NamedTuple):
    """An image of a validation, what was predicted (K,) and the target, a number or (K,)."""

    image: Any
    predicted: Tensor
    target: Tensor


class LastValidation(Callback):
    """Keeps what a `Classifier` predicted in the last validation, `images` of this process."""

    def __init__(self) -> None:
        self.images: list[Seen] = []
        self._output: Any = None
        self._hook: Any = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images = []
        if isinstance(pl_module, Classifier):
            self._hook = pl_module.register_forward_hook(self._keep)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        if self._hook is not None and self._output is not None:
            found = pl_module.predictions(self._output).float().cpu()
            self.images += map(Seen, batch[0], found, batch[1].cpu())
            self._output = None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _keep(self, module: Any, arguments: Any, output: Tensor) -> None:
        self._output = output.detach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
