"""Any network by its name, with a trunk that streams: the classifier that `widefield fit` trains, and timm's models."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.components.models.features import background_of, mask_of_map
from widefield.components.necks.instance_pooling import InstancePooling
from widefield.data import Target
from widefield.errors import WrongArgumentError
from widefield.models.checkpointed import FromCheckpoint
from widefield.models.feature_cache import FeatureCache
from widefield.models.instances import FEATURES, PATCHES_PREFIX, is_patches, make_encoder, make_head, network_of
from widefield.models.lora import merged
from widefield.models.networks import TIMM_PREFIX, Weights, make_model, make_timm
from widefield.models.resnet.resnet import resnet_state_dict, split_resnet
from widefield.models.tasks import parts_of
from widefield.modules import ImageNetClassifier
from widefield.modules.constructor import check_options, default_statistics
from widefield.modules.streaming_module import Loss
from widefield.registry import Range
from widefield.streaming import split

Pooling = Literal["average", "max", "mean", "abmil", "clam", "clam-mb", "dsmil", "transmil", "abmilx"]


class Classifier(FromCheckpoint, ImageNetClassifier):
    """A network by name, streamed, trained to predict one of several classes of an image; or by `target` something else.

    By its task, the loss, the metrics, and what metrics and `predict_step` get:

    - classification: cross-entropy; accuracy and AUC; probabilities of the classes, which add up to 1;
    - multilabel: binary cross-entropy; AUC, mean average precision and F1 at 0.5; a probability for each label;
    - regression: squared error in standard deviations; in units, mean absolute and root mean squared error, and the numbers;
    - survival: see `HazardLoss`; Harrell's concordance index; the probability of the event in each interval of time.

    Its hyperparameters are plain data and stand in the checkpoint, so `Classifier.from_checkpoint` needs nothing else.

    Args:
        model_name: A torchvision ResNet, a narrow ResNet such as `resnet18_w16`, or any timm model as `timm/NAME`. As
            `patches:timm/NAME` it encodes patches, each by itself, a vision transformer say; "features" has no network, and images
            are files of features of patches, see `widefield.images.feature_files`.
        class_names: Names of the classes; a target is an index into them. Or names of the labels, numbers or intervals.
        tile_size: See `StreamingCNN`; None lets the engine choose.
        memory_budget: See `StreamingCNN`.
        weights: None for random weights, "DEFAULT" for pretrained ones (a download), or a file for `load_weights`.
        pooling: How the map becomes a vector: its average, or its maximum, per channel. The maximum suits labels that
            hang on small marks, which an average over a large map dilutes. Or how positions of the map are pooled as instances:
            mean, abmil, clam, clam-mb, dsmil, transmil or abmilx, see `widefield.models.instances`. Of patches and features,
            average and max are those of instances, too.
        train_streaming_layers: False freezes the trunk.
        in_channels: Channels of the images; the first layer is adapted to other than 3, see `make_model`.
        mean, std: Per channel, see `StreamingCNN`; None stands for ImageNet's, and lets `widefield fit` measure them on the
            training images where there are no pretrained weights or other than 3 channels. For an encoder of patches of 3 channels
            None stands for what timm says of the network, see `PatchEncoder`.
        value_range: What stands for 0 and 1, see `StreamingCNN`. `widefield fit` also takes "dtype", the range of the pixels'
            type, and "percentiles", the range of the training images from the percentile 0.1 to 99.9, which None means where they
            fill less than a quarter of their type's range.
        lr: Learning rate of AdamW.
        weight_decay: Its weight decay.
        target: The task and its numbers, as `LabelledImages.target` has them; None is classification.
        patch_size: Side of a patch in pixels.
        lora: Rank of adapters in an encoder of patches, see `add_adapters`: they train, and the encoder's own weights are frozen.
        cache_features: Compute the map of each image once and keep it, see `FeatureCache`. `widefield fit` keeps it in the run;
            elsewhere set `feature_cache`. Only with a frozen trunk.

    Raises:
        ValueError: An unknown model name, fewer than two classes, weights that don't belong to the model, a wrong target, or
            options that do not go together.
        OSError: The weights cannot be downloaded or read.

    Examples:
        >>> model = wf.models.Classifier("resnet18_w8", ["benign", "malignant"], pooling="max", memory_budget="2GiB")
        >>> model.hparams["pooling"]
        'max'
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
        patch_size: Annotated[int, Range(1)] = 224,
        lora: Annotated[int, Range(1)] | None = None,
        cache_features: bool = False,
    ) -> None:
        target = {"task": "classification"} if target is None else target
        task = parts_of(class_names, target)
        _refuse_conflicts(model_name, target, pooling, train_streaming_layers, lora, cache_features)
        if is_patches(model_name) or model_name == FEATURES:
            trunk: nn.Module = nn.Identity()
            channels = in_channels
            if is_patches(model_name):
                trunk = make_encoder(model_name, weights, in_channels, patch_size, lora, normalises=mean is None)
                channels = network_of(trunk).num_features
            head: nn.Module = make_head(pooling, channels, len(class_names))
        else:
            trunk, head = _trunk_and_head(model_name, len(class_names), weights, pooling, in_channels)
            mean, std = default_statistics(mean, std, in_channels)
        super().__init__(
            trunk,
            head,
            tile_size,
            task.loss,
            True,  # adapters train and the rest does not: what requires grad stays as it is
            MetricCollection(task.metrics),
            memory_budget=memory_budget,
            mean=mean,
            std=std,
            value_range=None if isinstance(value_range, str) else value_range,
            lr=lr,
            weight_decay=weight_decay,
        )
        if not train_streaming_layers:
            self.train_streaming_layers = False
        self.class_names = list(class_names)
        self.cache_features = cache_features
        self.feature_cache: FeatureCache | None = None
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
            "patch_size": patch_size,
            "lora": lora,
        }
        self.save_plain_hyperparameters(**self._plain)

    @property
    def reads_pixels(self) -> bool:
        """True if its images are images; False if they are features."""
        return self.model_name != FEATURES

    def forward(self, images: Any) -> Any:
        if self.reads_pixels and self.feature_cache is None:
            return super().forward(images)
        if isinstance(images, (list, tuple)):
            return torch.cat([self(image) for image in images])
        return self.forward_head_over(self.trunk_map(images), background_of(images))

    def trunk_map(self, image: Any) -> Any:
        if not self.reads_pixels:
            pixels = image if isinstance(image, Tensor) else torch.from_numpy(image.read(0, 0, *image.shape[1:]))[None]
            return pixels.to(next(self.parameters()))
        if self.feature_cache is None or isinstance(image, Tensor):
            return super().trunk_map(image)
        return self.feature_cache.get(self.stream_network, image, super().trunk_map)

    def output_and_loss(self, images: Any, targets: Tensor, phase: str) -> tuple[Any, Tensor]:
        if phase != "train" or not isinstance(self.head, InstancePooling):
            return super().output_and_loss(images, targets, phase)
        assert self.loss_fn is not None
        if isinstance(images, Tensor):
            return self.head.loss(self.trunk_map(images), targets, self.loss_fn)
        outputs, losses = [], []
        for image, target in zip(images, targets.split(1), strict=True):
            fmap = self.trunk_map(image)
            output, loss = self.head.loss(fmap, target, self.loss_fn, mask_of_map(background_of(image), fmap))
            outputs.append(output)
            losses.append(loss)
        return torch.cat(outputs), torch.stack(losses).mean()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.feature_cache is not None:
            self.stream_network.eval()  # what is kept is what validation computes

    def predictions(self, output: Tensor) -> Tensor:
        """Return predictions (N, classes) of outputs, see the class."""
        return self._predictions(output)

    @property
    def encoder(self) -> nn.Module:
        """The network that encodes patches.

        Raises:
            ValueError: There is none.
        """
        if not is_patches(self.model_name):
            raise WrongArgumentError(f"{self.model_name} encodes no patches; that does {PATCHES_PREFIX}timm/NAME")
        return network_of(self.stream_network.module)  # type: ignore[no-any-return]

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights under torchvision's or timm's names, on the CPU; those of an encoder of patches with its adapters merged."""
        if is_patches(self.model_name):
            return {name: value.detach().cpu() for name, value in merged(self.encoder).state_dict().items()}
        if self.model_name.startswith(TIMM_PREFIX) or isinstance(self.head, InstancePooling):
            return super().plain_state_dict()
        return resnet_state_dict(self.stream_network.module, self.head)


def _trunk_and_head(
    name: str, num_classes: int, weights: str | None, pooling: Pooling, in_channels: int
) -> tuple[nn.Module, nn.Module]:
    if pooling not in ("average", "max"):
        return _instances_of_map(name, num_classes, weights, pooling, in_channels)
    net = make_model(name, num_classes, weights, in_channels)
    if not name.startswith(TIMM_PREFIX):
        if pooling == "max":
            net.avgpool = nn.AdaptiveMaxPool2d(1)
        return split_resnet(net, num_classes)  # type: ignore[arg-type]
    if pooling == "max":
        raise ValueError(f"pooling='max' is for ResNets; {name} has its own pooling, use pooling='average'")
    return split(net)


def _instances_of_map(
    name: str, num_classes: int, weights: str | None, pooling: str, in_channels: int
) -> tuple[nn.Module, nn.Module]:
    """Return a trunk, and a head over the positions of its map.

    Raises:
        ValueError: The network gives no map.
    """
    if name.startswith(TIMM_PREFIX):
        net: Any = make_timm(name, 1, weights, in_chans=in_channels)
        if hasattr(net, "patch_embed") and hasattr(net, "pos_embed"):
            raise ValueError(f"{name} gives tokens and no map; {PATCHES_PREFIX}{name} encodes patches by it")
        net.reset_classifier(0, "")
        return net, make_head(pooling, net.num_features, num_classes)
    net = make_model(name, num_classes, weights, in_channels)
    trunk, _ = split_resnet(net, num_classes)
    return trunk, make_head(pooling, net.fc.in_features, num_classes)


def _refuse_conflicts(
    name: str, target: Target, pooling: str, trains: bool, lora: int | None, cache_features: bool
) -> None:
    """Raises ValueError for options that do not go together."""
    if lora is not None and not is_patches(name):
        raise ValueError(f"lora={lora} is for encoders of patches, and {name} is none; give {PATCHES_PREFIX}timm/NAME")
    if lora is not None and not trains:
        raise ValueError(
            f"lora={lora} trains adapters, and train_streaming_layers=False freezes them; give one of them"
        )
    if cache_features and trains:
        raise ValueError(
            "cache_features keeps the maps of a trunk, and this one trains, so that they change; freeze it with "
            "model.train_streaming_layers=false, or leave cache_features out"
        )
    if pooling.startswith("clam") and target.get("task") != "classification":
        raise ValueError(f"pooling={pooling!r} is for one class for each image, and the task is {target.get('task')}")


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

    Examples:
        >>> model = wf.StreamingTimm("test_resnet", tile_size=64, loss_fn=nn.CrossEntropyLoss(), num_classes=2, weights=None)
        >>> model(torch.rand(1, 3, 100, 70)).shape
        torch.Size([1, 2])
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
            weights=None, model_name=model_name, num_classes=num_classes, train_streaming_layers=train_streaming_layers
        )
