"""Classification of whole images."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.modules.base import Loss
from widefield.modules.streaming_module import StreamingModule


class ImageNetClassifier(StreamingModule):
    """A `StreamingModule` whose output are logits (N, classes) and whose targets are class indices (N,).

    Metrics and `predict_step` get probabilities, the softmax of the logits. Options are those of `BaseModule`.
    """

    def __init__(
        self,
        stream_net: nn.Module,
        head: nn.Module,
        tile_size: int | tuple[int, int | None] | None,
        loss_fn: Loss | None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stream_net, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities (N, classes); of a single logit (N, 1) its sigmoid."""
        return output.sigmoid() if output.shape[-1] == 1 else output.softmax(dim=-1)
