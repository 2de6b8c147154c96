"""Memory for the carries of a whole pass.

Large blocks of memory, so that small long-lived pieces leave no holes between the large short-lived tensors of the steps. They lie
where their store says: on the device, in host memory or in a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from widefield.streaming.buffers import in_channels_last
from widefield.streaming.store import Store

_ALIGNMENT = 64  # bytes, of which the place of every piece is a multiple
_GROWTH = 1 << 26  # bytes of a further block, at most; where less is there, as much again


@dataclass
class Arena:
    """`put` copies a piece into a block. `sizes` says how many bytes of each dtype are expected: that is the first block of it."""

    store: Store
    sizes: Mapping[torch.dtype, int]
    blocks: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)
    used: dict[torch.dtype, int] = field(default_factory=dict)  # elements of the last block

    def put(self, piece: Tensor) -> Tensor:
        """Return a copy of `piece` in a block, in its memory format."""
        dtype, count = piece.dtype, piece.numel()
        blocks, start = self.blocks.setdefault(dtype, []), self.used.get(dtype, 0)
        if not blocks or start + count > blocks[-1].numel():
            there = sum(block.nbytes for block in blocks)
            size = min(there, _GROWTH) if blocks else self.sizes.get(dtype, 0)
            blocks.append(self.store.empty((max(count, size // dtype.itemsize),), piece.new_empty(0)))
            start = 0
        self.used[dtype] = start + -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
        copy = _shaped(blocks[-1].narrow(0, start, count), piece)
        self.store.write(copy, piece)
        return copy

    def holds(self, piece: Tensor) -> bool:
        """True if `piece` is in a block already."""
        address = piece.untyped_storage().data_ptr()
        return any(block.untyped_storage().data_ptr() == address for block in self.blocks.get(piece.dtype, ()))


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    if in_channels_last(like):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)
