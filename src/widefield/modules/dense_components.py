"""`DenseModule`s of components: a backbone, a neck and a head that gives a map."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from widefield.components.component import BackboneConfig, HeadConfig, NeckConfig, init_parts
from widefield.components.models.base_model import KeepsArguments, plain_arguments
from widefield.components.models.features import streams
from widefield.errors import WrongArgumentError
from widefield.modules.dense_module import ClassWeights, DenseModule, DenseTask, MapLossConfig
from widefield.registry import MODELS


class DenseParts(nn.Module):
    """A backbone, a neck and a head that gives a map, one behind the other.

    Args:
        backbone: Gives a tuple of maps.
        neck: What follows it, or None.
        head: Takes what it gives; has `num_classes`, the channels of its map.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module | None, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, image: Tensor) -> Any:
        """Return the map of an image (N, C, H, W)."""
        features = self.backbone(image)
        return self.head(features if self.neck is None else self.neck(features))


class _OfComponents(DenseModule, KeepsArguments):
    """Base class of the models here, which say their task."""

    def __init__(
        self,
        task: DenseTask,
        backbone: BackboneConfig,
        head: HeadConfig,
        neck: NeckConfig | None,
        *args: Any,
        **options: Any,
    ) -> None:
        parts = DenseParts(MODELS.build(backbone), None if neck is None else MODELS.build(neck), MODELS.build(head))
        count = getattr(parts.head, "num_classes", None)
        if not isinstance(count, int):
            raise WrongArgumentError(
                f"{type(parts.head).__name__} does not say how many channels its map has; give a head with num_classes, such as "
                "{type: PyramidHead, num_classes: 3, in_channels: [64, 128]}"
            )
        if streams(parts.backbone):
            raise WrongArgumentError(
                "the backbone has streaming, and the whole network is streamed: leave it out there, and give the model "
                "memory_budget or tile_size"
            )
        arguments = self.__dict__.pop("_call")
        super().__init__(parts, count, *args, task=task, **options)
        self.save_hyperparameters(plain_arguments(type(self), *arguments), logger=False)

    def init_weights(self) -> None:
        """Initialise the weights of the components as their `init_cfg` say."""
        init_parts(self.network)


@MODELS.register_module()
class DenseClassifier(_OfComponents):
    """A class for each pixel: a backbone, a neck, a head that gives a map, and a loss, streamed as one.

    A `DenseModule` of components; of images and label maps it trains on, its metrics and its predictions see there.

    Args:
        backbone: Gives a tuple of maps. It has no `streaming` of its own.
        head: Gives logits of the maps, and has `num_classes`.
        neck: What stands between them; several make a sequence.
        loss, ignore_index, class_weights, tile_size, class_names: See `DenseModule`. Logits of another size than the labels are
            resized bilinearly.
        options: As for `DenseModule`: `memory_budget`, `mean`, `std`, `lr` and others.

    Raises:
        WrongArgumentError: The head does not say how many classes it has, the backbone streams, or see `DenseModule`.

    Example:
        DenseClassifier(
            {"type": "ResNet", "depth": 18, "out_indices": [0, 1, 2, 3]},
            head={"type": "PyramidHead", "num_classes": 3, "in_channels": [64, 128, 256, 512]},
            loss="dice",
        )
    """

    component_kind = "model"

    def __init__(
        self,
        backbone: BackboneConfig,
        head: HeadConfig,
        neck: NeckConfig | None = None,
        loss: MapLossConfig = None,
        ignore_index: int = 255,
        class_weights: ClassWeights = None,
        tile_size: int | tuple[int, int | None] | None = None,
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            "segmentation",
            backbone,
            head,
            neck,
            loss,
            ignore_index,
            class_weights,
            tile_size,
            class_names=class_names,
            **options,
        )


@MODELS.register_module()
class DenseRegressor(_OfComponents):
    """Numbers for each pixel: a backbone, a neck, a head that gives a map, and a loss, streamed as one.

    A `DenseModule` of components with `task="regression"`; of targets, metrics and predictions see there.

    Args:
        backbone, neck: See `DenseClassifier`.
        head: Gives a map of the maps, and has `num_classes`, the number of its channels.
        loss, tile_size: See `DenseModule`. A map of another size than the target is resized bilinearly.
        options: As for `DenseModule`.

    Raises:
        WrongArgumentError: See `DenseClassifier`.
    """

    component_kind = "model"

    def __init__(
        self,
        backbone: BackboneConfig,
        head: HeadConfig,
        neck: NeckConfig | None = None,
        loss: MapLossConfig = None,
        tile_size: int | tuple[int, int | None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__("regression", backbone, head, neck, loss, tile_size=tile_size, **options)
