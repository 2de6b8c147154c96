"""The Lightning module under all others: a streamed trunk, a head, a loss."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.streaming import LazyImage, StreamingCNN

Loss = Callable[[Any, Tensor], Tensor]


class BaseModule(pl.LightningModule):
    """A trunk that streams over images of any size, and what is computed from its map.

    Training is Lightning's automatic optimisation. A batch is `(images, targets)`, where images are a tensor (N, C, H, W), one
    lazy image, or a list of lazy images of any sizes; lazy images stay where they are, the trunk reads them tile by tile.
    The state_dict keys are `stream_network.module.<key of the trunk>` and `head.<key of the head>`.

    Attributes:
        stream_network: The trunk as a `StreamingCNN`.
        head: The module applied to the trunk's map, or None.
        loss_fn: The loss, or None.
        train_metrics, val_metrics, test_metrics: The metrics of each phase, or None.

    Args:
        stream_network: The trunk, of operations that are local in space; see `StreamingCNN`.
        head: Applied to the trunk's map (N, C, h, w) of one image or batch; None returns the map.
        tile_size: Pixels read per step; see `StreamingCNN`. None lets the engine choose.
        loss_fn: Called as `loss_fn(output, targets)`; returns a scalar tensor.
        train_streaming_layers: False freezes the trunk.
        metrics: Updated with `(predictions, targets)`, logged per epoch with the prefix `train_`, `val_` or `test_`.
        memory_budget, mean, std, value_range: See `StreamingCNN`.
        lr: Learning rate of the AdamW that `configure_optimizers` returns.
        weight_decay: Its weight decay.
    """

    train_metrics: MetricCollection | None
    val_metrics: MetricCollection | None
    test_metrics: MetricCollection | None

    def __init__(
        self,
        stream_network: nn.Module,
        head: nn.Module | None = None,
        tile_size: int | tuple[int, int | None] | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        *,
        memory_budget: int | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: tuple[float, float] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.stream_network = StreamingCNN(
            stream_network, tile_size, memory_budget=memory_budget, mean=mean, std=std, value_range=value_range
        )
        self.head = head
        self.loss_fn = loss_fn
        self.train_streaming_layers = train_streaming_layers
        if not train_streaming_layers:
            self.stream_network.requires_grad_(False)
        self.lr = lr
        self.weight_decay = weight_decay
        for phase in ("train", "val", "test"):
            setattr(self, f"{phase}_metrics", _for_phase(metrics, phase))

    def forward(self, images: Any) -> Any:
        """Head of the trunk's map of each image: of a list, concatenated over the images if there is a head, else a list."""
        maps = self.stream_network(images)
        if self.head is None:
            return maps
        if isinstance(maps, list):
            return torch.cat([self.forward_head(one) for one in maps])
        return self.forward_head(maps)

    def forward_head(self, x: Tensor) -> Any:
        """The head of the trunk's map `x`, or `x` itself if there is no head."""
        return x if self.head is None else self.head(x)

    def predictions(self, output: Any) -> Any:
        """What metrics and `predict_step` get of the output of `forward`: here the output itself."""
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Predictions for a batch with or without targets."""
        return self.predictions(self(batch[0] if _has_targets(batch) else batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the parameters that require a gradient.

        Raises:
            ValueError: There are none.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(
                "no parameter of this module requires a gradient, so there is nothing to train; "
                "give a head with parameters or train_streaming_layers=True"
            )
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move tensors; leave lazy images alone, which the trunk reads tile by tile."""
        if _is_lazy(batch):
            return batch
        if type(batch) in (list, tuple):
            return type(batch)(self.transfer_batch_to_device(part, device, dataloader_idx) for part in batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _step(self, batch: Any, phase: str) -> Tensor:
        if self.loss_fn is None:
            raise ValueError(
                f"{type(self).__name__} was made without loss_fn, so it has no {phase} step; give loss_fn or override the step"
            )
        images, targets = batch
        output = self(images)
        loss = self.loss_fn(output, targets)
        count = len(targets)
        self.log(f"{phase}_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=count)
        metrics: MetricCollection | None = getattr(self, f"{phase}_metrics")
        if metrics is not None:
            metrics.update(self.predictions(output.detach()), targets)
            self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=True, batch_size=count)
        return loss


def _for_phase(metrics: Metric | MetricCollection | None, phase: str) -> MetricCollection | None:
    if metrics is None:
        return None
    collection = metrics if isinstance(metrics, MetricCollection) else MetricCollection([metrics])
    return collection.clone(prefix=f"{phase}_")


def _is_lazy(part: Any) -> bool:
    return not isinstance(part, Tensor) and isinstance(part, LazyImage)


def _has_targets(batch: Any) -> bool:
    """Whether a batch is (images, targets): a pair whose second part is a tensor but not an image."""
    return isinstance(batch, (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Tensor) and batch[1].ndim < 3
