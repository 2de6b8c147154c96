"""The part of a map that one step holds, and what is cut out of it.

In step (i, j) of the scan a map's buffer is put together from three pieces: what was kept to the left, what was kept above, and
what has just been computed.

            kept cols   new cols
          +-----------+----------+
    kept  |           |  above   |
    rows  |   left    +----------+     left reaches over the kept rows too, so the `above` pieces
    new   |           |   new    |     of the tiles in a row are disjoint and cover the width
    rows  |           |          |
          +-----------+----------+

Consumers read overlapping windows of it; two more windows are the pieces for the next tile row (`above`) and tile (`left`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widefield.streaming.rules import Axes


class Cut(NamedTuple):
    """A window of a buffer: rows `[top, bottom)` and columns `[left, right)` counted from the buffer's corner.

    `exclusive`: its gradient arrives as a tensor that nobody else holds, so others may be added into it.
    """

    top: int
    bottom: int
    left: int
    right: int
    exclusive: bool = False


Pieces = tuple[Tensor | None, Tensor | None, Tensor | None]


def cut_out(pieces: Pieces, axes: Axes, cuts: Sequence[Cut], rectify: bool = False) -> tuple[Tensor, ...]:
    """The windows `cuts` of the buffer made of `pieces` (left, above, new); differentiable.

    `rectify`: the new piece goes through a ReLU on its way into the buffer, and may be overwritten.
    """
    present = [piece for piece in pieces if piece is not None]
    if len(present) == 1 and all(_is_whole(cut, present[0], axes) for cut in cuts):
        if rectify and pieces[2] is not None:
            present[0] = present[0].relu() if present[0]._is_view() else present[0].relu_()
        return tuple(present * len(cuts))
    if torch.is_grad_enabled() and any(piece.requires_grad for piece in present):
        return _CutOut.apply(axes, cuts, rectify, *pieces)
    return _windows(_assemble(pieces, axes, rectify), axes, cuts)


def _assemble(pieces: Pieces, axes: Axes, rectify: bool) -> Tensor:
    left, above, new = pieces
    present = [piece for piece in pieces if piece is not None]
    if len(present) == 1:
        return new.relu() if rectify and new is not None else present[0]
    beside = present[-1]  # above or new: both are as wide as what is not kept
    kept_rows = 0 if above is None else above.shape[axes.rows]
    kept_cols = 0 if left is None else left.shape[axes.cols]
    shape = list(beside.shape)
    shape[axes.rows] = kept_rows + (0 if new is None else new.shape[axes.rows])
    shape[axes.cols] = kept_cols + beside.shape[axes.cols]
    buffer = empty_like(beside, shape)
    if left is not None:
        buffer.narrow(axes.cols, 0, kept_cols).copy_(left)
    beside_left = buffer.narrow(axes.cols, kept_cols, beside.shape[axes.cols])
    if above is not None:
        beside_left.narrow(axes.rows, 0, kept_rows).copy_(above)
    if new is not None:
        place = beside_left.narrow(axes.rows, kept_rows, new.shape[axes.rows])
        if rectify:
            torch.clamp_min(new, 0, out=place)
        else:
            place.copy_(new)
    return buffer


def _windows(buffer: Tensor, axes: Axes, cuts: Sequence[Cut]) -> tuple[Tensor, ...]:
    return tuple(_window(buffer, axes, cut) for cut in cuts)


def _window(buffer: Tensor, axes: Axes, cut: Cut) -> Tensor:
    rows = buffer.narrow(axes.rows, cut.top, cut.bottom - cut.top)
    return rows.narrow(axes.cols, cut.left, cut.right - cut.left)


def _is_whole(cut: Cut, buffer: Tensor, axes: Axes) -> bool:
    return (cut.bottom - cut.top, cut.right - cut.left) == (buffer.shape[axes.rows], buffer.shape[axes.cols])


class _CutOut(torch.autograd.Function):
    """All reads of a buffer as one operation, so that their gradients are added in place into one tensor.

    With plain narrow() each read would make a zero-filled gradient of the whole buffer. A ReLU on the way in needs no memory of
    its own: its mask is in the buffer.
    """

    @staticmethod
    def forward(ctx: Any, axes: Axes, cuts: Sequence[Cut], rectify: bool, *pieces: Tensor | None) -> tuple[Tensor, ...]:
        buffer = _assemble(pieces, axes, rectify)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.cuts, ctx.shape = axes, cuts, buffer.shape
        ctx.sizes = [None if piece is None else (piece.shape[axes.rows], piece.shape[axes.cols]) for piece in pieces]
        ctx.rectify = rectify and pieces[2] is not None
        if ctx.rectify:
            ctx.save_for_backward(buffer)
        # A piece that is the whole buffer is not returned itself: autograd would take the output for the input.
        return tuple(w.view_as(w) if any(w is p for p in pieces) else w for w in _windows(buffer, axes, cuts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        axes, cuts = ctx.axes, ctx.cuts
        total, first = None, -1
        for k, (cut, grad) in enumerate(zip(cuts, grads, strict=True)):
            if grad is not None and cut.exclusive and grad.shape == ctx.shape:
                total, first = grad, k
                break
        for k, (cut, grad) in enumerate(zip(cuts, grads, strict=True)):
            if grad is None or k == first:
                continue
            if total is None:
                total = empty_like(grad, ctx.shape).zero_()
            _window(total, axes, cut).add_(grad)
        if total is None:
            return (None,) * 6
        left, above, new = ctx.sizes
        kept_cols = left[1] if left else 0
        kept_rows = above[0] if above else 0
        results: list[Tensor | None] = [None, None, None]
        # Gradients of carries outlive this step: as views they would keep the whole buffer's gradient alive.
        if left and ctx.needs_input_grad[3]:
            results[0] = total.narrow(axes.cols, 0, kept_cols).clone()
        if above and ctx.needs_input_grad[4]:
            results[1] = total.narrow(axes.rows, 0, kept_rows).narrow(axes.cols, kept_cols, above[1]).clone()
        if new and ctx.needs_input_grad[5]:
            inner = Cut(kept_rows, kept_rows + new[0], kept_cols, kept_cols + new[1])
            results[2] = _window(total, axes, inner)
            if ctx.rectify:
                result = _window(ctx.saved_tensors[0], axes, inner)
                results[2] = torch.ops.aten.threshold_backward(results[2], result, 0)
        return None, None, None, *results


def empty_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of `shape` in the memory format of `tensor`."""
    memory_format = torch.channels_last if in_channels_last(tensor) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)


def in_channels_last(tensor: Tensor) -> bool:
    """True if a tensor (N, C, H, W), or what it is a window of, has its channels side by side."""
    return tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
