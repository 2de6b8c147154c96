"""Where the carries of a whole pass are kept.

One block of memory, so that small long-lived pieces leave no holes between the large short-lived tensors of the steps. It lies
where its store says: on the device, in host memory or in a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from widefield.streaming.buffers import in_channels_last
from widefield.streaming.store import Store

_ALIGNMENT = 64  # bytes, of which the place of every piece is a multiple


@dataclass
class Arena:
    """`put` copies a piece into the block. `sizes` says how many bytes of each dtype are expected; more is allocated if need be."""

    store: Store
    sizes: Mapping[torch.dtype, int]
    blocks: dict[torch.dtype, Tensor] = field(default_factory=dict)
    used: dict[torch.dtype, int] = field(default_factory=dict)

    def put(self, piece: Tensor) -> Tensor:
        """A copy of `piece` in the block, in its memory format."""
        dtype, count = piece.dtype, piece.numel()
        block, start = self.blocks.get(dtype), self.used.get(dtype, 0)
        if block is None or start + count > block.numel():
            size = count if block is not None else max(count, self.sizes.get(dtype, 0) // dtype.itemsize)
            block, start = self.store.empty((size,), piece.new_empty(0)), 0
            self.blocks[dtype] = block
        self.used[dtype] = start + -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
        return _shaped(block.narrow(0, start, count), piece).copy_(piece)

    def holds(self, piece: Tensor) -> bool:
        """Whether `piece` is in the block already."""
        block = self.blocks.get(piece.dtype)
        return block is not None and piece.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    if in_channels_last(like):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)
