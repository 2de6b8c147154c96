"""A streamed trunk with a head and a loss: the module to subclass."""

from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

from widefield.modules.base import BaseModule, Loss


class StreamingModule(BaseModule):
    """A trunk that streams, a head on its map, and a loss; see `BaseModule` for arguments, batches and attributes.

    The trunk and the head are parts of a network that was split, for example by `widefield.split` or `split_resnet`.
    Options are those of `BaseModule`.
    """

    head: nn.Module
    loss_fn: Loss

    def __init__(
        self,
        stream_network: nn.Module,
        head: nn.Module,
        tile_size: int | tuple[int, int | None] | None,
        loss_fn: Loss | None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stream_network, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
