"""Callbacks of `fit`: the numbers of every epoch, in a file that is whole at any time, and what a step needs at its peak."""

import csv
import io
import logging
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from widefield.reports import PeakMemory
from widefield.writing import replacing

_log = logging.getLogger(__name__)


class History(Callback):
    """Collects the logged numbers of each epoch and writes them to a CSV file; a resumed run goes on with its rows.

    Attributes:
        rows: The numbers of each epoch.
        has_started: Whether training began, all that a checkpoint holds being loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.has_started = False
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_started = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        self.rows.append({"epoch": trainer.current_epoch + 1, **numbers})
        write_csv(self._path, self.rows)
        lost = [name for name, value in numbers.items() if name.endswith("loss") and not math.isfinite(value)]
        if lost:
            _log.warning("%s is no number any more; try a smaller learning rate, or 32 bits", " and ".join(lost))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        _log.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, shown)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows`, which share their keys, with a header; whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


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
