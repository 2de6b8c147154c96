"""`DenseModule`: a network that gives a map, its loss inside of what is streamed, for Lightning."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric

from widefield.components.losses.dense_losses import MAP_LOSSES, DenseLoss, one_hot_map
from widefield.components.metrics.dense_metrics import RegressionScores, SegmentationScores
from widefield.components.models.features import background_of, left_out
from widefield.errors import WrongArgumentError
from widefield.modules.batches import described
from widefield.modules.streaming_module import BaseModule
from widefield.registry import MODELS, ComponentOf, arguments_of, split_description, suggestion

_log = logging.getLogger(__name__)
DenseTask = Literal["segmentation", "regression"]
ClassWeights = Sequence[float] | Literal["balanced"] | None
MapLoss = Callable[[Tensor, Tensor], Tensor]
MapLossConfig = Annotated[str | dict[str, Any] | MapLoss | None, ComponentOf(MODELS, "loss")]
_AUX_WEIGHT = 0.5
"""Weight of the loss of an auxiliary map, as in torchvision's references for segmentation."""


class DenseNetwork(nn.Module):
    """A network whose map is compared with a target: what a `DenseModule` streams.

    Args:
        network: Gives a map (N, C, h, w), or a dictionary with the map `out`, and maybe `aux`, as torchvision's models do.
        loss: Called with a map and its target; returns a number.
        num_classes: C, for labels; None where targets are numbers.
        ignore_index: The label that does not count.
    """

    def __init__(self, network: nn.Module, loss: MapLoss, num_classes: int | None, ignore_index: int) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, image: Tensor, target: Tensor | None = None) -> Any:
        """Return the map; with a target the loss, and of labels the smallest and largest wrong one, (0, 0) if there is none.

        Not in training mode, the sums that metrics are made of follow: the confusion matrix (C, C), or those of `RegressionScores`,
        (C,) each.
        A map of another size than its target is resized to it, bilinearly.
        """
        out, aux = self._maps(image)
        if target is None:
            return out
        if self.num_classes is None:
            return self._numbers(out, aux, target)
        labels = (target[:, 0] if target.ndim == 4 else target).long()
        known = ((labels >= 0) & (labels < self.num_classes)) | (labels == self.ignore_index)
        wrong = torch.where(known, 0, labels)
        labels = torch.where(known, labels, self.ignore_index)
        out = _resized(out, labels)
        loss = self.loss(out, labels)
        if aux is not None:
            loss = loss + _AUX_WEIGHT * self.loss(_resized(aux, labels), labels)
        if self.training:
            return loss, wrong.amin((0, 1, 2)), wrong.amax((0, 1, 2))
        found = one_hot_map(out.detach().argmax(1), self.num_classes, torch.float64)  # float32 counts up to 2^24
        confusion = torch.einsum("nthw,nphw->tp", one_hot_map(labels, self.num_classes, torch.float64), found)
        return loss, wrong.amin((0, 1, 2)), wrong.amax((0, 1, 2)), confusion

    def _numbers(self, out: Tensor, aux: Tensor | None, target: Tensor) -> Any:
        target = (target.unsqueeze(1) if target.ndim == 3 else target).to(out.dtype)
        if out.shape[1] != target.shape[1]:
            raise WrongArgumentError(
                f"the network gives a map of shape {tuple(out.shape)}, and the target has {tuple(target.shape)}; give targets of "
                "as many channels"
            )
        out = _resized(out, target)
        loss = self.loss(out, target)
        if aux is not None:
            loss = loss + _AUX_WEIGHT * self.loss(_resized(aux, target), target)
        if self.training:
            return (loss,)
        true = target.double()
        error = out.detach().double() - true
        every = (error.abs(), error.square(), true, true.square(), torch.ones_like(true))
        return loss, *(each.sum((0, 2, 3)) for each in every)

    def _maps(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        given = self.network(image)
        if isinstance(given, Mapping) and "out" in given:
            return given["out"], given.get("aux")
        if isinstance(given, (list, tuple)) and len(given) == 1:
            given = given[0]
        if not isinstance(given, Tensor) or given.ndim != 4:
            what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else described(given)
            raise WrongArgumentError(
                f"the network gives {what}, expected a map (N, C, h, w), or a dictionary with such a map as 'out'"
            )
        if self.num_classes is not None and given.shape[1] != self.num_classes:
            raise WrongArgumentError(
                f"the network gives maps of {given.shape[1]} channels, and num_classes={self.num_classes}; give the same number"
            )
        return given, None


def _resized(made: Tensor, target: Tensor) -> Tensor:
    """Return a map (N, C, h, w) of the size of a target (..., H, W), bilinearly."""
    if made.shape[-2:] == target.shape[-2:]:
        return made
    return functional.interpolate(made, size=target.shape[-2:], mode="bilinear", align_corners=False)


class DenseModule(BaseModule):
    """A network that gives a map, trained on whole images of any size with its loss inside of what is streamed.

    So the map of logits is never whole in memory, and a training step takes the memory of its tiles. A batch is
    `(images, targets)`: images as for `BaseModule`, targets label maps (N, H, W) or maps of numbers (N, C, H, W), a lazily read
    map, or a list of them. Targets have the size of the images, or a whole fraction. Labels are whole numbers from 0, which are not
    scaled. The loss of a list is the mean of those of its images. Metrics, of validation and test, are those of all positions of a
    data set, whatever the tiles:

    - segmentation: `mean_iou`, `dice` and `iou_NAME` of each class, `accuracy`, see `SegmentationScores`;
    - regression: `mae`, `rmse` and `r2`, see `RegressionScores`.

    The state_dict keys are `stream_network.module.network.<key of the network>`. Norm layers are evaluated with their running
    statistics, unless `batch_statistics="exact"` is given, see `StreamingCNN`.

    Args:
        network: Gives a map (N, num_classes, h, w), or a dictionary with `out` and maybe `aux` as torchvision's segmentation models
            do, where the loss of `aux` counts half; or the description of one, `{type: package.Network, ...}`. A map of another
            size than its target, a quarter say, is resized to it bilinearly, inside of the loss.
        num_classes: Channels of the map.
        loss: A short name of `MAP_LOSSES.names(task)`, such as "dice" or "l2"; the description of a component, such as
            `{type: DiceLoss, whole_batch: true}`; or a function of (map, target) of operations that stream. By default
            "cross_entropy", for regression "l1".
        ignore_index: The label of positions that count neither in the loss nor in metrics.
        class_weights: A factor for each class, for losses with a short name; None means 1. "balanced" counts the pixels of the
            training label maps of a `SegmentedImages` once, when `trainer.fit` begins: a class has the weight N / (K n), where n
            of the N pixels that count are of it, and K classes are there, as in scikit-learn; one that is not there has 0. A
            checkpoint holds them.
        task: What the map is.
        class_names: Names of the classes in metrics; by default their numbers.
        tile_size, memory_budget, mean, std, value_range, lr, weight_decay, optimizer, lr_scheduler: See `BaseModule`, as for all
            other `options`.

    Raises:
        WrongArgumentError: An argument cannot be used; in a step, labels that are no class.
        UnsupportedOpError: In the first step, an operation of the network or the loss cannot be streamed.

    Examples:
        >>> network = torch.nn.Conv2d(3, 2, 3, padding=1)
        >>> module = DenseModule(network, 2, loss="dice", tile_size=256)
        >>> module(torch.rand(1, 3, 300, 400)).shape
        torch.Size([1, 2, 300, 400])
    """

    def __init__(
        self,
        network: nn.Module | dict[str, Any],
        num_classes: int,
        loss: MapLossConfig = None,
        ignore_index: int = 255,
        class_weights: ClassWeights = None,
        tile_size: int | tuple[int, int | None] | None = None,
        *,
        task: DenseTask = "segmentation",
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if task not in ("segmentation", "regression"):
            raise WrongArgumentError(f"task={task!r} must be 'segmentation' or 'regression'")
        if isinstance(network, Mapping):
            network = MODELS.build(network)
        if not isinstance(network, nn.Module):
            raise WrongArgumentError(f"network={network!r:.100} is no torch.nn.Module")
        segments = task == "segmentation"
        least = 2 if segments else 1
        if not isinstance(num_classes, int) or num_classes < least:
            raise WrongArgumentError(f"num_classes={num_classes!r} must be a whole number of at least {least}")
        if segments and 0 <= ignore_index < num_classes:
            raise WrongArgumentError(
                f"ignore_index={ignore_index} is one of the {num_classes} classes, from 0; give another number, such as 255"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise WrongArgumentError(
                f"there are {len(class_names)} class_names, and num_classes={num_classes}; give a name for each"
            )
        self._balanced = class_weights == "balanced"
        if isinstance(class_weights, str):
            if not self._balanced:
                raise WrongArgumentError(
                    f"class_weights={class_weights!r} must be 'balanced', or a number for each class"
                )
            class_weights = [1.0] * num_classes  # until they are known
        if class_weights is not None and len(class_weights) != num_classes:
            raise WrongArgumentError(
                f"there are {len(class_weights)} class_weights, and num_classes={num_classes}; give one for each"
            )
        made = _loss(loss, task, ignore_index, class_weights)
        if self._balanced and not isinstance(made, DenseLoss):
            raise WrongArgumentError(
                f"class_weights='balanced' is for the losses {', '.join(MAP_LOSSES.names(task))}; name one of them"
            )
        inner = DenseNetwork(network, made, num_classes if segments else None, ignore_index)
        super().__init__(inner, None, tile_size, **options)
        self.task = task
        self.class_names = [str(k) for k in range(num_classes)] if class_names is None else list(class_names)
        self.scores = nn.ModuleDict({f"{phase}_scores": self._new_scores() for phase in ("val", "test")})
        self.tables: dict[str, Tensor] = {}

    @property
    def network(self) -> nn.Module:
        """The network that was given."""
        return cast(DenseNetwork, self.stream_network.module).network

    def _new_scores(self) -> Metric:
        segments = self.task == "segmentation"
        return SegmentationScores(self.class_names) if segments else RegressionScores(len(self.class_names))

    @property
    def class_weights(self) -> list[float] | None:
        """The factor of each class in the loss; None where all count alike, or the loss is not one of those named."""
        weights = getattr(cast(DenseNetwork, self.stream_network.module).loss, "weights", None)
        return None if weights is None else cast(list[float], weights.tolist())

    def setup(self, stage: str) -> None:
        """As of `BaseModule`; balances the class weights before training.

        Raises:
            WrongArgumentError: There is nothing to count for it.
        """
        super().setup(stage)
        if self._balanced and stage == "fit":
            count = getattr(getattr(self.trainer, "datamodule", None), "class_counts", None)
            if count is None:
                raise WrongArgumentError(
                    "class_weights='balanced' counts the label maps of a data module SegmentedImages: train with one, or give a "
                    "number for each class"
                )
            _log.info("reading the training label maps once, for class_weights=balanced")
            self._weigh(balanced_weights(count()))
            shown = zip(self.class_names, self.class_weights or (), strict=True)
            _log.info("class weights: %s", ", ".join(f"{name} {weight:.4g}" for name, weight in shown))

    def _weigh(self, weights: Sequence[float]) -> None:
        loss: Any = cast(DenseNetwork, self.stream_network.module).loss
        loss.weights.copy_(torch.as_tensor(weights))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._balanced:
            checkpoint["class_weights"] = self.class_weights

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._balanced and "class_weights" in checkpoint:
            self._weigh(checkpoint["class_weights"])

    def predictions(self, output: Any) -> Any:
        """Return class probabilities (N, C, h, w) of logits; maps of numbers as they are."""
        if isinstance(output, list):
            return [self.predictions(one) for one in output]
        return output.softmax(1) if self.task == "segmentation" else output

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, phase: str) -> None:
        """Log the scores of a phase; of labels, keep the confusion matrix in `tables`."""
        scores: Any = self.scores[f"{phase}_scores"]
        if not scores.update_called:
            return
        values = {f"{phase}_{name}": value for name, value in scores.compute().items()}
        self.tables |= {name: value for name, value in values.items() if value.ndim}
        self.log_dict({name: value for name, value in values.items() if not value.ndim})
        scores.reset()

    def _step(self, batch: Any, phase: str) -> Tensor:
        if not isinstance(batch, (list, tuple)) or len(batch) < 2:
            raise ValueError(f"the {phase} step takes batches (images, targets), got {described(batch)}")
        images, targets = batch[:2]
        found = self._compared(images, targets)
        losses = [self._count(one, phase) for one in found]
        loss = torch.stack(losses).mean()
        count = len(images) if isinstance(images, (list, tuple, Tensor)) else 1
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "sync_dist": True}
        self.log(f"{phase}_loss", loss.detach(), batch_size=count, **options)
        return loss

    def _compared(self, images: Any, targets: Any) -> list[Any]:
        """Return what the network gives for each image of a list, or for a batch; without their backgrounds."""
        if not isinstance(images, (list, tuple)):
            images, targets = [images], [targets]
        if len(images) != len(targets):
            raise WrongArgumentError(f"a batch of {len(images)} images has {len(targets)} targets; give one for each")
        if self.stream_network.batch_statistics == "exact" and len(images) > 1:
            return cast(list[Any], self.stream_network(images, targets))
        return [
            self.stream_network(image, target, **left_out(background_of(image)))
            for image, target in zip(images, targets, strict=True)
        ]

    def _count(self, found: Any, phase: str) -> Tensor:
        """Add what was found to the scores of a phase, and return its loss."""
        loss, *sums = found
        scores: Any = self.scores[f"{phase}_scores"] if phase != "train" and not self.training else None
        if self.task == "regression":
            if scores is not None:
                scores.update(torch.stack(sums))
            return cast(Tensor, loss)
        low, high, *confusion = sums
        if low != 0 or high != 0:
            named = int(low) if low != 0 else int(high)
            classes = len(self.class_names)
            ignored = self.stream_network.module.ignore_index
            raise WrongArgumentError(
                f"the label {named} is neither a class, from 0 to {classes - 1}, nor ignore_index={ignored}; give the number of "
                "classes that there are, or map the labels to classes first"
            )
        if scores is not None:
            scores.update(*confusion)
        return cast(Tensor, loss)


def balanced_weights(counts: Any) -> list[float]:
    """Return weights of classes by their counts (C,), N / (K n): the mean over what was counted is 1.

    A class that is not there has 0; K is the number of the others.

    Raises:
        WrongArgumentError: None is there.

    Examples:
        >>> balanced_weights([30, 10, 0])
        [0.6666666666666666, 2.0, 0.0]
    """
    there = sum(1 for count in counts if count)
    if not there:
        raise WrongArgumentError("class_weights='balanced': the training label maps hold none of the classes")
    total = float(sum(counts))
    return [total / (there * float(count)) if count else 0.0 for count in counts]


def _loss(given: Any, task: DenseTask, ignore_index: int, class_weights: Sequence[float] | None) -> MapLoss:
    """Return the loss that a name, a description or a function means."""
    segments = task == "segmentation"
    names = MAP_LOSSES.names(task)
    if given is None:
        given = "cross_entropy" if segments else "l1"
    weights = {} if class_weights is None else {"class_weights": list(class_weights)}
    if isinstance(given, str):
        if given not in names:
            raise WrongArgumentError(f"loss: there is no {given!r} for {task}; {suggestion(given, names)}")
        named = MAP_LOSSES.get(given)
        given = {"type": named} if isinstance(named, type) else named
    if isinstance(given, Mapping):
        kind, arguments = split_description(given)
        own = {"ignore_index": ignore_index, **weights} if segments else {}
        taken = arguments_of(MODELS.get(kind) if isinstance(kind, str) else kind).named
        given = MODELS.build({"type": kind, **{name: own[name] for name in own if name in taken}, **arguments})
        weights = {} if segments and "class_weights" in taken else weights
    if weights:
        raise WrongArgumentError(
            f"class_weights are for the losses {', '.join(MAP_LOSSES.names('segmentation'))}; give them to your own loss"
        )
    if not callable(given) or isinstance(given, type):
        raise WrongArgumentError(
            f"loss={given!r:.100} cannot be called with (map, target); give a name ({', '.join(names)}) or a function"
        )
    return cast(MapLoss, given)
