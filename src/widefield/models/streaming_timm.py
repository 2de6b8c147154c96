"""Any timm model, with a trunk that streams."""

from typing import Any

from torchmetrics import Metric, MetricCollection

from widefield.models.networks import Weights, make_timm
from widefield.modules import ImageNetClassifier
from widefield.modules.streaming_module import Loss
from widefield.streaming import split


class StreamingTimm(ImageNetClassifier):
    """Any timm model that begins with layers which stream; the rest, from the first operation over the whole image on, is the head.

    Args:
        model_name: A name that timm knows, with or without `timm/` before it.
        tile_size, loss_fn, train_streaming_layers, metrics, num_classes, weights: As for `StreamingResNet`.
        options: Those of `BaseModule`; `mean` and `std` are those that timm states for the model by default.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        UnsupportedOpError: The model begins with an operation over the whole image.
        OSError: The weights cannot be downloaded or read.
    """

    def __init__(
        self,
        model_name: str,
        tile_size: int | tuple[int, int | None] | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        num_classes: int = 1000,
        weights: Weights = "DEFAULT",
        **options: Any,
    ) -> None:
        net = make_timm(model_name, num_classes, weights)
        settings: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
        options = {name: settings[name] for name in ("mean", "std") if name in settings} | options
        trunk, head = split(net)
        super().__init__(trunk, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
        self.save_plain_hyperparameters(
            weights=None,
            model_name=model_name,
            num_classes=num_classes,
            train_streaming_layers=train_streaming_layers,
        )
