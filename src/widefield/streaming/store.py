"""Places for the maps between stages: on the device, in host memory, or in a file without a name."""

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from widefield.streaming.buffers import empty_like, in_channels_last

Place = Literal["device", "host", "file"]
PLACES: tuple[Place, ...] = ("device", "host", "file")

_MAPPINGS: "weakref.WeakValueDictionary[int, _Mapping]" = weakref.WeakValueDictionary()  # by address
_RUN = 1 << 14  # bytes side by side in a file from which they are written by a call, and not through the mapping
_MOST_FILES = 256  # that are open for such calls; processes may have 1024 open, and a mapping has one of its own


@dataclass(frozen=True)
class Store:
    """Makes tensors that live at `place`. Files are made in `folder`; None: the system's folder for temporary files.

    A file has no name from the start (where the system allows it; else it goes when it is closed), so the system removes it
    however the run ends. It goes with its last tensor; or, where there is a list of `spare` files, it is kept there for another
    tensor as long as the store, because pages that are in memory already are written faster than new ones.
    """

    place: Place = "device"
    folder: str | None = None
    spare: "list[_File] | None" = field(default=None, repr=False, compare=False)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of `shape` in the dtype and memory format of `like`, on whose device it is if `place` is "device"."""
        if self.place == "device":
            return empty_like(like, shape)
        if self.place == "host":
            pinned = like.device.type == "cuda"
            return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=pinned, memory_format=_format(like))
        return self._in_file(shape, like, self.spare)

    def _in_file(self, shape: tuple[int, ...], like: Tensor, spare: "list[_File] | None") -> Tensor:
        size = torch.Size(shape).numel()
        if not size:
            return torch.empty(shape, dtype=like.dtype)
        mapping = _mapping(size * like.dtype.itemsize, self.folder, spare)
        flat = torch.frombuffer(mapping, dtype=like.dtype, count=size)
        if _format(like) == torch.channels_last:
            n, c, h, w = shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(shape)

    def zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """`empty`, filled with zeros. A new file holds nothing else."""
        return self._in_file(shape, like, None) if self.place == "file" else self.empty(shape, like).zero_()

    def write(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` into `target`, a part of a tensor that was made here.

        Large pieces are written into a file by calls: a mapping gets its pages one by one, which takes three times as long.
        """
        mapping = _MAPPINGS.get(target.untyped_storage().data_ptr()) if self.place == "file" else None
        file = None if mapping is None else mapping.file
        runs = None if file is None else _runs(target, source)
        if file is None or runs is None:
            target.copy_(source)
            return
        for offset, data in runs:
            while len(data):
                written = os.pwrite(file.descriptor, data, offset)
                offset, data = offset + written, data[written:]

    def release(self, tensor: Tensor) -> None:
        """Give the memory back that the pages of a file hold; what was written stays in the file."""
        advice = getattr(mmap, "MADV_DONTNEED", None)  # not on Windows
        if advice is not None and (mapping := _MAPPINGS.get(tensor.untyped_storage().data_ptr())) is not None:
            mapping.madvise(advice)


class _File:
    """A file of `size` bytes without a name, closed when nobody has it any more."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor, self.size = descriptor, size
        weakref.finalize(self, os.close, descriptor)


class _Mapping(mmap.mmap):
    """A file in memory, and the file if it may be written by calls as well."""

    file: _File | None = None


def _runs(target: Tensor, source: Tensor) -> Iterator[tuple[int, memoryview]] | None:
    """Return where in the file of `target` bytes of `source` come to lie side by side, and these bytes.

    None if they are too few, or `source` has another order of dimensions.
    """
    target, source = target.squeeze(), source.detach().squeeze()
    dims = sorted(range(target.ndim), key=target.stride, reverse=True)
    target, source = target.permute(dims), source.permute(dims)
    inner, count = target.ndim, 1
    while inner and target.stride(inner - 1) == count:
        inner, count = inner - 1, count * target.shape[inner - 1]
    size = count * target.element_size()
    plain = source.dtype == target.dtype and source.is_contiguous() and not (source.is_conj() or source.is_neg())
    if size < _RUN or not plain:
        return None
    data = source.reshape(-1).view(torch.uint8).cpu().numpy().data
    steps = zip(target.shape[:inner], target.stride()[:inner], strict=True)
    places = product(*(range(0, n * stride, stride) for n, stride in steps))
    first = int(target.storage_offset())
    begins = ((first + sum(place)) * target.element_size() for place in places)
    return ((begin, data[k * size : (k + 1) * size]) for k, begin in enumerate(begins))


def _format(like: Tensor) -> torch.memory_format:
    return torch.channels_last if in_channels_last(like) else torch.contiguous_format


def _mapping(size: int, folder: str | None, spare: list[_File] | None) -> _Mapping:
    """A file in memory, one of `spare` if there is one that is not much larger, to which it goes back at last."""
    spared = () if spare is None else spare
    file = min((file for file in spared if size <= file.size <= 2 * size), key=lambda file: file.size, default=None)
    try:
        if file is not None and spare is not None:
            spare.remove(file)
            mapping = _Mapping(file.descriptor, file.size)
        else:
            mapping, file = _new(size, folder)
    except OSError:
        if not spare:
            raise
        spare.clear()  # of other sizes: the disk is full, or too many files are open
        return _mapping(size, folder, spare)
    if file is not None:
        mapping.file = file
        if spare is not None:
            weakref.finalize(mapping, spare.append, file)
    _MAPPINGS[torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()] = mapping
    return mapping


def _new(size: int, folder: str | None) -> tuple[_Mapping, _File | None]:
    where = tempfile.gettempdir() if folder is None else folder
    try:
        with tempfile.TemporaryFile(prefix="widefield-", dir=where) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a bus error later
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            mapping = _Mapping(file.fileno(), size)
            if hasattr(os, "pwrite") and file.fileno() < _MOST_FILES:  # not on Windows
                return mapping, _File(os.dup(file.fileno()), size)
            return mapping, None
    except OSError as error:
        raise OSError(
            error.errno,
            f"a map needs {size} bytes in the scratch folder {where}: {error.strerror}. "
            "Give a folder with more room (scratch_dir=...), or keep the maps in memory (maps='host')",
        ) from error
