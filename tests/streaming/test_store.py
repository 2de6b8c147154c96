"""Pieces of maps in files, written by calls or through the mapping: the same as copied in memory."""

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from widefield.streaming import store as module
from widefield.streaming.store import Store

SHAPE = (2, 6, 20, 300)
PLACES = {
    "all": lambda x: x,
    "strip": lambda x: x[:, :, 3:9],
    "tile": lambda x: x[:, :, 3:9, 40:290],
    "image": lambda x: x[1:],
    "channels": lambda x: x[:, 2:5],
    "row": lambda x: x[:, :, 7],
    "every other": lambda x: x[:, :, ::2],
    "nothing": lambda x: x[:, :, :0],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.uint8])
@pytest.mark.parametrize("last", [True, False])
def test_what_is_written_is_what_is_read(
    place: str, dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RUN", 256)
    memory_format = torch.channels_last if last else torch.contiguous_format
    like = torch.empty(1, 2, 3, 4, dtype=dtype).to(memory_format=memory_format)
    store = Store("file")
    expected = torch.randint(0, 99, SHAPE).to(dtype).contiguous(memory_format=memory_format)
    file = store.empty(SHAPE, like)
    store.write(file, expected)
    assert torch.equal(file, expected)
    at: Callable[[Tensor], Tensor] = PLACES[place]
    piece = torch.randint(0, 99, at(file).shape).to(dtype)
    for source in (piece, piece.to(memory_format=torch.channels_last) if piece.ndim == 4 else piece, piece.conj()):
        at(expected).copy_(source)
        store.release(file)
        store.write(at(file), source)
        assert torch.equal(file, expected)
        store.release(file)
        assert torch.equal(file, expected)


@pytest.mark.parametrize("open_files", [0, 10**6])
def test_a_strip_is_written_in_one_call(open_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_FILES", open_files)
    calls = []
    pwrite = module.os.pwrite  # type: ignore[attr-defined]

    def counted(file: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        return int(pwrite(file, data[: max(1, len(data) // 2)], offset))  # as a system may: a part of it

    monkeypatch.setattr(module.os, "pwrite", counted)  # type: ignore[attr-defined]
    like = torch.empty(1, 2, 3, 4).to(memory_format=torch.channels_last)
    file, strip = Store("file").zeros((1, 8, 64, 512), like), torch.rand(1, 512, 8, 8).permute(0, 3, 2, 1).clone()
    Store("file").write(file[:, :, 8:16], strip.contiguous(memory_format=torch.channels_last))
    assert torch.equal(file[:, :, 8:16], strip)
    assert not file[:, :, :8].any() and not file[:, :, 16:].any()
    assert calls[:1] == ([strip.nbytes] if open_files else [])


def descriptor(of: Tensor) -> int:
    file = module._MAPPINGS[of.untyped_storage().data_ptr()].file
    assert file is not None
    return file.descriptor


@pytest.fixture
def many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_FILES", 10**6)


@pytest.mark.usefixtures("many_files")
def test_a_file_is_taken_again_while_its_store_is_there() -> None:
    store, like = Store("file", spare=[]), torch.empty(0)
    first = store.empty((100_000,), like).fill_(1)
    number = descriptor(first)
    del first
    assert store.spare is not None
    assert [file.descriptor for file in store.spare] == [number]
    smaller = store.empty((90_000,), like)
    assert descriptor(smaller) == number
    assert not store.spare
    store.write(smaller, torch.full((90_000,), 2.0))
    assert smaller.eq(2).all()
    del smaller
    assert store.empty((10_000,), like).numel() == 10_000, "of much less, the file would hold too much"
    assert not store.zeros((100_000,), like).any(), "zeros come from a new file"
    assert len(store.spare) == 2
    os.fstat(number)
    del store
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


@pytest.mark.usefixtures("many_files")
def test_spare_files_give_way_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    store, like = Store("file", spare=[]), torch.empty(0)
    store.empty((100_000,), like)
    new = module._new

    def full(size: int, folder: str | None) -> Any:
        if store.spare:
            raise OSError(errno.ENOSPC, "No space left on device")
        return new(size, folder)

    monkeypatch.setattr(module, "_new", full)
    assert store.spare is not None
    assert [file.size for file in store.spare] == [400_000]
    assert store.empty((10_000,), like).numel() == 10_000
    assert [file.size for file in store.spare] == [40_000]


def test_without_a_list_of_spare_files_one_goes_with_its_tensor() -> None:
    store = Store("file")
    number = descriptor(store.empty((1000,), torch.empty(0)))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
