"""Running statistics of batch norm layers, updated by the statistics of a streamed batch."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def update_running_statistics(layer: nn.Module, batch: Tensor) -> None:
    """What a batch norm layer does in training mode: running = (1 - momentum) * running + momentum * batch.

    `batch` holds mean, sum of squared deviations and count, each of shape (1, C, 1, ...). The variance that is stored is the
    unbiased one; `momentum` None means the average over all batches (`torch.nn.BatchNorm2d`). Layers that keep no running
    statistics are left alone.
    """
    if not isinstance(layer, _BatchNorm) or not layer.track_running_stats or layer.running_mean is None:
        return
    assert layer.running_var is not None
    momentum = layer.momentum or 0.0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    mean, squares, count = (x.flatten().to(layer.running_mean.dtype) for x in batch)
    layer.running_mean.lerp_(mean, momentum)
    layer.running_var.lerp_(squares / (count - 1), momentum)
