"""One image over several processes: each computes a band of its rows, and what must be known of the whole image is added up.

Every process is given the same image and reads of it what its band needs. Reductions are gathered over all bands, so that their
results, and all that follows from them, are the same everywhere; gradients of weights and of the image are summed over the bands.
Nothing else passes between the processes, but rows of maps that the first of them writes to a file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Ranks:
    """The processes that share an image, of which this one is number `rank` of `size`."""

    group: distributed.ProcessGroup

    @staticmethod
    def of(group: Any) -> "Ranks | None":
        """Check what a user gave: a process group or a mesh of one dimension. Raises ValueError."""
        if group is None:
            return None
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"process_group is a mesh of {group.ndim} dimensions, and must have one: give that over which an image is "
                    'split, such as mesh["rows"]'
                )
            group = group.get_group()
        if not isinstance(group, distributed.ProcessGroup):
            raise ValueError(
                f"process_group={group!r} must be a torch.distributed process group that this process belongs to, or a DeviceMesh "
                "of one dimension"
            )
        return Ranks(group)

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        return distributed.get_world_size(self.group)

    def everywhere(self, value: Any) -> list[Any]:
        """Return what each process has given: plain data, and tensors, which come back on the CPU."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, pytree.tree_map_only(Tensor, Tensor.cpu, value), self.group)
        return found

    def merge(
        self, states: dict[int, Any], merge: Callable[[int, Any, Any], Any], device: torch.device
    ) -> dict[int, Any]:
        """Merge what each process has gathered, by number of the reduction; in the same order everywhere."""
        merged: dict[int, Any] = {}
        for found in self.everywhere(states):
            for v, state in found.items():
                state = pytree.tree_map_only(Tensor, lambda x: x.to(device), state)
                merged[v] = merge(v, merged[v], state) if v in merged else state
        return merged

    def add_up(self, gradient: Tensor) -> Tensor:
        """Sum a gradient over the processes, in place."""
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient, group=self.group)
        return gradient

    def agree(self, what: Any, more: Any) -> list[Any]:
        """Raise ValueError, in all processes, if they were called in different ways: `what` differs. Returns `more` of each."""
        both = self.everywhere((what, more))
        found = [one for one, _ in both]
        if any(one != found[0] for one in found):
            raise ValueError(
                "the processes that share an image must be given the same one, in the same way, and are not: "
                + "; ".join(f"rank {k}: {one}" for k, one in enumerate(found))
            )
        return [one for _, one in both]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave with an error if one of them does; nothing in it waits for another process.

        The others get a ValueError in the place of a ValueError, and else an OSError, which name the process that has failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as found:
            error = found
        kind = None if error is None else (isinstance(error, ValueError), f"{type(error).__name__}: {error}")
        everywhere = self.everywhere(kind)
        if error is not None:
            raise error
        for rank, failed in enumerate(everywhere):
            if failed is not None:
                raise (ValueError if failed[0] else OSError)(f"rank {rank} has failed: {failed[1]}")

    def send_to_first(self, value: Any) -> None:
        """Send plain data or an array to process 0, which waits for it in `receive`."""
        distributed.send_object_list([value], group=self.group, group_dst=0)

    def receive(self, source: int) -> Any:
        """Return what process `source` sends to this one, which is process 0."""
        found: list[Any] = [None]
        distributed.recv_object_list(found, group=self.group, group_src=source)
        return found[0]

    def gather(self, band: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        """Put the bands of a map together along `dim`, of which each process has so many positions; differentiable."""
        return _Gather.apply(self, dim, tuple(sizes), band)  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    """All processes compute the same from the whole map, so the gradient of a band is its part of the map's gradient."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, dim: int, sizes: tuple[int, ...], band: Tensor) -> Tensor:
        ctx.place = dim, sum(sizes[: ranks.rank]), sizes[ranks.rank]
        shape = list(band.shape)
        pieces = []
        for source, size in enumerate(sizes):
            shape[dim] = size
            piece = band.contiguous() if source == ranks.rank else band.new_empty(shape)
            if size:
                numbers = piece.is_floating_point() or piece.is_complex()
                sent = piece if numbers else piece.view(torch.uint8)  # gloo knows not all kinds of whole numbers
                distributed.broadcast(sent, distributed.get_global_rank(ranks.group, source), group=ranks.group)
            pieces.append(piece)
        return torch.cat(pieces, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        return None, None, None, grad.narrow(*ctx.place)
