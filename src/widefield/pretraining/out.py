"""The folder of a run: what may be in it before, who may write to it, and where things lie."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
"""The numbers that were logged, a JSON object per line."""


class OutFolder:
    """The folder of a run.

    Attributes:
        path: The folder.
        checkpoints: Where checkpoints lie.
        last: The latest checkpoint.
        exported: The weights of the model as they were exported last.
        metrics: What was logged, a JSON object per line.
        log: What was said.
        config: The arguments of the run.
        bad_images: Images that could not be read; only there if there are any.
        views: A picture of views as they are drawn for training.
        report: A page on the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.exported = path / "exported_models" / "exported_last.pt"
        self.metrics = path / METRICS
        self.log = path / "train.log"
        self.config = path / "config.yaml"
        self.bad_images = path / "bad_images.csv"
        self.views = path / "augmented_views.png"
        self.report = path / "report.html"

    def check(self, overwrite: bool, resume: bool) -> None:
        """Raises ValueError if the folder cannot be used for the run; changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out: {self.path} is not a directory! Name a folder with out (--out DIR)")
        if self.path.is_dir():
            _unlock(_lock(self.path))
        if self.path.is_dir() and any(self.path.iterdir()) and not (overwrite or resume):
            raise ValueError(
                f"out: {self.path} is not empty! Set overwrite=True (--overwrite) to begin anew in it, or resume_interrupted=True "
                "(--resume) to go on with the run that it holds"
            )

    @contextmanager
    def as_it_was(self, if_true: Callable[[], bool]) -> Iterator[None]:
        """Empty the folder again, or remove a new one, if an error ends this block and `if_true` holds.

        Not after an OSError, such as a full disk: what is said of it there is needed.
        """
        existed = self.path.is_dir()
        empty = not existed or not any(self.path.iterdir())
        try:
            yield
        except Exception as error:
            if empty and not isinstance(error, OSError) and if_true():
                self.clear()
                if not existed:
                    with suppress(OSError):
                        self.path.rmdir()
            raise

    @contextmanager
    def opened(self, clear: bool) -> Iterator[None]:
        """Make the folder and hold it for this process alone.

        The lock is on the folder itself and goes with the process, however that ends; its worker processes do not hold it.

        Args:
            clear: Remove what an earlier run has written; other files stay.

        Raises:
            ValueError: Another run is writing to it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(self.path)
        try:
            for partial in self.path.rglob(".*.partial"):  # of a process that was killed while it wrote
                partial.unlink(missing_ok=True)
            if clear:
                self.clear()
            yield
        finally:
            _unlock(descriptor)

    def clear(self) -> None:
        """Remove what a run has written; other files stay."""
        for folder in (self.checkpoints, self.exported.parent):
            shutil.rmtree(folder, ignore_errors=True)
        own = (self.metrics, self.log, self.config, self.bad_images, self.views, self.report)
        for file in (*own, *self.path.glob("events.out.tfevents.*")):
            file.unlink(missing_ok=True)


_held: set[int] = set()
"""Descriptors of locked folders. A forked worker closes its copies: else the lock would outlive a killed run by seconds."""


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"out: another run is writing to {folder}; wait for its end, or name another folder") from None
    except OSError as error:  # some network file systems have no locks
        _log.debug("%s cannot be locked (%s)", folder, error)
    _held.add(descriptor)
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        _held.discard(descriptor)
        os.close(descriptor)


def check_file(path: Path, overwrite: bool) -> None:
    """Raises ValueError if `path` cannot be written to."""
    if path.is_dir():
        raise ValueError(f"out: {path} is a directory; give the path of a file")
    if path.exists() and not overwrite:
        raise ValueError(
            f"out: {path} already exists! Set overwrite=True to overwrite the file (--overwrite), or name another"
        )
