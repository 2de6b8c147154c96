"""Run a verb: logging, and errors as a line each."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from widefield.cli.messages import told
from widefield.errors import WidefieldError

console = Console(stderr=True, highlight=False)
"""The console for log lines, progress bars and errors of the command line."""

_log = logging.getLogger(__name__)
_USERS_ERRORS = (OSError, ValueError, WidefieldError)
"""Errors whose message tells the user what to do, so that no traceback is needed."""


def run_verb(run: Callable[[], Any], arguments: argparse.Namespace) -> int:
    """Run a verb; the exit code, which is what it returns, or 0."""
    with _logging(logging.DEBUG if arguments.verbose else logging.INFO):
        try:
            return int(run() or 0)
        except KeyboardInterrupt:
            _fail(arguments.verb, "interrupted")
            return 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) or not isinstance(error, _USERS_ERRORS):
                raise
            _log.debug("the error came from here", exc_info=True)
            _fail(arguments.verb, told(error))
            return 2


@contextmanager
def _logging(level: int) -> Iterator[None]:
    """Our log lines on the console; of Lightning's only warnings, its other lines being about its own products; none of tifffile's,
    whose errors come as ours.
    """
    import lightning.fabric
    import lightning.pytorch  # sets the levels of its loggers, so it has to come first
    from lightning.pytorch.utilities import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) and level > logging.DEBUG:
        level = logging.ERROR  # the first of several processes says the same
    ours = logging.getLogger("widefield")
    wanted = {package.__name__: logging.WARNING for package in (lightning.fabric, lightning.pytorch)}
    wanted["tifffile"] = logging.CRITICAL
    theirs = [logging.getLogger(name) for name in wanted]
    before = ours.handlers, ours.level, ours.propagate
    levels = [logger.level for logger in theirs]
    ours.handlers = [RichHandler(level, console=console, show_path=False, show_level=False, log_time_format="[%X]")]
    ours.propagate = False
    ours.setLevel(level)
    for logger in theirs:
        logger.setLevel(wanted[logger.name])
    try:
        yield
    finally:
        ours.handlers, ours.level, ours.propagate = before
        for logger, former in zip(theirs, levels, strict=True):
            logger.setLevel(former)


def _fail(verb: str, message: str) -> None:
    console.print(f"widefield {verb}: error: {message}", style="red", soft_wrap=True, markup=False)
