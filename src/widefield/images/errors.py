"""The error of a file that cannot be read."""

from pathlib import Path

from widefield.errors import WidefieldError


class ImageReadError(WidefieldError, OSError):
    """A file cannot be read as an image: unsupported, truncated or corrupt.

    The message names the file and the reason. It is raised when the file is opened, or when the damaged part is read.
    """


def cannot_read(path: Path, reason: str) -> ImageReadError:
    """The error for the file at `path`; `reason` says what is wrong and, where something helps, what to do."""
    return ImageReadError(f"cannot read {path}: {reason}")
