"""One line about a long command: the image and tile at hand, memory, and the time that is left."""

import logging
import math
import time
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from widefield.reports.memory import memory_in_use
from widefield.streaming import StreamingCNN
from widefield.streaming.budget import format_bytes

_log = logging.getLogger(__name__)
_EVERY = 60.0
"""Seconds between two lines of the log, elsewhere than at a terminal."""


class ProgressLine:
    """A context in which a line tells how far a command is; elsewhere than at a terminal, the log at most once a minute.

    A step of the engine sets an attribute, and a thread draws the line four times a second. Memory
    stands beside the budget: on CUDA that of tensors above what there was before the image at hand; otherwise, on Linux alone,
    that of the process above what it had at the first image.

    Attributes:
        share: Of the whole command that is done.

    Args:
        network: What streams, if anything does: its `progress` is set in the context.
        unit: What is counted.
        console: Where the line is drawn.
    """

    def __init__(
        self, network: StreamingCNN | None = None, unit: str = "image", console: Console | None = None
    ) -> None:
        self._network, self._unit = network, unit
        self._console = Console(stderr=True, highlight=False) if console is None else console
        self._before = self._behind = ""
        self._done, self._total = 0, 0.0
        self.share, self._at = 0.0, 0.0
        self._first: tuple[float, float] | None = None
        self._tile: tuple[str, int, int] | None = None
        self._memory: int | None = None
        self._next = math.inf
        self._live = Live(console=self._console, get_renderable=self._drawn, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._next = time.monotonic() + _EVERY
        if self._network is not None:
            self._network.progress = self._step
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._network is not None:
            self._network.progress = None
        self._live.stop()

    def update(self, done: int, total: float, before: str = "", behind: str = "", share: float | None = None) -> None:
        """Tell that `done` of `total` images are done, and the next one begins.

        Args:
            done: Images that are done.
            total: Of how many; it may be infinite.
            before, behind: Words at both ends of the line.
            share: Of the whole command that is done, if these images are only a part of it; NaN if nobody knows.
        """
        now = time.monotonic()
        self._before, self._behind, self._done, self._total, self._tile = before, behind, done, total, None
        self.share = share if share is not None else (done / total if total else 0.0)
        self._at = now
        if self._first is None:
            self._first = now, self.share
        if self._network is not None and (self._memory is None or self._device.type == "cuda"):
            self._memory = memory_in_use(self._device)
        self._log_if_due()

    def text(self) -> str:
        """Return the line as it is now."""
        total = "" if math.isinf(self._total) else f" of {self._total:.0f}"
        counted = f"{self._unit} {min(self._done + 1, self._total):.0f}{total}"
        parts = [self._before, counted if self._total else "", self._tiles(), self._used(), self._left(), self._behind]
        return " · ".join(part for part in parts if part)

    @property
    def _device(self) -> torch.device:
        assert self._network is not None
        return next((parameter.device for parameter in self._network.parameters()), torch.device("cpu"))

    def _step(self, phase: str, done: int, total: int) -> None:
        self._tile = phase, done, total
        self._log_if_due()

    def _log_if_due(self) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + _EVERY
            _log.info("%s", self.text())

    def _drawn(self) -> Text:
        return Text(self.text(), no_wrap=True, overflow="ellipsis")

    def _tiles(self) -> str:
        return "" if self._tile is None else "{}, tile {} of {}".format(*self._tile)

    def _used(self) -> str:
        if self._network is None or self._memory is None:
            return ""
        used = max(0, (memory_in_use(self._device) or 0) - self._memory)
        budget = self._network.memory_budget
        return (
            f"{format_bytes(used)} of memory" if budget is None else f"{format_bytes(used)} of {format_bytes(budget)}"
        )

    def _left(self) -> str:
        """Return the time left, by the mean time of what has been done since the first image began."""
        if self._first is None or not self.share > self._first[1]:
            return ""
        since, share = self._first
        seconds = (self._at - since) / (self.share - share) * (1 - self.share) - (time.monotonic() - self._at)
        minutes = math.ceil(max(0.0, seconds) / 60)
        return f"{minutes // 60}:{minutes % 60:02} h left" if seconds >= 60 else f"{max(0.0, seconds):.0f} s left"
