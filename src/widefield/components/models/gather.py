"""The batches of all processes as one."""

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """The tensors (N, ...) of all processes, one after the other, (N * processes, ...), without gradients of the others'.

    Each process has to bring as many rows.
    """
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradients(tensor: Tensor) -> Tensor:
    """`gather`, through which gradients flow back to the process that each row is from: the sum of those of all processes.

    A loss of all rows that every process computes then has, after the mean that DDP takes, the gradients of one process.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(world_size())[dist.get_rank()]
