"""Callbacks of a run."""

import csv
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ClassVar, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelCheckpoint

from widefield.modules import FiniteTraining
from widefield.pretraining.dataset import BadImage, Batch
from widefield.pretraining.labels import Labels
from widefield.pretraining.observe import Quality, QualityArgs, Report, ReportArgs
from widefield.pretraining.out import OutFolder
from widefield.pretraining.settings import Count
from widefield.registry import Range
from widefield.writing import write_torch_file

_log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM
"""Exit code of what shells see end by SIGTERM."""


class SaveLast(Callback):
    """Writes the last checkpoint between two optimizer steps: when it is old, and when the run is told to stop.

    Args:
        path: Of the checkpoint; None writes none, and only stops.
        seconds: Since it was written here that make it old; None: none do.
        at_end: Write it at the end of training too, where nothing else does.
    """

    def __init__(self, path: Path | None, seconds: float | None, at_end: bool) -> None:
        self._path, self._seconds, self._at_end = path, seconds, at_end
        self._saved = time.monotonic()
        self._received: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # others may not
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = self._received is not None
        old = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        if not trainer.strategy.reduce_boolean_decision(stop or old, all=False):
            return
        if self._path is not None:
            trainer.save_checkpoint(self._path)
        self._saved = time.monotonic()
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            raise SystemExit(TERMINATED) if self._received == signal.SIGTERM else KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._path is not None and self._at_end:
            trainer.save_checkpoint(self._path)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:  # the second time at once
            raise SystemExit(TERMINATED) if number == signal.SIGTERM else KeyboardInterrupt
        self._received = number
        with suppress(RuntimeError):  # the signal came while a line was being written
            _log.info("%s: stopping after this step; once more stops at once", signal.Signals(number).name)

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def leave_signals(worker: int) -> None:
    """In a worker process, which gets the signals of its group: they are for the main process, which needs it to end its step.

    A second SIGTERM is that of the main process, which ends its workers so.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(0)
        received.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, receive)


def _check_monitor(name: str | None) -> None:
    if name is not None and name.startswith(("val", "test")):
        raise ValueError(f"monitor={name!r} is not logged, because nothing is validated; give train_loss, for example")


@dataclass(frozen=True)
class LearningRateArgs:
    """Logs the learning rates."""

    logging_interval: Literal["step", "epoch"] = "step"


@dataclass(frozen=True)
class EarlyStoppingArgs:
    """Ends the run when `patience` epochs did not improve the loss, or another monitored number is not finite."""

    monitor: str = "train_loss"
    patience: int = 10**12
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"
    check_finite: bool = True

    def __post_init__(self) -> None:
        _check_monitor(self.monitor)


@dataclass(frozen=True)
class ExportArgs:
    """Writes the weights of the model."""

    every_n_epochs: Count = 1


@dataclass(frozen=True)
class CheckpointArgs:
    """Writes checkpoints: at the end of epochs, every so many steps or after some time, and the last one every so many minutes
    beside. All but `every_n_minutes` are Lightning's.
    """

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "dirpath": (None, "checkpoints lie in the folder checkpoints of out, where resume_interrupted looks for them"),
        "save_weights_only": (False, "exported_models/exported_last.pt has the weights alone"),
        "save_on_exception": (False, "Ctrl-C and SIGTERM write a checkpoint, and every_n_minutes does"),
    }
    every_n_epochs: Annotated[int, Range(0)] | None = None
    every_n_train_steps: Annotated[int, Range(0)] | None = None
    train_time_interval: timedelta | None = None
    every_n_minutes: float | None = 10.0
    save_last: bool = True
    save_top_k: int = 1
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    filename: str | None = None
    auto_insert_metric_name: bool = True
    verbose: bool = False
    save_on_train_epoch_end: bool | None = None
    enable_version_counter: bool = False

    def __post_init__(self) -> None:
        every = ("every_n_epochs", "every_n_train_steps", "train_time_interval")
        given = [name for name in every if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were both given; give one of them")
        if self.monitor is None and self.save_top_k > 1:
            raise ValueError(
                f"save_top_k={self.save_top_k} needs a monitor that says which are best, such as train_loss"
            )
        _check_monitor(self.monitor)


@dataclass(frozen=True)
class DeviceStatsArgs:
    """Logs what the device says of itself."""

    cpu_stats: bool | None = None


@dataclass(frozen=True)
class CallbackArgs:
    """The callbacks of a run; None turns one off."""

    learning_rate_monitor: LearningRateArgs | None = field(default_factory=LearningRateArgs)
    early_stopping: EarlyStoppingArgs | None = field(default_factory=EarlyStoppingArgs)
    model_export: ExportArgs | None = field(default_factory=ExportArgs)
    model_checkpoint: CheckpointArgs | None = field(default_factory=CheckpointArgs)
    device_stats_monitor: DeviceStatsArgs | None = None
    quality: QualityArgs | None = field(default_factory=QualityArgs)
    report: ReportArgs | None = field(default_factory=ReportArgs)


def make_callbacks(args: CallbackArgs, out: OutFolder, has_logger: bool, labels: Labels | None) -> list[Callback]:
    """The callbacks of a run on images with these labels."""
    callbacks: list[Callback] = [FiniteTraining(), Speed(), BadImages(out.bad_images)]
    quality = None if args.quality is None else Quality(args.quality, labels)
    if quality is not None:
        callbacks.append(quality)
    if args.learning_rate_monitor is not None and has_logger:
        callbacks.append(LearningRateMonitor(**asdict(args.learning_rate_monitor)))
    if args.device_stats_monitor is not None and has_logger:
        callbacks.append(DeviceStatsMonitor(**asdict(args.device_stats_monitor)))
    if args.early_stopping is not None:
        callbacks.append(EarlyStopping(**asdict(args.early_stopping), check_on_train_epoch_end=True))
    if args.model_export is not None:
        callbacks.append(Export(out.exported, args.model_export.every_n_epochs))
    saving = args.model_checkpoint
    by_steps = saving is not None and (saving.every_n_train_steps, saving.train_time_interval) != (None, None)
    if saving is not None:
        options = asdict(saving)
        del options["every_n_minutes"]
        if saving.every_n_epochs is None and not by_steps:
            options["every_n_epochs"] = 1
        if saving.save_on_train_epoch_end is None:
            options["save_on_train_epoch_end"] = not by_steps
        callbacks.append(ModelCheckpoint(out.checkpoints, **options))
    if args.report is not None:
        callbacks.append(Report(out, quality))
    keeps_last = saving is not None and saving.save_last
    minutes = saving.every_n_minutes if saving is not None and keeps_last else None
    callbacks.append(SaveLast(out.last if keeps_last else None, None if minutes is None else 60 * minutes, by_steps))
    return callbacks


class StopAfter(Callback):
    """Ends training after so many optimizer steps.

    With `max_steps` Lightning 2.6 skips a whole epoch when it resumes at the end of one, so that is not used.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.global_step >= self._steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self._steps


class Speed(Callback):
    """Logs images per second, and how long a step takes and waits for its data."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()
        self._waited = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._began = time.perf_counter()
        self._waited = self._began - self._ended

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        took, self._ended = now - self._began, now
        count = len(batch.names)
        numbers = {"profiling/batch_time": took, "profiling/data_time": self._waited}
        pl_module.log_dict(numbers, batch_size=count)
        total = took + self._waited
        pl_module.log("images_per_second", count * trainer.world_size / total, prog_bar=True, batch_size=count)
        pl_module.log("data_wait", self._waited / total, prog_bar=True, batch_size=count)


class BadImages(Callback):
    """Lists the images that had to be skipped, each once, in a CSV file with the columns image and reason."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as file:
                self._known = {row[0] for row in csv.reader(file) if row} - {"image"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        for bad in batch.bad:
            if bad.name not in self._known:
                first = "skipped an image: %s; %s lists all that are skipped"
                _log.log(logging.DEBUG if self._known else logging.WARNING, first, bad.reason, self._path.name)
                self._known.add(bad.name)
                self._list(bad)
        pl_module.log("bad_images", float(len(self._known)), batch_size=len(batch.names))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._known:
            _log.warning("%d images could not be read and were skipped: %s", len(self._known), self._path)

    def _list(self, bad: BadImage) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(["image", "reason"])
            writer.writerow(bad)


class Export(Callback):
    """Writes the state dict of the model that is trained, whole or not at all, every so many epochs and at the end."""

    def __init__(self, path: Path, every_n_epochs: int) -> None:
        self._path, self._every = path, every_n_epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self._every == 0:
            self.export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch % self._every:  # else it is written already
            self.export(trainer, pl_module)

    def export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it now."""
        if trainer.is_global_zero:
            model: Any = pl_module.method.exported().wrapped_model.get_model()
            write_torch_file({name: value.detach().cpu() for name, value in model.state_dict().items()}, self._path)
