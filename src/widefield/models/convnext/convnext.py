"""ConvNeXts that stream."""

from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

from widefield.models.networks import Weights, make_timm, make_torchvision, new_linear, unknown_model
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import IMAGENET_MEAN, IMAGENET_STD
from widefield.modules.streaming_module import Loss
from widefield.streaming import split

_TORCHVISION = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
_TIMM = tuple(
    f"convnext_{size}"
    for size in "atto atto_ols femto femto_ols pico pico_ols nano nano_ols tiny_hnf".split()  # noqa: SIM905
)
_DROPPED = 0.1  # share of the deepest block's residuals, as torchvision has it for ConvNeXt-T


class StreamingConvNeXt(ImageNetClassifier):
    """A ConvNeXt of torchvision, or one of timm's smaller ones, whose trunk streams.

    Args:
        model_name: One of `StreamingConvNeXt.model_choices`.
        tile_size, loss_fn, train_streaming_layers, metrics, num_classes, weights: As for `StreamingResNet`.
        use_stochastic_depth: Drop residuals at random in training mode, up to a tenth of those of the deepest block.
        options: Those of `BaseModule`; `mean` and `std` are ImageNet's by default.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.
    """

    model_choices = (*_TORCHVISION, *_TIMM)

    def __init__(
        self,
        model_name: str,
        tile_size: int | tuple[int, int | None] | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        num_classes: int = 1000,
        weights: Weights = "DEFAULT",
        use_stochastic_depth: bool = False,
        **options: Any,
    ) -> None:
        if model_name not in self.model_choices:
            raise unknown_model(model_name, self.model_choices)
        dropped = _DROPPED if use_stochastic_depth else 0.0
        if model_name in _TORCHVISION:
            net = make_torchvision(model_name, num_classes, weights, stochastic_depth_prob=dropped)
            last = net.get_submodule("classifier.2")
            assert isinstance(last, nn.Linear)
            if last.out_features != num_classes:
                net.set_submodule("classifier.2", new_linear(last.in_features, num_classes))
        else:
            net = make_timm(model_name, num_classes, weights, drop_path_rate=dropped)
        trunk, head = split(net)
        options = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **options}
        super().__init__(trunk, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
        self.save_plain_hyperparameters(
            weights=None,
            model_name=model_name,
            num_classes=num_classes,
            train_streaming_layers=train_streaming_layers,
            use_stochastic_depth=use_stochastic_depth,
        )
