"""Any network by its name, with a trunk that streams: the classifier that `widefield fit` trains, and timm's models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.data import Target
from widefield.models.networks import TIMM_PREFIX, Weights, make_model, make_timm
from widefield.models.resnet.resnet import resnet_state_dict, split_resnet
from widefield.models.tasks import parts_of
from widefield.models.weights import read_torch_file
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import IMAGENET_MEAN, IMAGENET_STD
from widefield.modules.streaming_module import Loss
from widefield.streaming import split

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
        mean, std, value_range: Normalisation; see `StreamingCNN`.
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
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        value_range: tuple[float, float] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        target: Target | None = None,
    ) -> None:
        target = {"task": "classification"} if target is None else target
        task = parts_of(class_names, target)
        trunk, head = _trunk_and_head(model_name, len(class_names), weights, pooling)
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
            value_range=value_range,
            lr=lr,
            weight_decay=weight_decay,
        )
        self.class_names = list(class_names)
        self.target = target
        self.model_name = model_name
        self._predictions = task.predictions
        self.save_plain_hyperparameters(
            model_name=model_name,
            class_names=self.class_names,
            pooling=pooling,
            train_streaming_layers=train_streaming_layers,
            target=target,
        )

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


def _trunk_and_head(name: str, num_classes: int, weights: str | None, pooling: Pooling) -> tuple[nn.Module, nn.Module]:
    if pooling not in ("average", "max"):
        raise ValueError(f"pooling={pooling!r} must be 'average' or 'max'")
    net = make_model(name, num_classes, weights)
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
