"""Networks that give a map, by name, and the models of them that `widefield fit` trains: of classes and of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torchvision.models.segmentation as torchvision_segmentation
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import list_models

from widefield.components.heads.dense_heads import PyramidHead
from widefield.data import Target
from widefield.models.checkpointed import FromCheckpoint
from widefield.models.classifier import Classifier
from widefield.models.networks import TIMM_PREFIX, make_timm, make_torchvision, unknown_model
from widefield.models.weights import load_weights
from widefield.modules import DenseModule
from widefield.modules.constructor import default_statistics
from widefield.modules.dense_module import ClassWeights

SEGMENTATION_NETWORKS = tuple(list_models(torchvision_segmentation))
"""Names of torchvision's segmentation models."""


class PyramidSegmenter(PyramidHead):
    """A `PyramidHead` with its backbone, of which the logits are resized to the size of the image.

    Args:
        backbone: A network of timm with `features_only`.
        num_classes: Channels of the logits.
        width: Channels of the decoder.
    """

    def __init__(self, backbone: Any, num_classes: int, width: int = 128) -> None:
        super().__init__(num_classes, backbone.feature_info.channels(), width)
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return logits (N, num_classes, H, W) of images (N, C, H, W)."""
        logits = super().forward(self.backbone(x))
        return functional.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


def make_segmentation_network(
    name: str, num_classes: int, weights: str | None = None, in_channels: int = 3
) -> nn.Module:
    """A segmentation model of torchvision by its name, or any timm model with maps of several strides in a `PyramidSegmenter`.

    Args:
        name: One of `SEGMENTATION_NETWORKS`, or `timm/NAME`.
        num_classes: Channels of the logits.
        weights: None for random ones, "DEFAULT" for those of the backbone that are published (a download), or a file.
        in_channels: Channels of the images; other than 3 for timm's only.

    Raises:
        ValueError: An unknown name, or other than 3 channels for a model of torchvision.
        OSError: The weights cannot be downloaded or read.
    """
    published = weights if weights == "DEFAULT" else None
    if name.startswith(TIMM_PREFIX):
        backbone = make_timm(name, num_classes, published, in_chans=in_channels, features_only=True)
        net: nn.Module = PyramidSegmenter(backbone, num_classes)
    elif name in SEGMENTATION_NETWORKS:
        if in_channels != 3:
            raise ValueError(f"{name} takes images of 3 channels, and these have {in_channels}; name a model timm/NAME")
        net = make_torchvision(name, num_classes, None, weights_backbone=published)
    else:
        raise unknown_model(name, [*SEGMENTATION_NETWORKS, "timm/resnet18", "timm/convnext_tiny"])
    if weights is not None and published is None:
        load_weights(net, weights)
    return net


class Segmenter(FromCheckpoint, DenseModule):
    """A segmentation network by name, streamed, trained with its loss inside; see `DenseModule`.

    Its hyperparameters are plain data and stand in the checkpoint, so `Segmenter.from_checkpoint` needs nothing else.

    Args:
        model_name: A segmentation model of torchvision, or any timm model with maps of several strides as `timm/NAME`, which gets a
            small decoder, see `PyramidSegmenter`.
        class_names: Names of the classes, in the order of their labels.
        loss: The short name of a loss, such as "dice", see `DenseModule`.
        tile_size, memory_budget, mean, std, lr, weight_decay: As for `Classifier`.
        weights: None for random ones, "DEFAULT" for published ones of the backbone (a download), or a file.
        in_channels: Channels of the images.
        value_range: As for `Classifier`.
        ignore_index, class_weights: See `DenseModule`.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.
    """

    def __init__(
        self,
        model_name: str,
        class_names: Sequence[str],
        loss: str = "cross_entropy",
        tile_size: int | tuple[int, int] | None = None,
        memory_budget: int | str | None = None,
        weights: str | None = None,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: tuple[float, float] | Literal["dtype", "percentiles"] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        ignore_index: int = 255,
        class_weights: ClassWeights = None,
    ) -> None:
        network = make_segmentation_network(model_name, len(class_names), weights, in_channels)
        mean, std = default_statistics(mean, std, in_channels)
        super().__init__(
            network,
            len(class_names),
            loss,
            ignore_index,
            class_weights,
            tile_size,
            class_names=class_names,
            memory_budget=memory_budget,
            mean=mean,
            std=std,
            value_range=None if isinstance(value_range, str) else value_range,
            lr=lr,
            weight_decay=weight_decay,
        )
        self.model_name = model_name
        self.target = {"task": "segment"}
        self._plain = {
            "model_name": model_name,
            "class_names": self.class_names,
            "loss": loss,
            "in_channels": in_channels,
            "ignore_index": ignore_index,
            "class_weights": class_weights if isinstance(class_weights, (str, type(None))) else list(class_weights),
        }
        self.save_plain_hyperparameters(**self._plain)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the network, on the CPU."""
        return {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}


class ScaledMap(nn.Module):
    """A network whose map is given in other units: `out * std + mean`, for each channel.

    Args:
        network: Gives a map (N, C, h, w), or a dictionary of such maps.
        mean, std: C numbers each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        """Return the map of images (N, C, H, W), or the dictionary of maps."""
        found = self.network(x)
        if isinstance(found, Mapping):
            return {name: one * self.std + self.mean for name, one in found.items()}
        return found * self.std + self.mean


class MapRegressor(FromCheckpoint, DenseModule):
    """A network by name that gives numbers for each pixel, streamed, trained with its loss inside; see `DenseModule`.

    What the network computes is scaled by the mean and standard deviation of the training targets, so that maps, losses and errors
    are in the units of the targets. Its hyperparameters are plain data and stand in the checkpoint, so
    `MapRegressor.from_checkpoint` needs nothing else.

    Args:
        model_name: As for `Segmenter`.
        class_names: Names of the channels of a map.
        target: `mean` and `std` of each channel, as `PairedImages.target` has them; None takes 0 and 1.
        loss: "l1", "l2" or "huber".
        tile_size, memory_budget, mean, std, lr, weight_decay, weights, in_channels, value_range: As for `Segmenter`.

    Raises:
        ValueError: An unknown model name, or weights that don't belong to the model.
        OSError: The weights cannot be downloaded or read.
    """

    def __init__(
        self,
        model_name: str,
        class_names: Sequence[str] = ("0",),
        target: Target | None = None,
        loss: Literal["l1", "l2", "huber"] = "l1",
        tile_size: int | tuple[int, int] | None = None,
        memory_budget: int | str | None = None,
        weights: str | None = None,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: tuple[float, float] | Literal["dtype", "percentiles"] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        count = len(class_names)
        network = make_segmentation_network(model_name, count, weights, in_channels)
        mean, std = default_statistics(mean, std, in_channels)
        units: Target = {"task": "map", "mean": [0.0] * count, "std": [1.0] * count, **(target or {})}
        super().__init__(
            ScaledMap(network, units["mean"], units["std"]),
            count,
            loss,
            tile_size=tile_size,
            task="regression",
            class_names=class_names,
            memory_budget=memory_budget,
            mean=mean,
            std=std,
            value_range=None if isinstance(value_range, str) else value_range,
            lr=lr,
            weight_decay=weight_decay,
        )
        self.model_name = model_name
        self.target = units
        self._plain = {
            "model_name": model_name,
            "class_names": self.class_names,
            "target": dict(units),
            "loss": loss,
            "in_channels": in_channels,
        }
        self.save_plain_hyperparameters(**self._plain)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the network, which computes the map before it is scaled, on the CPU."""
        inner: Any = self.network
        return {name: tensor.detach().cpu() for name, tensor in inner.network.state_dict().items()}


def class_of(hyper_parameters: Mapping[str, Any]) -> type[Classifier] | type[Segmenter] | type[MapRegressor]:
    """Return the class whose checkpoints hold these hyperparameters."""
    if (hyper_parameters.get("target") or {}).get("task") == "map":
        return MapRegressor
    return Segmenter if "ignore_index" in hyper_parameters else Classifier
