"""The base classes of models of components, and of those that learn without labels: Lightning trains them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from widefield.components.component import BackboneConfig, Component, HeadConfig, InitConfig, NeckConfig
from widefield.components.data_sample import DataSample
from widefield.components.preprocessors.data_preprocessors import PreprocessorConfig, is_views
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, ComponentOf

TargetGeneratorConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "target_generator")]


_STEPS = {
    "train_step": "write loss(), or override training_step(batch, batch_idx)",
    "val_step": "write predict(), or override validation_step(batch, batch_idx)",
    "parse_losses": "loss() returns numbers by name, and those with 'loss' in their name are summed",
}
"""Methods of MMEngine's models that Lightning's take the place of, and what to do instead."""


class KeepsArguments(LightningModule):
    """Keeps the arguments of the outermost constructor, which alone make the same model again.

    A class of its own, for jsonargparse takes the arguments of a class that has a `__new__` from that.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__new__(cls)
        model.__dict__["_call"] = (args, kwargs)
        return model


class BaseModel(Component, KeepsArguments):
    """A model that gives its losses by name: a subclass writes `loss`, and Lightning does the rest.

    A batch is `(inputs, targets)`, or a dictionary with `inputs` and maybe `data_samples`. Inputs are images as a tensor
    (N, C, H, W), a list of lazily read images, or whatever else the data preprocessor takes; targets are class indices (N,),
    scores (N, C), or a `DataSample` for each image.

    The arguments of the constructor that are plain data stand in the checkpoint, so `load_from_checkpoint` needs no others than
    those that were given as objects.

    Args:
        data_preprocessor: Makes of a batch what `loss` gets.
        init_cfg: See `Component`.
        lr: Learning rate of AdamW; a configuration with a section `optimizer` decides otherwise.
        weight_decay: Its weight decay.
        pretrained: A checkpoint; short for `init_cfg={type: Pretrained, checkpoint: ...}`.
    """

    component_kind = "model"
    default_preprocessor: ClassVar[str] = "ClsDataPreprocessor"
    """The data preprocessor where none is given, or one without a type."""
    device: torch.device
    log_dict: Any  # this and the next are Lightning's; mypy does not see them
    save_hyperparameters: Any

    def __init__(
        self,
        data_preprocessor: PreprocessorConfig | None = None,
        init_cfg: InitConfig = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(init_cfg if pretrained is None else {"type": "Pretrained", "checkpoint": pretrained})
        for theirs, ours in _STEPS.items():
            if hasattr(self, theirs):
                raise WrongArgumentError(
                    f"{type(self).__name__} has a {theirs}, which nothing calls: Lightning trains; {ours}"
                )
        args, kwargs = self.__dict__.pop("_call")
        self.save_hyperparameters(plain_arguments(type(self), args, kwargs), logger=False)
        self.lr = lr
        self.weight_decay = weight_decay
        described = {} if data_preprocessor is None else data_preprocessor
        if isinstance(described, dict) and not {"type", "class_path"} & described.keys():
            described = {"type": self.default_preprocessor, **described}
        self.data_preprocessor = MODELS.build(described)

    def forward(self, inputs: Any, data_samples: Sequence[DataSample] | None = None, mode: str = "tensor") -> Any:
        """Return what `mode` names: features ("tensor"), losses ("loss"), or of a model that predicts samples ("predict").

        Args:
            inputs: Images, or views of them, as the data preprocessor gives them.
            data_samples: One for each image; losses need them.
            mode: One of these.
        """
        if mode == "tensor":
            return self.extract_feat(inputs)
        if mode == "loss":
            return self.loss(inputs, data_samples or ())
        predict: Any = getattr(self, "predict", None)
        if mode == "predict" and predict is not None:
            return predict(inputs, data_samples)
        raise RuntimeError(f'Invalid mode "{mode}".')

    @property
    def with_neck(self) -> bool:
        """True if there is a neck."""
        return getattr(self, "neck", None) is not None

    @property
    def with_head(self) -> bool:
        """True if there is a head."""
        return getattr(self, "head", None) is not None

    def extract_feat(self, inputs: Any) -> Any:
        """Return the features of images (N, C, H, W)."""
        raise NotImplementedError

    def loss(self, inputs: Any, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return losses and other numbers by name; those whose name contains "loss" are summed and minimised."""
        raise NotImplementedError

    def preprocess(self, batch: Any, training: bool = False) -> tuple[Any, list[DataSample]]:
        """Return inputs and samples of a batch, see the class, as `loss` gets them.

        Args:
            batch: On the device of the model; lazily read images are moved there.
            training: Whether the data preprocessor augments.

        Raises:
            ValueError: It is no batch, or lazily read images differ in size.
        """
        inputs, targets = split_batch(batch)
        _refuse_other_channels(inputs, targets)
        if isinstance(inputs, (list, tuple)) and inputs and hasattr(inputs[0], "read") and not self.reads_tiles:
            inputs = read_images(inputs).to(self.device)
        if targets is None:
            samples = [DataSample() for _ in (inputs[0] if is_views(inputs) else inputs)]
        else:
            samples = [as_sample(target) for target in targets]
        data = self.data_preprocessor({"inputs": inputs, "data_samples": samples}, training)
        return data["inputs"], data["data_samples"]

    @property
    def reads_tiles(self) -> bool:
        """True if lazily read images are left to the backbone, which reads them tile by tile."""
        return False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters that require a gradient."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def _step(self, batch: Any, phase: str) -> Tensor:
        inputs, samples = self.preprocess(batch, training=phase == "train")
        numbers = self.loss(inputs, samples)
        total = total_loss(numbers)
        shown = {f"{phase}_{name}": _number(value) for name, value in numbers.items() if name != "loss"}
        numbers = {f"{phase}_loss": total.detach(), **shown}
        self.log_dict(numbers, on_epoch=True, on_step=False, batch_size=len(samples), sync_dist=True)
        return total


class BaseSelfSupervisor(BaseModel):
    """A model that learns without labels: a subclass writes `loss`, and `extract_feat` where features are not the backbone's.

    A subclass with a constructor of its own hands its parts on by name: `super().__init__(backbone=backbone, neck=neck, ...)`.

    Args:
        backbone: Gives features.
        neck: What follows it; several make a sequence.
        head: Knows the loss.
        target_generator: Makes what is to be predicted.
        kwargs: Those of `BaseModel`; a data preprocessor without a type is a `SelfSupDataPreprocessor`.
    """

    default_preprocessor: ClassVar[str] = "SelfSupDataPreprocessor"

    def __init__(
        self,
        backbone: BackboneConfig,
        neck: NeckConfig | None = None,
        head: HeadConfig | None = None,
        target_generator: TargetGeneratorConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if backbone is None:
            raise WrongArgumentError(
                f"{type(self).__name__} has no backbone; a constructor of your own hands its parts on by name: "
                "super().__init__(backbone=backbone, neck=neck, head=head, init_cfg=init_cfg)"
            )
        super().__init__(**kwargs)
        self.backbone = MODELS.build(backbone)
        self.neck: Any = None if neck is None else MODELS.build(neck)
        self.head: Any = None if head is None else MODELS.build(head)
        self.target_generator: Any = None if target_generator is None else MODELS.build(target_generator)

    @property
    def with_target_generator(self) -> bool:
        """True if there is a target generator."""
        return self.target_generator is not None

    def extract_feat(self, inputs: Any) -> Any:
        """Return the features of images (N, C, H, W): what the backbone gives."""
        return self.backbone(inputs)

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Return how deep a parameter lies, and how many depths there are, for learning rates that fall with depth.

        Raises:
            NotImplementedError: The backbone does not say.
        """
        if not hasattr(self.backbone, "get_layer_depth"):
            raise NotImplementedError(f"{type(self.backbone).__name__} does not say how deep its layers lie")
        return self.backbone.get_layer_depth(param_name, "backbone.")

    def _require(self, *parts: str) -> None:
        """Raise WrongArgumentError if one of `parts` was not given."""
        for part in parts:
            if getattr(self, part) is None:
                raise WrongArgumentError(
                    f"{type(self).__name__} needs a {part}; describe it as {part}={{type: NAME, ...}}"
                )


def total_loss(numbers: Mapping[str, Any]) -> Tensor:
    """Return the sum of the means of all numbers whose name contains "loss"; a list of tensors counts as the sum of their means."""
    losses = [value for name, value in numbers.items() if "loss" in name]
    if not losses:
        raise ValueError(
            f"loss() returned {', '.join(numbers) or 'nothing'}; a loss is a number whose name contains 'loss'"
        )
    return torch.stack([_sum_of_means(loss) for loss in losses]).sum()


def read_images(images: Sequence[Any]) -> Tensor:
    """Return lazily read images of one size as a tensor (N, C, H, W) of their type.

    Raises:
        ValueError: Their sizes differ.
    """
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        sizes = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(
            f"the images of a batch have the shapes {sizes}; give images of one size, or data.batch_size=1"
        )
    return torch.stack([torch.as_tensor(image.read(0, 0, *image.shape[1:])) for image in images])


def _refuse_other_channels(inputs: Any, targets: Any) -> None:
    if not isinstance(inputs, (list, tuple)) or any(len(image.shape) != 3 for image in inputs):
        return  # a tensor, or views
    channels = [image.shape[0] for image in inputs]
    if len(set(channels)) > 1:
        odd = channels.index(min(set(channels), key=channels.count))
        sample = None if targets is None else targets[odd]
        name = sample.get("img_path", f"image {odd}") if isinstance(sample, DataSample) else f"image {odd}"
        others = next(count for count in channels if count != channels[odd])
        raise ValueError(
            f"{name} has {channels[odd]} channels, and others of its batch have {others}; give all three, "
            "as {type: RGB} under transforms does"
        )


def _sum_of_means(value: Any) -> Tensor:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return torch.stack([(part if part.is_floating_point() else part.float()).mean() for part in parts]).sum()


def _number(value: Any) -> Any:
    return _sum_of_means(value).detach() if isinstance(value, (Tensor, list, tuple)) else value


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets of a batch, see `BaseModel`; targets are None where there are none."""
    if isinstance(batch, Mapping) and "inputs" in batch:
        return batch["inputs"], batch.get("data_samples")
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Tensor):
        return batch, None
    keys = f"a dictionary with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise WrongArgumentError(
        f"a batch is (inputs, targets), a dictionary with inputs and data_samples, or a tensor of images, not {keys}"
    )


def as_sample(target: Any) -> DataSample:
    """Return a target as a sample: a `DataSample`, class indices, or a score from 0 to 1 for each class (floating numbers)."""
    if isinstance(target, DataSample):
        return target
    if isinstance(target, Tensor) and target.is_floating_point() and target.ndim == 1:
        if not bool(((target >= 0) & (target <= 1)).all()):
            raise WrongArgumentError(
                f"a target is {target.tolist()}; give class indices, or a score from 0 to 1 for each class"
            )
        return DataSample().set_gt_score(target.cpu())
    return DataSample().set_gt_label(target.cpu() if isinstance(target, Tensor) else target)


def plain_arguments(
    model: type, args: tuple[Any, ...], kwargs: dict[str, Any], partial: bool = False
) -> dict[str, Any]:
    """Return the arguments of a constructor that are plain data, with their defaults, or `partial` those alone that are given."""
    signature = inspect.signature(model.__init__)  # type: ignore[misc]
    bound = (signature.bind_partial if partial else signature.bind)(None, *args, **kwargs)
    if not partial:
        bound.apply_defaults()
    given: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:  # without self
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:  # handed on to the next constructor, which has names for them
            after = [one for one in model.__mro__ if "__init__" in vars(one)][1:]
            given |= plain_arguments(after[0], value, {}, partial=True) if value else {}
        else:
            given[name] = value
    return {name: value for name, value in given.items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """True if a value is made of dictionaries, lists, numbers and text alone."""
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
