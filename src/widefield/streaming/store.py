"""Places for the maps between stages: on the device, in host memory, or in a file without a name."""

import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from widefield.streaming.buffers import empty_like, in_channels_last

Place = Literal["device", "host", "file"]
PLACES: tuple[Place, ...] = ("device", "host", "file")

_MAPPINGS: "weakref.WeakValueDictionary[int, mmap.mmap]" = weakref.WeakValueDictionary()  # by address


@dataclass(frozen=True)
class Store:
    """Makes tensors that live at `place`. Files are made in `folder`; None: the system's folder for temporary files.

    A file has no name from the start (where the system allows it; else it goes when it is closed), so the system removes it
    when its last tensor is gone, however the run ends.
    """

    place: Place = "device"
    folder: str | None = None

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of `shape` in the dtype and memory format of `like`, on whose device it is if `place` is "device"."""
        if self.place == "device":
            return empty_like(like, shape)
        if self.place == "host":
            pinned = like.device.type == "cuda"
            return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=pinned, memory_format=_format(like))
        size = torch.Size(shape).numel()
        flat = torch.frombuffer(_mapping(size * like.dtype.itemsize, self.folder), dtype=like.dtype, count=size)
        if _format(like) == torch.channels_last:
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)

    def zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """`empty`, filled with zeros. A new file holds nothing else."""
        tensor = self.empty(shape, like)
        return tensor if self.place == "file" else tensor.zero_()

    def release(self, tensor: Tensor) -> None:
        """Give the memory back that the pages of a file hold; what was written stays in the file."""
        advice = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows
        if advice is not None and (mapping := _MAPPINGS.get(tensor.untyped_storage().data_ptr())) is not None:
            mapping.madvise(advice)


def _format(like: Tensor) -> torch.memory_format:
    return torch.channels_last if in_channels_last(like) else torch.contiguous_format


def _mapping(size: int, folder: str | None) -> mmap.mmap:
    where = tempfile.gettempdir() if folder is None else folder
    try:
        with tempfile.TemporaryFile(prefix="widefield-", dir=where) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a bus error later
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            else:
                file.truncate(max(size, 1))
            mapping = mmap.mmap(file.fileno(), max(size, 1))
    except OSError as error:
        raise OSError(
            error.errno,
            f"a map needs {size} bytes in the scratch folder {where}: {error.strerror}. "
            "Give a folder with more room (scratch_dir=...), or keep the maps in memory (maps='host')",
        ) from error
    _MAPPINGS[torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()] = mapping
    return mapping
