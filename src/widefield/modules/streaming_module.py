"""A Lightning module: a streamed trunk, a head on its map, a loss."""

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection

from widefield.components.models.features import OverForeground, background_of, left_out, mask_of_map
from widefield.components.necks.instance_pooling import InstancePooling
from widefield.images import Background
from widefield.modules.batches import described, has_more, is_lazy, parts_moved
from widefield.modules.constructor import StreamingConstructor, check_options, without_effect
from widefield.modules.recordings import Recordings
from widefield.streaming import StreamingCNN
from widefield.streaming.budget import parse_tile_size

Loss = nn.Module | Callable[[Any, Tensor], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]


class BaseModule(pl.LightningModule):
    """A trunk that streams over images of any size, and what is computed from its map.

    Training is Lightning's automatic optimisation. A batch is `(images, targets)`, where images are a tensor (N, C, H, W), one
    lazy image, or a list of lazy images of any sizes; lazy images stay where they are, the trunk reads them tile by tile.
    The state_dict keys are `stream_network.module.<key of the trunk>` and `head.<key of the head>`.

    Attributes:
        stream_network: The trunk as a `StreamingCNN`.
        head: The module applied to the trunk's map, or None.
        loss_fn: The loss, or None.
        train_metrics, val_metrics, test_metrics: The metrics of each phase, or None.

    Args:
        stream_network: The trunk, of operations that are local in space; see `StreamingCNN`. Or a module or `StreamingCNN` that
            streams already, whose trunk is used as it is: tile, budget and normalisation are not given again.
        head: Applied to the trunk's map (N, C, h, w) of one image or batch; None returns the map.
        tile_size: Pixels read per step; see `StreamingCNN`. None lets the engine choose.
        loss_fn: Called as `loss_fn(output, targets)`; returns a scalar tensor.
        train_streaming_layers: False freezes the trunk.
        metrics: Updated with `(predictions, targets)`, logged per epoch with the prefix `train_`, `val_` or `test_`.
        memory_budget, mean, std, value_range: See `StreamingCNN`.
        lr: Learning rate of the AdamW that `configure_optimizers` returns.
        weight_decay: Its weight decay.
        optimizer: Makes another optimizer of the parameters to train, `functools.partial(torch.optim.SGD, lr=0.1)` say.
        lr_scheduler: Makes a schedule of the optimizer, stepped once an epoch; `ReduceLROnPlateau` watches `val_loss`.
        accumulate_grad_batches: That of the trainer, which it sets; None leaves the trainer's.
        tile_cache_dir, tile_cache_fname, tile_cache_path: Without effect: there is nothing to cache.
        options: Those of `StreamingConstructor`.
    """

    train_metrics: MetricCollection | None
    val_metrics: MetricCollection | None
    test_metrics: MetricCollection | None

    def __init__(
        self,
        stream_network: nn.Module,
        head: nn.Module | None = None,
        tile_size: int | tuple[int, int | None] | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        *,
        memory_budget: int | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        value_range: tuple[float, float] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        lr_scheduler: MakeSchedule | None = None,
        accumulate_grad_batches: int | None = None,
        tile_cache_dir: Any = None,
        tile_cache_fname: str | None = None,
        tile_cache_path: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if head is not None and not isinstance(head, nn.Module):
            raise ValueError(
                f"head={head!r:.100} is not a module; give a torch.nn.Module or None, and tile_size by its name"
            )
        if loss_fn is not None and (isinstance(loss_fn, type) or not callable(loss_fn)):
            raise ValueError(
                f"loss_fn={loss_fn!r:.100} cannot be called with (output, targets); give torch.nn.CrossEntropyLoss() say"
            )
        if isinstance(head, BaseModule):
            raise ValueError(
                f"head is a {type(head).__name__}, which streams; the trunk comes first, and the head after it"
            )
        if accumulate_grad_batches is not None and accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches} must be at least 1")
        check_options(type(self), options)
        options = {"mean": mean, "std": std, "memory_budget": memory_budget, "value_range": value_range, **options}
        self.stream_network = _streamed(stream_network, tile_size, options)
        self.head = head
        self.loss_fn = loss_fn
        self._train_streaming_layers = train_streaming_layers
        if not train_streaming_layers:
            self.stream_network.requires_grad_(False)
        self.tile_cache_dir, self.tile_cache_fname = tile_cache_dir, tile_cache_fname
        if any(given is not None for given in (tile_cache_dir, tile_cache_fname, tile_cache_path)):
            without_effect("tile_cache_dir, tile_cache_fname, tile_cache_path")
        self.accumulate_grad_batches = accumulate_grad_batches
        self.lr = lr
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._extra_params: list[nn.Parameter] = []
        self._recordings = Recordings()
        self._head_over: OverForeground | None = None
        self._range_seen = False
        for phase in ("train", "val", "test"):
            setattr(self, f"{phase}_metrics", _for_phase(metrics, phase))

    def forward(self, images: Any) -> Any:
        """Head of the trunk's map of each image: of a list, concatenated over the images if there is a head, else a list.

        The `background` of an image, if it has one, is left out: its trunk's map is zero there, and the head looks at the rest.
        """
        if isinstance(images, (list, tuple)) and any(background_of(image) is not None for image in images):
            each = [self(image) for image in images]
            return each if self.head is None else torch.cat(each)
        if (background := background_of(images)) is not None:
            return self.forward_head_over(self.trunk_map(images), background)
        maps = self.stream_network(images)
        if self.head is None:
            return maps
        if isinstance(images, (list, tuple)):
            return torch.cat([self.forward_head(one) for one in maps])
        return self.forward_head(maps)

    def trunk_map(self, image: Any) -> Any:
        """Return the trunk's map of one image or batch, zero in its background."""
        return self.stream_network(image, **left_out(background_of(image)))

    def forward_streaming(self, x: Any) -> Any:
        """The trunk's map of `x`, cut off from the trunk: a leaf of autograd that requires grad if the trunk trains.

        `backward_streaming` brings the leaf's gradient to the trunk, and so does `backward`. Of a list, a list. While streaming is
        disabled it is the plain trunk's map, and autograd goes on to the trunk by itself.

        Raises:
            ValueError: The trunk gives something else than one map.
        """
        if isinstance(x, (list, tuple)):
            return [self.forward_streaming(one) for one in x]
        fmap = self.stream_network(x)
        if not self.use_streaming:
            return fmap
        if not isinstance(fmap, Tensor):
            raise ValueError(
                f"forward_streaming gives one map, but this trunk gives a {type(fmap).__name__}; call self.stream_network(image), "
                "through which autograd goes by itself"
            )
        return self._recordings.cut(x, fmap) if fmap.requires_grad else fmap

    def backward_streaming(self, image: Any, gradient: Any) -> None:
        """The trunk's backward pass for `image`, of whose map `gradient` is the gradient; nothing if the trunk does not train.

        What `forward_streaming` recorded of the same image is used, and a gradient that was brought before is not brought again;
        without a record the image is streamed once more. Of a list of images, a list.
        """
        if isinstance(image, (list, tuple)):
            for one, its_gradient in zip(image, gradient, strict=True):
                self.backward_streaming(one, its_gradient)
            return
        if not any(parameter.requires_grad for parameter in self.stream_network.parameters()):
            return
        if gradient is None:
            raise ValueError(
                "backward_streaming got no gradient (None): call loss.backward() first, on a loss that depends on the map that "
                "forward_streaming returned while requires_grad was set"
            )
        if not self._recordings.bring_one(image, gradient):
            self.stream_network.backward(image, gradient)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's backward pass, then the trunk's for every map of `forward_streaming` that it has reached."""
        super().backward(loss, *args, **kwargs)
        self._recordings.bring(bool(kwargs.get("retain_graph")))

    @property
    def train_streaming_layers(self) -> bool:
        """True if the trunk trains. Setting it freezes or unfreezes all parameters of the trunk."""
        return self._train_streaming_layers

    @train_streaming_layers.setter
    def train_streaming_layers(self, value: bool) -> None:
        self._train_streaming_layers = bool(value)
        self.stream_network.requires_grad_(self._train_streaming_layers)
        optimizers: list[Optimizer] = getattr(self._trainer, "optimizers", [])
        known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        if value and known and not known.issuperset(map(id, self.stream_network.parameters())):
            warnings.warn(
                "the trunk is unfrozen, but the optimizer was made without its parameters: add them with "
                "optimizer.add_param_group, or let configure_optimizers take all parameters from the start",
                stacklevel=2,
            )

    @property
    def use_streaming(self) -> bool:
        """True if the trunk streams; else it runs on whole images."""
        return self.stream_network.enabled

    @use_streaming.setter
    def use_streaming(self, value: bool) -> None:
        self.stream_network.enabled = bool(value)

    def disable_streaming_hooks(self) -> None:
        """Run the trunk on whole images."""
        self.stream_network.disable()

    def enable_streaming_hooks(self) -> None:
        """Stream again."""
        self.stream_network.enable()

    @property
    def tile_size(self) -> tuple[int, int | None] | None:
        """Height and width of a tile in pixels; see `StreamingCNN`."""
        return self.stream_network.tile_size

    @tile_size.setter
    def tile_size(self, value: int | tuple[int, int | None] | None) -> None:
        self.stream_network.tile_size = parse_tile_size(value)

    def configure_tile_stride(self) -> npt.NDArray[np.int64]:
        """Distance between tiles in pixels, (height, width): the tile itself, because tiles do not overlap.

        Raises:
            ValueError: There is no tile size of two numbers, because the engine chooses the tile, or it is a strip.
        """
        if self.tile_size is None or self.tile_size[1] is None:
            raise ValueError(
                f"tile_size={self.tile_size} has no height and width; ask stream_network.plan(shape).tile_size"
            )
        return np.array(self.tile_size, dtype=np.int64)

    def freeze_streaming_normalization_layers(self) -> None:
        """Put the trunk's norm layers with running statistics in evaluation mode, as they are computed when the trunk streams.

        Not with `batch_statistics="exact"`, which depends on their mode.
        """
        for part in self.stream_network.frozen_norms:
            part.eval()

    def setup(self, stage: str) -> None:
        """Set the trainer's accumulation of gradients, if this module was given one.

        Raises:
            ValueError: For strategies that split parameters, weight averaging that resets frozen norm layers, and a trainer that
                accumulates otherwise than this module.
        """
        if stage == "fit" and self.accumulate_grad_batches is not None:
            if self.trainer.accumulate_grad_batches not in (1, self.accumulate_grad_batches):
                raise ValueError(
                    f"the module was given accumulate_grad_batches={self.accumulate_grad_batches}, the trainer "
                    f"{self.trainer.accumulate_grad_batches}; give it to the trainer alone, and accumulate_grad_batches=None here"
                )
            self.trainer.accumulate_grad_batches = self.accumulate_grad_batches
        if isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} splits parameters among devices, but a streamed trunk needs whole ones at "
                'every tile; use strategy="ddp". What fills the memory here are maps, and memory_budget bounds those'
            )
        averages = any(isinstance(callback, StochasticWeightAveraging) for callback in self.trainer.callbacks)
        if averages and self.stream_network.frozen_norms:
            raise ValueError(
                "StochasticWeightAveraging resets the running statistics of norm layers to gather them anew, but those of a "
                'streamed trunk are frozen; use EMAWeightAveraging or WeightAveraging, or batch_statistics="exact"'
            )

    def on_train_epoch_start(self) -> None:
        self.freeze_streaming_normalization_layers()

    def on_train_start(self) -> None:
        self.on_training_start()

    def on_training_start(self) -> None:
        """Another name of `on_train_start`, for those who override it."""

    def plain_model(self) -> "PlainModel":
        """A copy of the model without streaming, in evaluation mode: for `torch.export`, ONNX or other code."""
        return copy.deepcopy(PlainModel(self.stream_network, self.head)).eval()

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names that they had in the model which was split into trunk and head, on the CPU.

        Raises:
            ValueError: Trunk and head both have a weight of the same name, so they were not made by splitting one model.
        """
        trunk, head = self.stream_network.module.state_dict(), {} if self.head is None else self.head.state_dict()
        if both := sorted(trunk.keys() & head.keys()):
            raise ValueError(
                f"trunk and head both have {both[0]!r}, so there is no one model whose weights these are; "
                "save stream_network.module.state_dict() and head.state_dict() apart"
            )
        return {name: tensor.detach().cpu() for name, tensor in (trunk | head).items()}

    def get_trainable_params(self) -> list[nn.Parameter]:
        """All parameters that require a gradient, and those of `extend_trainable_params`."""
        parameters = (*self.parameters(), *self._extra_params)
        return list({id(parameter): parameter for parameter in parameters if parameter.requires_grad}.values())

    @property
    def params(self) -> list[nn.Parameter]:
        """Another name of `get_trainable_params()`."""
        return self.get_trainable_params()

    def extend_trainable_params(self, params: Iterable[nn.Parameter]) -> None:
        """Train these too, which are parameters of no part of this module."""
        self._extra_params += params

    def save_tile_cache_if_needed(self, overwrite: bool = False) -> None:
        """Nothing: there is no cache, so none can change a result."""
        without_effect("save_tile_cache_if_needed")

    def load_tile_cache_if_needed(self, use_tile_cache: bool = True) -> None:
        """Nothing: there is no cache, so none can change a result."""
        without_effect("load_tile_cache_if_needed")

    def forward_head(self, x: Tensor) -> Any:
        """The head of the trunk's map `x`, or `x` itself if there is no head."""
        return x if self.head is None else self.head(x)

    def forward_head_over(self, x: Tensor, background: Background | None) -> Any:
        """The head of the trunk's map `x` of one image without its background; `x` itself if there is no head.

        Raises:
            ValueError: An operation of the head needs the whole map.
        """
        if background is None or self.head is None:
            return self.forward_head(x)
        if isinstance(self.head, InstancePooling):
            return self.head(x, mask_of_map(background, x))
        if self._head_over is None or self._head_over.part is not self.head:
            self._head_over = OverForeground(self.head, self.stream_network)
        return self._head_over(x, background)

    def predictions(self, output: Any) -> Any:
        """Return what metrics and `predict_step` get of the output of `forward`: here the output itself."""
        return output

    def save_plain_hyperparameters(self, **arguments: Any) -> None:
        """Keep `arguments` and how images are normalised in the checkpoint, as plain data: `load_from_checkpoint` needs no more.

        Not kept: the loss and metrics, which are no plain data; `weights`, which the checkpoint replaces; and `tile_size` and
        `memory_budget`, which belong to the machine.
        """
        used = self.stream_network.normalisation
        for name, value in (("mean", used.mean), ("std", used.std), ("value_range", used.value_range)):
            arguments[name] = None if value is None else [float(number) for number in value]
        self.save_hyperparameters({**arguments, "lr": self.lr, "weight_decay": self.weight_decay}, logger=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Predictions for a batch of images, alone or with labels, names or the like behind them."""
        return self.predictions(self(batch[0] if has_more(batch) else batch))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of `get_trainable_params()` and its schedule, as the arguments say.

        Raises:
            ValueError: There are no such parameters.
        """
        parameters = self.get_trainable_params()
        if not parameters:
            raise ValueError(
                "no parameter of this module requires a gradient, so there is nothing to train; "
                "give a head with parameters or train_streaming_layers=True"
            )
        make = self.optimizer or partial(torch.optim.AdamW, lr=self.lr, weight_decay=self.weight_decay)
        optimizer = make(parameters)
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "monitor": "val_loss"},
        }

    def to_onnx(self, file_path: Any, input_sample: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        """`torch.onnx.export` of `plain_model()`."""
        return torch.onnx.export(self.plain_model(), (input_sample,), file_path, **kwargs)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move tensors; leave the images where they are, which the trunk reads tile by tile.

        Images are the first of several parts of a batch, the entries `image`, `images` or `inputs` of a dict, or the batch itself.
        With `copy_to_gpu=True`, or while streaming is disabled, tensors among them are moved too.
        """
        move = partial(super().transfer_batch_to_device, device=device, dataloader_idx=dataloader_idx)
        whole = self.stream_network.copy_to_gpu or not self.use_streaming

        def placed(image: Any) -> Any:
            self._look_at_range(image)
            return move(image) if whole and not is_lazy(image) else image

        return parts_moved(batch, placed, move)

    def _look_at_range(self, image: Any) -> None:
        """Warn if the first image is of floats up to 1 where they are taken to be up to 255, say."""
        top = (self.stream_network.normalisation.value_range or (0, 1))[1]
        if self._range_seen or not isinstance(image, Tensor) or not image.is_floating_point() or not image.numel():
            return
        self._range_seen = True
        if top > 2 and image.amax() <= 1:
            warnings.warn(
                f"the values of the first image are at most {image.amax():g}, but {top:g} stands for white here: to the network it "
                "is black. If its values are from 0 to 1, give value_range=(0, 1)",
                stacklevel=2,
            )

    def _step(self, batch: Any, phase: str) -> Tensor:
        if self.loss_fn is None:
            raise ValueError(
                f"{type(self).__name__} was made without loss_fn, so it has no {phase} step; give loss_fn or override the step"
            )
        if not isinstance(batch, (list, tuple)) or len(batch) < 2:
            raise ValueError(
                f"the {phase} step takes batches (images, targets), got {described(batch)}; let the data set return a pair, or "
                "override the step"
            )
        images, targets = batch[:2]
        output, loss = self.output_and_loss(images, targets, phase)
        count = len(targets)
        shown: dict[str, Any] = {"on_step": False, "on_epoch": True, "prog_bar": True, "batch_size": count}
        self.log(f"{phase}_loss", loss.detach(), sync_dist=True, **shown)
        metrics: MetricCollection | None = getattr(self, f"{phase}_metrics")
        if metrics is not None:
            metrics.update(self.predictions(output.detach()), targets)
            self.log_dict(metrics, **shown)
        return loss

    def output_and_loss(self, images: Any, targets: Tensor, phase: str) -> tuple[Any, Tensor]:
        """Return the output for a batch, and the loss of a step of the phase "train", "val" or "test"."""
        assert self.loss_fn is not None
        output = self(images)
        return output, self.loss_fn(output, targets)


def _streamed(network: nn.Module, tile_size: Any, options: dict[str, Any]) -> StreamingCNN:
    """The trunk, streamed by these options; that of a module that streams already as it is.

    Raises:
        ValueError: It streams already, and options are given nevertheless, or it has a head of its own.
    """
    if isinstance(network, BaseModule) and network.head is not None:
        raise ValueError(
            f"this {type(network).__name__} has a head already: train it as it is, or make it without loss_fn and num_classes, or "
            "give its stream_network"
        )
    trunk = network.stream_network if isinstance(network, BaseModule) else network
    if not isinstance(trunk, StreamingCNN):
        return StreamingConstructor(trunk, tile_size, **options).prepare_streaming_model()
    given = sorted(name for name, value in {"tile_size": tile_size, **options}.items() if value is not None)
    if given:
        raise ValueError(
            f"{type(network).__name__} streams already, as it was told when it was made; give {', '.join(given)} there"
        )
    return trunk


def _for_phase(metrics: Any, phase: str) -> MetricCollection | None:
    if metrics is None:
        return None
    collection = metrics if isinstance(metrics, MetricCollection) else MetricCollection(metrics)
    return collection.clone(prefix=f"{phase}_{collection.prefix or ''}")


class PlainModel(nn.Module):
    """Normalisation, trunk and head as one ordinary module that runs whole images: for `torch.export`, ONNX or other code.

    The image (N, C, H, W) is what the streamed model takes; that a float image is not scaled to 0..1 is not noticed here.

    Args:
        network: The streamed trunk, whose module is used as it is.
        head: Applied to its map; None returns the map.
    """

    def __init__(self, network: StreamingCNN, head: nn.Module | None) -> None:
        super().__init__()
        self.trunk = network.module
        self.head = nn.Identity() if head is None else head
        self.normalisation = network.normalisation

    def forward(self, image: Tensor) -> Tensor:
        """The output for an image (N, C, H, W)."""
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.get_default_dtype())
        return self.head(self.trunk(self.normalisation.unchecked(image, dtype)))
