"""Complex maps, and Fourier transforms along the channels: every position by itself."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from widefield.streaming.captured import Node
from widefield.streaming.rules import flat
from widefield.streaming.rules.base import (
    Flattened,
    Maps,
    Placed,
    TileContext,
    argument,
    called,
    dims,
    only_map,
    refuse_whole,
    rule,
)

aten = torch.ops.aten


@rule(aten.fft_fft, aten.fft_ifft, aten.fft_rfft, aten.fft_ihfft, flat=flat.along(2, default=-1))
@rule(aten.fft_irfft, aten.fft_hfft, saves=(), flat=flat.along(2, default=-1))
@rule(aten.fft_rfft2, aten.fft_rfftn)
@rule(aten.fft_fft2, aten.fft_ifft2, aten.fft_irfft2, aten.fft_fftn, aten.fft_ifftn, aten.fft_irfftn, saves=())
@rule(aten.fft_fftshift, aten.fft_ifftshift, saves=())
def transform(node: Node, maps: Maps) -> Placed:
    """Fourier transforms along dimensions that are neither height nor width, and their shifts."""
    name = only_map(node, maps)
    default = [-2, -1] if node.op.endswith("fft2") else None if node.op.endswith(("fftn", "shift")) else -1
    given = argument(node, 1 if node.op.endswith("shift") else 2, "dim", default)
    if set(dims(node, given, len(maps.shapes[name]))) & set(maps.axes[name]):
        raise refuse_whole(node, "transforms")
    return called(node, maps, maps.axes[name])


def _with_parts(node: Node, maps: Maps, names: list[str]) -> tuple[list[Node], Flattened | None]:
    """A flattened map with a last dimension for the real and the imaginary part, or without it."""
    shape = maps.shapes[names[0]]
    shape = shape[:-1] if node.op == "aten.view_as_complex" else (*shape, 2)
    return [replace(node, shape=shape)], maps.flat[names[0]]


@rule(aten.view_as_real, aten.view_as_complex, cheap=True, keeps_batch=True, flat=_with_parts)
def parts(node: Node, maps: Maps) -> Placed:
    """The real and the imaginary part as a last dimension, and back."""
    name = only_map(node, maps)
    if node.op == "aten.view_as_complex":
        if len(maps.shapes[name]) - 1 in maps.axes[name]:
            raise refuse_whole(node, "takes for real and imaginary parts")
        return Placed(
            (maps.read(name),), maps.axes[name], lambda tiles, context: torch.view_as_complex(tiles[0].contiguous())
        )
    return Placed(
        (maps.read(name),), maps.axes[name], lambda tiles, context: torch.view_as_real(tiles[0].resolve_conj())
    )


@rule(
    aten._conj,
    aten._neg_view,
    aten.resolve_conj,
    aten.resolve_neg,
    saves=(),
    cheap=True,
    keeps_batch=True,
    flat=flat.elementwise,
)
def written_out(node: Node, maps: Maps) -> Placed:
    """Conjugates and negatives, which PyTorch notes and does not compute before they are needed."""
    name = only_map(node, maps)
    function = {"aten._conj": torch.conj_physical, "aten._neg_view": torch.neg}.get(node.op)

    def run(tiles: Sequence[Tensor], context: TileContext) -> Tensor:
        return tiles[0].resolve_conj().resolve_neg() if function is None else function(tiles[0])

    return Placed((maps.read(name),), maps.axes[name], run)
