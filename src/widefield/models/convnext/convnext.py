"""ConvNeXts that stream."""

from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

from widefield.models.networks import Weights, make_timm, make_torchvision, new_linear, one_name
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import by_default, check_options
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

    Without `loss_fn`, `metrics` and `num_classes` it is the trunk alone, as `StreamingResNet` is.

    Args:
        model_name: One of `StreamingConvNeXt.model_choices`; `encoder` is another name of this argument.
        tile_size, loss_fn, train_streaming_layers, metrics, num_classes, weights: As for `StreamingResNet`.
        additional_modules, remove_last_block: Of a trunk alone, as for `StreamingResNet`.
        use_stochastic_depth: Drop residuals at random in training mode, up to a tenth of those of the deepest block.
        options: Those of `BaseModule`; `mean` and `std` are ImageNet's by default.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.
    """

    model_choices = (*_TORCHVISION, *_TIMM)

    @classmethod
    def get_model_names(cls) -> list[str]:
        """Names of the networks."""
        return list(cls.model_choices)

    def __init__(
        self,
        model_name: str | None = None,
        tile_size: int | tuple[int, int | None] | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        num_classes: int | None = None,
        weights: Weights = "DEFAULT",
        use_stochastic_depth: bool = False,
        *,
        encoder: str | None = None,
        additional_modules: nn.Module | None = None,
        remove_last_block: bool = False,
        **options: Any,
    ) -> None:
        check_options(type(self), options)
        model_name = one_name(model_name, encoder, self.model_choices)
        alone = loss_fn is None and metrics is None and num_classes is None
        if not alone and (additional_modules is not None or remove_last_block):
            raise ValueError(
                "additional_modules and remove_last_block are for a trunk alone: leave loss_fn, metrics and num_classes out, and "
                "give the trunk to an ImageNetClassifier with a head"
            )
        num_classes = 1000 if num_classes is None and not alone else num_classes
        outputs = num_classes or 1000
        dropped = _DROPPED if use_stochastic_depth else 0.0
        if model_name in _TORCHVISION:
            net = make_torchvision(model_name, outputs, weights, stochastic_depth_prob=dropped)
            last = net.get_submodule("classifier.2")
            assert isinstance(last, nn.Linear)
            if last.out_features != outputs:
                net.set_submodule("classifier.2", new_linear(last.in_features, outputs))
            features = net.get_submodule("features")
            stages = [features[k : k + 2] for k in range(0, 8, 2)]  # type: ignore[index]
        else:
            net = make_timm(model_name, outputs, weights, drop_path_rate=dropped)
            stages = [net.get_submodule("stem"), *net.get_submodule("stages").children()]
        trunk: nn.Module
        head: nn.Module | None
        if alone:
            last_stage = slice(-1 if remove_last_block else None)
            trunk, head = nn.Sequential(*stages[last_stage]), None
            if additional_modules is not None:
                trunk.append(additional_modules)
        else:
            trunk, head = split(net)
        options = {**by_default(alone, options), **options}
        super().__init__(trunk, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
        self.save_plain_hyperparameters(
            weights=None,
            model_name=model_name,
            num_classes=num_classes,
            train_streaming_layers=train_streaming_layers,
            use_stochastic_depth=use_stochastic_depth,
        )


StreamingConvnext = StreamingConvNext = StreamingConvNeXt  # lightstream's spellings, of 0.0.x and 1.x
