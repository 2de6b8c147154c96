"""Batch norms that take the statistics of all processes, also where torch's own do not work: on the CPU."""

from typing import Any

import torch
import torch.distributed as dist
from lightly.utils.dist import gather
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncedBatchNorm(_BatchNorm):
    """A batch norm whose statistics in training are those of the batches of all processes together, with gradients through them."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        kind, dims = input.dtype, [0, *range(2, input.ndim)]
        input = input.to(torch.promote_types(kind, torch.float32))  # sums of squares do not fit in 16 bits
        count = torch.full((1,), float(input.numel() // input.shape[1]), dtype=input.dtype, device=input.device)
        sums = torch.cat([input.sum(dims), (input * input).sum(dims), count])
        sums = torch.stack(gather(sums)).sum(0)
        channels = input.shape[1]
        total = sums[-1]
        mean = sums[:channels] / total
        var = (sums[channels:-1] / total - mean * mean).clamp(min=0)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._follow(mean.detach(), var.detach() * (total / (total - 1)).detach())
        shape = [1, -1, *[1] * (input.ndim - 2)]
        out = (input - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)).to(kind)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            assert self.num_batches_tracked is not None
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)


class SyncBatchNormOnCPU(LayerSync):
    """Changes the class of every batch norm, and back: the modules, their weights and names stay."""

    def __init__(self) -> None:
        self._changed: list[tuple[nn.Module, type[nn.Module]]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                self._changed.append((module, type(module)))
                module.__class__ = SyncedBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        while self._changed:
            module, kind = self._changed.pop()
            module.__class__ = kind
        return model


def sync_options(on_cpu: bool) -> dict[str, Any]:
    """Arguments of Lightning's trainer that synchronise batch norms."""
    return {"plugins": [SyncBatchNormOnCPU()]} if on_cpu else {"sync_batchnorm": True}
