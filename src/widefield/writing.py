"""Files and folders that are written whole or not at all, so that a full disk or a killed process leaves the old one as it was."""

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the place of `path` at the end of the block.

    An OSError that names no file, as that of a full disk, or that beside `path`, gets the name of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """`replacing` for a folder, which is made: it takes the place of the folder or file `path` at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.exists():
            path.rename(old)  # a folder cannot be replaced in one step
        partial.rename(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` with a header, cells being empty where a row has no such key."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_torch_file(content: Any, path: Path) -> None:
    """`torch.save`, which must have reached the disk before `path` is replaced."""
    import torch

    with replacing(path) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer, when it is closed after an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(weights: Mapping[str, Any], path: Path) -> None:
    """Write tensors by name as safetensors; those that share memory, of which the format has none, are written twice."""
    from safetensors.torch import save

    content = save(
        {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}, {"format": "pt"}
    )
    with replacing(path) as partial:  # not `save_file`, which is vague about a full disk
        partial.write_bytes(content)
