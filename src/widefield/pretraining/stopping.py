"""Ctrl-C and SIGTERM end a run after the step that it is in, with a checkpoint of it; what an error leaves is told."""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from widefield.pretraining.dataset import Batch

_log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM
"""Exit code of what shells see end by SIGTERM."""


class SaveLast(Callback):
    """Writes the last checkpoint between two optimizer steps: when it is old, and when the run is told to stop.

    Args:
        path: Of the checkpoint; None writes none, and only stops.
        seconds: Since it was written here that make it old; None: none do.
    """

    def __init__(self, path: Path | None, seconds: float | None) -> None:
        self._path, self._seconds = path, seconds
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
