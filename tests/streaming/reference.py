"""The scan in sixty lines: a chain of layers over an image that is read strip by strip, forward and backward.

It is as exact as the engine, and has nothing else of it: one axis, one chain, no planner, no operations over the whole image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A layer whose output row `o` reads the input rows `o * stride - padding` to `o * stride - padding + kernel - 1`.

    `run` computes it on rows that are padded already.
    """

    run: Callable[[Tensor], Tensor]
    kernel: int = 1
    stride: int = 1
    padding: int = 0

    def ready(self, rows: int, height: int) -> int:
        """How many output rows can be computed from the first `rows` of `height` input rows."""
        padding_below = self.padding if rows == height else 0
        return max((rows + self.padding + padding_below - self.kernel) // self.stride + 1, 0)


@dataclass(frozen=True)
class Carry:
    """What a step leaves to the next of one layer: the input rows from `first` on; `done` output rows are computed."""

    rows: Tensor | None = None
    first: int = 0
    done: int = 0


def step(
    layers: Sequence[Layer], heights: Sequence[int], carries: Sequence[Carry], new: Tensor | None
) -> tuple[Tensor | None, list[Carry]]:
    """Pass `new` rows of the image through all layers. Returns the new rows of the output, if there are any, and the carries."""
    left: list[Carry] = []
    for layer, height, carry in zip(layers, heights, carries, strict=False):
        if new is None:  # nothing has come through the layer before
            left.append(carry)
            continue
        rows = new if carry.rows is None else torch.cat([carry.rows, new], 2)
        end = carry.first + rows.shape[2]
        done = layer.ready(end, height)
        top = carry.done * layer.stride - layer.padding  # the first row that is read, the border's rows included
        bottom = (done - 1) * layer.stride - layer.padding + layer.kernel  # the row after the last one
        read = rows[:, :, max(top, 0) - carry.first : min(bottom, height) - carry.first]
        padded = F.pad(read, (0, 0, max(-top, 0), max(bottom - height, 0)))
        new = layer.run(padded) if done > carry.done else None
        first = min(max(done * layer.stride - layer.padding, carry.first), end)  # what the next output row reads
        left.append(Carry(rows[:, :, first - carry.first :], first, done))
    return new, left


def forward(layers: Sequence[Layer], image: Tensor, strip: int) -> tuple[Tensor, list[int], list[list[Carry]]]:
    """Scan the image `strip` rows at a time: the output, the height of each layer's input, and what every step began with."""
    heights = [image.shape[2]]
    for layer in layers:
        heights.append(layer.ready(heights[-1], heights[-1]))
    carries, began, output = [Carry() for _ in layers], [], []
    with torch.no_grad():
        for y in range(0, image.shape[2], strip):
            began.append(carries)
            new, carries = step(layers, heights, carries, image[:, :, y : y + strip])
            output += [] if new is None else [new]
    return torch.cat(output, 2), heights, began


def backward(
    layers: Sequence[Layer],
    image: Tensor,
    strip: int,
    heights: Sequence[int],
    began: Sequence[list[Carry]],
    grad: Tensor,
) -> Tensor:
    """Scan backwards: each step is computed again from its carries, whose gradients go to the step before. Fills `.grad` of the
    layers' weights and returns the gradient of the image; `grad` is that of the output.
    """
    end, of_carries, of_image = grad.shape[2], [None for _ in layers], []
    for k in reversed(range(len(began))):
        carries = [replace(c, rows=None if c.rows is None else c.rows.detach().requires_grad_()) for c in began[k]]
        pixels = image[:, :, k * strip : (k + 1) * strip].detach().requires_grad_()
        new, left = step(layers, heights, carries, pixels)
        ends = [(c.rows, g) for c, g in zip(left, of_carries, strict=True) if g is not None]
        if new is not None:
            ends.append((new, grad[:, :, end - new.shape[2] : end]))
            end -= new.shape[2]
        torch.autograd.backward([tensor for tensor, _ in ends], [gradient for _, gradient in ends])
        of_carries = [None if c.rows is None else c.rows.grad for c in carries]
        of_image.append(torch.zeros_like(pixels) if pixels.grad is None else pixels.grad)
    return torch.cat(of_image[::-1], 2)
