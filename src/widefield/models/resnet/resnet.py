"""ResNets that stream."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchvision.models import ResNet

from widefield.models.networks import RESNETS, Weights, make_resnet, new_linear, unknown_model
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import IMAGENET_MEAN, IMAGENET_STD
from widefield.modules.streaming_module import Loss

_TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def split_resnet(net: ResNet, num_classes: int | None = None) -> tuple[nn.Sequential, nn.Sequential]:
    """Split a torchvision ResNet, or one laid out like it, into the trunk that streams and the head.

    Args:
        net: Its layers are used as they are, not copied.
        num_classes: If it differs from the outputs of `net.fc`, `net.fc` is replaced by a new linear layer with
            Xavier-normal weights. None keeps the layer.

    Returns:
        The trunk, from an image (N, 3, H, W) to a map (N, C, H/32, W/32), and the head, from the map to (N, num_classes).
    """
    if num_classes is not None and num_classes != net.fc.out_features:
        net.fc = new_linear(net.fc.in_features, num_classes)
    trunk = nn.Sequential(*(net.get_submodule(name) for name in _TRUNK))
    return trunk, nn.Sequential(net.avgpool, nn.Flatten(), net.fc)


def resnet_state_dict(trunk: nn.Module, head: nn.Module, names: Sequence[str] = _TRUNK) -> dict[str, Tensor]:
    """The weights of what `split_resnet` returned, on the CPU, under the names that they have in the ResNet.

    `names` are those of the trunk's layers.
    """
    layers = nn.ModuleDict(dict(zip((*names, "fc"), (*trunk.children(), [*head.children()][-1]), strict=True)))
    return {name: tensor.detach().cpu() for name, tensor in layers.state_dict().items()}


class StreamingResNet(ImageNetClassifier):
    """Any torchvision ResNet, or a narrow one, whose trunk streams.

    Args:
        model_name: One of `StreamingResNet.model_choices`; `encoder` is another name of this argument.
        tile_size: See `StreamingCNN`; None lets the engine choose.
        loss_fn: Called as `loss_fn(logits, targets)`.
        train_streaming_layers: False freezes the trunk.
        metrics: See `BaseModule`.
        num_classes: Outputs. Other than the weights' own number makes a new last layer.
        weights: "DEFAULT" for torchvision's best ImageNet weights, another name or member of its `WeightsEnum`, None for random
            ones, or a file that `widefield.models.load_weights` reads.
        additional_modules: Streamed behind the last layer of the trunk.
        remove_last_block: Leave `layer4` out.
        options: Those of `BaseModule`; `mean` and `std` are ImageNet's by default.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.
    """

    model_choices = RESNETS

    def __init__(
        self,
        model_name: str | None = None,
        tile_size: int | tuple[int, int | None] | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        num_classes: int = 1000,
        weights: Weights = "DEFAULT",
        *,
        encoder: str | None = None,
        additional_modules: nn.Module | None = None,
        remove_last_block: bool = False,
        **options: Any,
    ) -> None:
        if (model_name is None) == (encoder is None):
            raise ValueError(
                f"give model_name or encoder, one of them: got model_name={model_name!r}, encoder={encoder!r}"
            )
        name = model_name or encoder or ""
        if name not in self.model_choices:
            raise unknown_model(name, self.model_choices)
        trunk, head = split_resnet(make_resnet(name, num_classes, weights), num_classes)
        names = list(_TRUNK)
        if remove_last_block:
            trunk = trunk[:-1]
            names.pop()
        if additional_modules is not None:
            trunk.append(additional_modules)
            names.append("additional_modules")
        channels = _channels(trunk)
        if channels != head[-1].in_features:
            head[-1] = new_linear(channels, num_classes)
        options = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **options}
        super().__init__(trunk, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
        self._trunk_names = names
        self.save_plain_hyperparameters(
            weights=None,
            model_name=name,
            num_classes=num_classes,
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
