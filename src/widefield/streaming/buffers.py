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

What reads the map takes overlapping cuts of it; two more cuts are carried to the next tile row (`above`) and tile (`left`).

What nobody needs is not there (`need`): its place holds zeros, which nobody reads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widefield.streaming.rules import Axes


class Cut(NamedTuple):
    """A rectangle of a buffer: rows `[y, y_end)` and columns `[x, x_end)` counted from the buffer's corner.

    `exclusive`: its gradient arrives as a tensor that nobody else holds, so others may be added into it.
    """

    y: int
    y_end: int
    x: int
    x_end: int
    exclusive: bool = False


Pieces = tuple[Tensor | None, Tensor | None, Tensor | None]


class Layout(NamedTuple):
    """The rows and columns of a buffer that are kept from earlier steps, and those that are new. The piece that a step computes
    begins at row and column `at` of the new ones.
    """

    kept: tuple[int, int]
    new: tuple[int, int]
    at: tuple[int, int] = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the buffer."""
        return self.kept[0] + self.new[0], self.kept[1] + self.new[1]


def cut_out(
    pieces: Pieces, axes: Axes, layout: Layout, cuts: Sequence[Cut], rectify: bool = False
) -> tuple[Tensor, ...]:
    """Return the `cuts` of the buffer made of `pieces` (left, above, new); differentiable.

    `rectify`: the new piece goes through a ReLU on its way into the buffer, and may be overwritten.
    """
    present = [piece for piece in pieces if piece is not None]
    if _is_whole(present, axes, layout) and all(cut[:4] == (0, layout.size[0], 0, layout.size[1]) for cut in cuts):
        if rectify and pieces[2] is not None:
            present[0] = present[0].relu() if present[0]._is_view() else present[0].relu_()
        return tuple(present * len(cuts))
    if torch.is_grad_enabled() and any(piece.requires_grad for piece in present):
        return _CutOut.apply(axes, layout, cuts, rectify, *pieces)
    buffer = _assemble(pieces, axes, layout, rectify)
    return tuple(_rectangle(buffer, axes, cut) for cut in cuts)


def _assemble(pieces: Pieces, axes: Axes, layout: Layout, rectify: bool) -> Tensor:
    left, above, new = pieces
    present = [piece for piece in pieces if piece is not None]
    if _is_whole(present, axes, layout):
        return new.relu() if rectify and new is not None else present[0]
    (kept_rows, kept_cols), shape = layout.kept, list(present[-1].shape)
    shape[axes.rows], shape[axes.cols] = layout.size
    buffer = empty_like(present[-1], shape)
    if sum(piece.shape[axes.rows] * piece.shape[axes.cols] for piece in present) < layout.size[0] * layout.size[1]:
        buffer.zero_()
    if left is not None:
        buffer.narrow(axes.cols, 0, kept_cols).copy_(left)
    beside_left = buffer.narrow(axes.cols, kept_cols, layout.new[1])
    if above is not None:
        beside_left.narrow(axes.rows, 0, kept_rows).copy_(above)
    if new is not None:
        y, x = layout.at
        place = beside_left.narrow(axes.rows, kept_rows + y, new.shape[axes.rows])
        place = place.narrow(axes.cols, x, new.shape[axes.cols])
        if rectify:
            torch.clamp_min(new, 0, out=place)
        else:
            place.copy_(new)
    return buffer


def _rectangle(buffer: Tensor, axes: Axes, cut: Cut) -> Tensor:
    return buffer.narrow(axes.rows, cut.y, cut.y_end - cut.y).narrow(axes.cols, cut.x, cut.x_end - cut.x)


def _is_whole(present: Sequence[Tensor], axes: Axes, layout: Layout) -> bool:
    """True if the only piece is the whole buffer."""
    return len(present) == 1 and (present[0].shape[axes.rows], present[0].shape[axes.cols]) == layout.size


class _CutOut(torch.autograd.Function):
    """All reads of a buffer as one operation, so that their gradients are added in place into one tensor.

    With plain narrow() each read would make a zero-filled gradient of the whole buffer. A ReLU on the way in needs no memory of
    its own: its mask is in the buffer.
    """

    @staticmethod
    def forward(
        ctx: Any, axes: Axes, layout: Layout, cuts: Sequence[Cut], rectify: bool, *pieces: Tensor | None
    ) -> tuple[Tensor, ...]:
        buffer = _assemble(pieces, axes, layout, rectify)  # type: ignore[arg-type]
        ctx.set_materialize_grads(False)
        ctx.axes, ctx.layout, ctx.cuts, ctx.shape = axes, layout, cuts, buffer.shape
        ctx.sizes = [None if piece is None else (piece.shape[axes.rows], piece.shape[axes.cols]) for piece in pieces]
        ctx.rectify = rectify and pieces[2] is not None
        if ctx.rectify:
            ctx.save_for_backward(buffer)
        # A piece that is the whole buffer is not returned itself: autograd would take the output for the input.
        found = (_rectangle(buffer, axes, cut) for cut in cuts)
        return tuple(x.view_as(x) if any(x is piece for piece in pieces) else x for x in found)

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
            _rectangle(total, axes, cut).add_(grad)
        if total is None:
            return (None,) * 7
        left, above, new = ctx.sizes
        kept_rows, kept_cols = ctx.layout.kept
        results: list[Tensor | None] = [None, None, None]
        # Gradients of carries outlive this step: as views they would keep the whole buffer's gradient alive.
        if left and ctx.needs_input_grad[4]:
            results[0] = total.narrow(axes.cols, 0, kept_cols).clone()
        if above and ctx.needs_input_grad[5]:
            results[1] = total.narrow(axes.rows, 0, kept_rows).narrow(axes.cols, kept_cols, above[1]).clone()
        if new and ctx.needs_input_grad[6]:
            y, x = kept_rows + ctx.layout.at[0], kept_cols + ctx.layout.at[1]
            inner = Cut(y, y + new[0], x, x + new[1])
            results[2] = _rectangle(total, axes, inner)
            if ctx.rectify:
                result = _rectangle(ctx.saved_tensors[0], axes, inner)
                results[2] = torch.ops.aten.threshold_backward(results[2], result, 0)
        return None, None, None, None, *results


def empty_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of `shape` in the memory format of `tensor`."""
    memory_format = torch.channels_last if in_channels_last(tensor) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)


def in_channels_last(tensor: Tensor) -> bool:
    """True if a tensor (N, C, H, W), or what it is a window of, has its channels side by side."""
    return tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.stride(1) == 1 and not tensor.is_contiguous()
