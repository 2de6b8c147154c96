"""Random masks that depend on the global position alone.

A mask value is a hash of (seed, operation, index in every dimension), so the recomputation in the backward pass draws the same
mask, and neither the tile size nor the device nor the dtype changes it.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from widefield.streaming.captured import Node
from widefield.streaming.rules import flat
from widefield.streaming.rules.base import Maps, Placed, TileContext, argument, only_map, rule

aten = torch.ops.aten
_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with low bias (Wellons, "lowbias32"), on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keep_mask(
    probability: float, seed: int, name: str, shape: Sequence[int], starts: Sequence[int], device: torch.device
) -> Tensor:
    """Booleans of `shape`, each true with `probability`; `starts` is the global index of the first element per dimension."""
    key = torch.tensor(
        [seed & _MASK, (seed >> 32) & _MASK, zlib.crc32(name.encode())], dtype=torch.int64, device=device
    )
    value = _mix(key[2] ^ _mix(key[1] ^ _mix(key[0])))
    for dim, (size, start) in enumerate(zip(shape, starts, strict=True)):
        index = torch.arange(start, start + size, device=device, dtype=torch.int64)
        value = _mix(value.unsqueeze(-1) ^ _mix(index + (dim + 1) * 0x9E3779B1 & _MASK))
    return value < round(probability * (_MASK + 1))


def drops(node: Node) -> bool:
    """True if a node sets some elements to zero: dropout in training mode."""
    if node.op not in ("aten.dropout", "aten.native_dropout") or argument(node, 2, "train", True) is False:
        return False
    return 0.0 < float(node.args[1]) <= 1.0


def dropped(x: Tensor, node: Node, seed: int, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The result of dropout `node` for `x`, and its mask; see `keep_mask`."""
    p = float(node.args[1])
    mask = keep_mask(1.0 - p, seed, node.name, x.shape, starts, x.device)
    return x * (mask.to(x.dtype) / (1.0 - p) if p < 1.0 else 0.0), mask


def _starts(ndim: int, axes: Sequence[int], context: TileContext) -> list[int]:
    starts = [0] * ndim
    starts[axes[0]], starts[axes[1]] = context.rows[0].start, context.cols[0].start
    return starts


@rule(aten.native_dropout, aten.dropout, saves=("inputs", "mask"), draws=True, flat=flat.unchanged)
def dropout(node: Node, maps: Maps) -> Placed:
    """Zero each element with probability p, scale the others by 1 / (1 - p)."""
    name = only_map(node, maps)
    if node.pick == 1:
        raise node.refuse("returns its mask", "use dropout without the mask")
    axes = maps.axes[name]

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        tile = tiles[0]
        return dropped(tile, node, context.seed, _starts(tile.ndim, axes, context))[0] if drops(node) else tile

    return Placed((maps.read(name),), axes, run)


@rule(aten.bernoulli.p, draws=True, flat=flat.unchanged)
def bernoulli(node: Node, maps: Maps) -> Placed:
    """Ones with probability p, in the shape of a map (alpha dropout draws its mask so)."""
    name = only_map(node, maps)
    p, axes = float(node.args[1]), maps.axes[name]

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        tile = tiles[0]
        starts = _starts(tile.ndim, axes, context)
        return keep_mask(p, context.seed, node.name, tile.shape, starts, tile.device).to(tile.dtype)

    return Placed((maps.read(name),), axes, run)
