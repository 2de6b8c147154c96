"""ResNets that stream."""

from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection
from torchvision.models import ResNet

from widefield.models.names import RESNETS, unknown_model
from widefield.models.plain import make_resnet
from widefield.modules import ImageNetClassifier
from widefield.modules.base import Loss

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        net.fc = nn.Linear(net.fc.in_features, num_classes)
        nn.init.xavier_normal_(net.fc.weight)
        nn.init.zeros_(net.fc.bias)
    trunk = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
    return trunk, nn.Sequential(net.avgpool, nn.Flatten(), net.fc)


class StreamingResNet(ImageNetClassifier):
    """Any torchvision ResNet, or a narrow one, whose trunk streams.

    Args:
        model_name: One of `StreamingResNet.model_choices`.
        tile_size: See `StreamingCNN`; None lets the engine choose.
        loss_fn: Called as `loss_fn(logits, targets)`.
        train_streaming_layers: False freezes the trunk.
        metrics: See `BaseModule`.
        num_classes: Outputs. Other than the weights' own number makes a new last layer.
        weights: "DEFAULT" for torchvision's best ImageNet weights, None for random ones, or a file that
            `widefield.models.load_weights` reads.
        options: Those of `BaseModule`; `mean` and `std` are ImageNet's by default.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.
    """

    model_choices = RESNETS

    def __init__(
        self,
        model_name: str,
        tile_size: int | tuple[int, int | None] | None,
        loss_fn: Loss,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        num_classes: int = 1000,
        weights: str | None = "DEFAULT",
        **options: Any,
    ) -> None:
        if model_name not in self.model_choices:
            raise unknown_model(model_name, self.model_choices)
        trunk, head = split_resnet(make_resnet(model_name, num_classes, weights), num_classes)
        options = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **options}
        super().__init__(trunk, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)
