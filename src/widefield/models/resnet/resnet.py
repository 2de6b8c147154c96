"""ResNets that stream."""

import copy
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.models.networks import RESNETS, Weights, make_resnet, new_linear, one_name
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import by_default, check_options
from widefield.modules.streaming_module import Loss

TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
"""Names of the layers of a ResNet that stream."""


@overload
def split_resnet(net: nn.Module, *, remove_last_block: bool = ...) -> nn.Sequential: ...
@overload
def split_resnet(
    net: nn.Module, num_classes: int | None, remove_last_block: bool = ...
) -> Any: ...  # the trunk alone for None or a bool
def split_resnet(net: nn.Module, num_classes: int | None = None, remove_last_block: bool = False) -> Any:
    """Split a torchvision ResNet, or one laid out like it, into the trunk that streams and the head.

    Args:
        net: Its layers are used as they are, not copied.
        num_classes: If it differs from the outputs of `net.fc`, `net.fc` is replaced by a new linear layer with
            Xavier-normal weights. A bool is `remove_last_block`, which is second in lightstream 1.x.
        remove_last_block: Leave `layer4` out.

    Raises:
        ValueError: The model has other parts than a ResNet.

    Returns:
        The trunk, from an image (N, 3, H, W) to a map (N, C, H/32, W/32), and, with `num_classes`, the head, from the map to
        (N, num_classes). Without `num_classes` the trunk alone, as lightstream 1.x has it.
    """
    if isinstance(num_classes, bool):
        remove_last_block, num_classes = num_classes, None
    if missing := [name for name in TRUNK if not hasattr(net, name)]:
        raise ValueError(
            f"the {type(net).__name__} is not laid out like a ResNet: it has no {', '.join(missing)}; "
            "widefield.split(net) cuts any model"
        )
    trunk = nn.Sequential(*(net.get_submodule(name) for name in (TRUNK[:-1] if remove_last_block else TRUNK)))
    if num_classes is None:
        return trunk
    last: nn.Linear = net.get_submodule("fc")  # type: ignore[assignment]
    channels = _channels(trunk) if remove_last_block else last.in_features
    if (channels, num_classes) != (last.in_features, last.out_features):
        net.fc = last = new_linear(channels, num_classes)
    return trunk, nn.Sequential(net.get_submodule("avgpool"), nn.Flatten(), last)


def resnet_state_dict(trunk: nn.Module, head: nn.Module | None, names: Sequence[str] = TRUNK) -> dict[str, Tensor]:
    """The weights of what `split_resnet` returned, on the CPU, under the names that they have in the ResNet.

    `names` are those of the trunk's layers.
    """
    layers = nn.ModuleDict(dict(zip(names, trunk.children(), strict=True)))
    if head is not None:
        layers["fc"] = [*head.children()][-1]
    return {name: tensor.detach().cpu() for name, tensor in layers.state_dict().items()}


class StreamingResNet(ImageNetClassifier):
    """Any torchvision ResNet, or a narrow one, whose trunk streams.

    Without `loss_fn`, `metrics` and `num_classes` it is the trunk alone, for an `ImageNetClassifier`, as lightstream 1.x has it:
    called, it gives the map, and the values of float images are from 0 to 255.

    Args:
        model_name: One of `StreamingResNet.model_choices`; `encoder` is another name of this argument.
        tile_size: See `StreamingCNN`; None lets the engine choose.
        loss_fn: Called as `loss_fn(logits, targets)`.
        train_streaming_layers: False freezes the trunk.
        metrics: See `BaseModule`.
        num_classes: Outputs, 1000 by default. Other than the weights' own number makes a new last layer.
        weights: "DEFAULT" for torchvision's best ImageNet weights, another name or member of its `WeightsEnum`, None for random
            ones, or a file that `widefield.models.load_weights` reads.
        additional_modules: Streamed behind the last layer of the trunk.
        remove_last_block: Leave `layer4` out.
        options: Those of `BaseModule`; `mean` and `std` are ImageNet's by default.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.

    Examples:
        >>> model = wf.StreamingResNet("resnet18", tile_size=64, loss_fn=nn.CrossEntropyLoss(), num_classes=2, weights=None)
        >>> torchvision.models.resnet18(num_classes=2).load_state_dict(model.plain_state_dict())
        <All keys matched successfully>
    """

    model_choices = RESNETS

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
        *,
        encoder: str | None = None,
        additional_modules: nn.Module | None = None,
        remove_last_block: bool = False,
        **options: Any,
    ) -> None:
        check_options(type(self), options)
        name = one_name(model_name, encoder, self.model_choices)
        alone = loss_fn is None and metrics is None and num_classes is None
        outputs = 1000 if num_classes is None else num_classes
        net = make_resnet(name, outputs, weights)
        trunk = split_resnet(net, remove_last_block=remove_last_block)
        head: nn.Module | None = None
        names = list(TRUNK[: len(trunk)])
        if additional_modules is not None:
            trunk.append(additional_modules)
            names.append("additional_modules")
        if not alone:
            channels, last = _channels(trunk), net.fc
            if (channels, outputs) != (last.in_features, last.out_features):
                last = new_linear(channels, outputs)
            head = nn.Sequential(net.avgpool, nn.Flatten(), last)
        options = {**by_default(alone, options), **options}
        super().__init__(trunk, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
        self._trunk_names = names
        self.save_plain_hyperparameters(
            weights=None,
            model_name=name,
            num_classes=num_classes if alone else outputs,
            train_streaming_layers=train_streaming_layers,
            remove_last_block=remove_last_block,
        )

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights under torchvision's names, on the CPU; those of `additional_modules` under that name."""
        return resnet_state_dict(self.stream_network.module, self.head, self._trunk_names)


def _channels(trunk: nn.Module) -> int:
    """Channels of the trunk's map."""
    with torch.no_grad():
        return int(copy.deepcopy(trunk).eval()(torch.zeros(1, 3, 256, 256)).shape[1])
