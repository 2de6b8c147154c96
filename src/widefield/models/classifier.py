"""Any network by its name, with a trunk that streams: the classifier that `widefield fit` trains, and timm's models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.components.checkpoints import read_torch_file
from widefield.data import Target
from widefield.models.networks import TIMM_PREFIX, Weights, make_model, make_timm
from widefield.models.resnet.resnet import resnet_state_dict, split_resnet
from widefield.models.tasks import parts_of
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import IMAGENET_MEAN, IMAGENET_STD, check_options
from widefield.modules.streaming_module import Loss
from widefield.streaming import split
from widefield.streaming.tiles import Normalisation

Pooling = Literal["average", "max"]


class Classifier(ImageNetClassifier):
    """A network by name, streamed, trained to predict one of several classes of an image; or by `target` something else.

    By its task, the loss, the metrics, and what metrics and `predict_step` get:

    - classification: cross-entropy; accuracy and AUC; probabilities of the classes, which add up to 1;
    - multilabel: binary cross-entropy; AUC, mean average precision and F1 at 0.5; a probability for each label;
    - regression: squared error in standard deviations; in units, mean absolute and root mean squared error, and the numbers;
    - survival: see `HazardLoss`; Harrell's concordance index; the probability of the event in each interval of time.

    Its hyperparameters are plain data and stand in the checkpoint, so `Classifier.from_checkpoint` needs nothing else.

    Args:
        model_name: A torchvision ResNet, a narrow ResNet such as `resnet18_w16`, or any timm model as `timm/NAME`.
        class_names: Names of the classes; a target is an index into them. Or names of the labels, numbers or intervals.
        tile_size: See `StreamingCNN`; None lets the engine choose.
        memory_budget: See `StreamingCNN`.
        weights: None for random weights, "DEFAULT" for pretrained ones (a download), or a file for `load_weights`.
        pooling: How the map becomes a vector: its average, or its maximum, per channel. The maximum suits labels that
            hang on small marks, which an average over a large map dilutes.
        train_streaming_layers: False freezes the trunk.
        in_channels: Channels of the images; the first layer is adapted to other than 3, see `make_model`.
        mean, std: Per channel, see `StreamingCNN`; None stands for ImageNet's, and lets `widefield fit` measure them on the
            training images where there are no pretrained weights or other than 3 channels.
        value_range: What stands for 0 and 1, see `StreamingCNN`. `widefield fit` also takes "dtype", the range of the pixels'
            type, and "percentiles", the range of the training images from the percentile 0.1 to 99.9, which None means where they
            fill less than a quarter of their type's range.
        lr: Learning rate of AdamW.
        weight_decay: Its weight decay.
        target: The task and its numbers, as `LabelledImages.target` has them; None is classification.

    Raises:
        ValueError: An unknown model name, fewer than two classes, weights that don't belong to the model, or a wrong target.
        OSError: The weights cannot be downloaded or read.
    """

    def __init__(
        self,
        model_name: str,
        class_names: Sequence[str],
        tile_size: int | tuple[int, int] | None = None,
        memory_budget: int | str | None = None,
        weights: str | None = None,
        pooling: Pooling = "average",
        train_streaming_layers: bool = True,
        in_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: tuple[float, float] | Literal["dtype", "percentiles"] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        target: Target | None = None,
    ) -> None:
        target = {"task": "classification"} if target is None else target
        task = parts_of(class_names, target)
        trunk, head = _trunk_and_head(model_name, len(class_names), weights, pooling, in_channels)
        if mean is None and std is None and in_channels == len(IMAGENET_MEAN):
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        super().__init__(
            trunk,
            head,
            tile_size,
            task.loss,
            train_streaming_layers,
            MetricCollection(task.metrics),
            memory_budget=memory_budget,
            mean=mean,
            std=std,
            value_range=None if isinstance(value_range, str) else value_range,
            lr=lr,
            weight_decay=weight_decay,
        )
        self.class_names = list(class_names)
        self.target = target
        self.model_name = model_name
        self._predictions = task.predictions
        self._plain = {
            "model_name": model_name,
            "class_names": self.class_names,
            "pooling": pooling,
            "train_streaming_layers": train_streaming_layers,
            "in_channels": in_channels,
            "target": target,
        }
        self.save_plain_hyperparameters(**self._plain)

    def normalise_by(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, value_range: tuple[float, float] | None
    ) -> None:
        """Normalise images so from now on, and say so in checkpoints; see `StreamingCNN`."""
        self.stream_network.normalisation = Normalisation.parse(mean, std, value_range)
        self.save_plain_hyperparameters(**self._plain)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        used = checkpoint["hyper_parameters"]
        self.normalise_by(used["mean"], used["std"], used["value_range"])

    def predictions(self, output: Tensor) -> Tensor:
        """Return predictions (N, classes) of outputs, see the class."""
        return self._predictions(output)

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights under torchvision's or timm's names, on the CPU."""
        if self.model_name.startswith(TIMM_PREFIX):
            return super().plain_state_dict()
        return resnet_state_dict(self.stream_network.module, self.head)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> "tuple[Classifier, dict[str, Any]]":
        """A classifier with the weights of a checkpoint, and the whole checkpoint (tensors and plain data).

        Args:
            path: A `.ckpt` file that `fit` wrote.
            options: `tile_size` and `memory_budget`, which belong to the machine and are not in the checkpoint.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a checkpoint of a `Classifier`.
        """
        checkpoint = read_checkpoint(path)
        try:
            classifier = cls(**checkpoint["hyper_parameters"], **options)
            classifier.load_state_dict(checkpoint["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path} is not a checkpoint that `widefield fit` wrote ({reason}); give its .ckpt file"
            ) from error
        return classifier, checkpoint


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, read with `weights_only=True`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as a checkpoint.
    """
    path = Path(path)
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; give a .ckpt file that `widefield fit` wrote"
        )
    return checkpoint


def _trunk_and_head(
    name: str, num_classes: int, weights: str | None, pooling: Pooling, in_channels: int
) -> tuple[nn.Module, nn.Module]:
    if pooling not in ("average", "max"):
        raise ValueError(f"pooling={pooling!r} must be 'average' or 'max'")
    net = make_model(name, num_classes, weights, in_channels)
    if not name.startswith(TIMM_PREFIX):
        if pooling == "max":
            net.avgpool = nn.AdaptiveMaxPool2d(1)
        return split_resnet(net, num_classes)  # type: ignore[arg-type]
    if pooling == "max":
        raise ValueError(f"pooling='max' is for ResNets; {name} has its own pooling, use pooling='average'")
    return split(net)


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
        check_options(type(self), options)
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
