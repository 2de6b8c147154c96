"""`widefield.train`, which is `widefield.pretrain`."""

import errno
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, Dataset

from widefield.components.checkpoints import read_torch_file
from widefield.images import ImageReadError
from widefield.modules import NotFiniteError
from widefield.pretraining.arguments import Settings, Workers, parse
from widefield.pretraining.callbacks import TERMINATED, CallbackArgs, Export, StopAfter, leave_signals
from widefield.pretraining.checkpoint import Checkpoint, load_checkpoint, read_to_resume
from widefield.pretraining.dataset import Index, OnBadImage, ViewDataset
from widefield.pretraining.dry_run import dry_run
from widefield.pretraining.embedding import ActivationCheckpointArgs, EmbeddingModel, StreamingArgs, checkpoint_blocks
from widefield.pretraining.labels import labels_of
from widefield.pretraining.loggers import LoggerArgs, forget_after
from widefield.pretraining.methods.base import Run
from widefield.pretraining.module import Pretraining
from widefield.pretraining.out import OutFolder
from widefield.pretraining.settings import Count
from widefield.pretraining.slides import SlideArgs
from widefield.pretraining.source import make_source
from widefield.pretraining.trainer import make_trainer
from widefield.pretraining.views import Views
from widefield.pretraining.wrapping import to_training_mode, wrap
from widefield.registry import Range

_log = logging.getLogger(__name__)
LOG_EVERY = 50
DARK = 8
"""An image whose largest value is that of its type divided by this is of a camera of fewer bits, most likely."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""No space is left on a disk, or none for this user."""


def train(
    *,
    out: Path | str,
    data: str | Path | Sequence[str | Path] | Dataset[Any],
    model: str | nn.Module,
    method: str = "simclr",
    method_args: Mapping[str, Any] | None = None,
    embed_dim: Count | None = None,
    epochs: Annotated[int, Range(0)] | Literal["auto"] = "auto",
    batch_size: Count = 128,
    gradient_accumulation_steps: Count = 1,
    num_workers: Workers = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: Count = 1,
    resume_interrupted: bool = False,
    checkpoint: Path | str | None = None,
    overwrite: bool = False,
    accelerator: Any = "auto",
    strategy: Any = "auto",
    precision: Any = "auto",
    float32_matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto",
    seed: Annotated[int, Range(0)] = 0,
    on_bad_image: OnBadImage = "skip",
    loggers: LoggerArgs | Mapping[str, Any] | None = None,
    callbacks: CallbackArgs | Mapping[str, Any] | None = None,
    optim: str = "auto",
    optim_args: Mapping[str, Any] | None = None,
    transform_args: Mapping[str, Any] | None = None,
    slides: SlideArgs | Mapping[str, Any] | None = None,
    streaming: StreamingArgs | Mapping[str, Any] | None = None,
    loader_args: Mapping[str, Any] | None = None,
    trainer_args: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    activation_checkpoint_args: ActivationCheckpointArgs | Mapping[str, Any] | None = None,
    resume: bool | None = None,
) -> None:
    """Pretrain a model on images without labels.

    Everything that can be checked is, the model on a batch of noise included, before `out` is touched. It then gets
    `checkpoints`, `exported_models/exported_last.pt` (the state dict of the model), `metrics.jsonl`, `train.log`,
    `config.yaml`, `augmented_views.png` (what the model is shown) and at the end `report.html`.
    Checkpoints hold tensors and plain data only. A seed reproduces a run bit for bit on a CPU.

    Ctrl-C and SIGTERM end a run after the step that it is in, with a checkpoint of it; the second time at once.

    Args:
        out: Folder of the run, which must be new or empty.
        data: A folder of images, searched with all below; a file; a list of such; or a torch dataset of images (tensors
            (C, H, W), arrays (H, W, C) or Pillow images), of (image, ...) or of {"image": ...}.
        model: A wrapper with `get_model`, `forward_features`, `forward_pool` and `feature_dim`; a model of torchvision or timm
            or a backbone of Widefield; or the name of one, such as "torchvision/resnet18", "timm/convnext_tiny" or
            "widefield/ResNet". It is put into training mode; only parts without a weight that trains stay in evaluation mode, if
            they are.
        method: One of `widefield.pretraining.METHODS`, or an import path.
        method_args: Arguments of the method's class.
        embed_dim: Channels of an embedding layer on top of the model, a 1x1 convolution; None: no such layer.
        epochs: "auto" is 100, or as many as the `auto_steps` of the method take (125000 of dinov2).
        batch_size: Images of a batch over all devices and nodes.
        gradient_accumulation_steps: Batches of an optimizer step; the learning rate is scaled to all of them.
        num_workers: Processes that read images, for each device.
        devices, num_nodes, accelerator, strategy, precision: Of Lightning's `Trainer`. With several devices batch norms are
            synchronised. precision="auto" is "bf16-mixed" on a GPU that can, else "32-true".
        resume_interrupted: Go on with the run in `out` at its last checkpoint, in the middle of an epoch too.
        checkpoint: Start from the weights of the model in this checkpoint or exported state dict.
        overwrite: Allow a folder that is not empty; what an earlier run wrote in it is removed, other files stay.
        float32_matmul_precision: Of `torch.set_float32_matmul_precision`; "auto" leaves it.
        seed: Of the weights that are made here, of the order of images and of their views.
        on_bad_image: What to do with an image that cannot be read: "skip" it, and list it in bad_images.csv, or "raise".
        loggers: Settings by name, None turns one off: jsonl (on), tensorboard (on if installed), csv, mlflow, wandb.
        callbacks: Settings by name, None turns one off: learning_rate_monitor, early_stopping,
            model_export, model_checkpoint, device_stats_monitor (off), quality (effective rank and spread of embeddings, k-nearest-
            neighbour accuracy if there are labels: folders of classes, `targets` of a dataset or {"labels": CSV file}), report.
        optim: "auto" is what the method is best trained with; or sgd, adamw, lars; or adamw8bit, adamw whose state takes a byte for
            each number (needs bitsandbytes, which the extra adamw8bit brings).
        optim_args: lr (for the method's reference batch; it is scaled to yours), weight_decay and others of the optimizer.
        transform_args: Changes of the method's views; None turns one off. See `widefield.pretraining.transform_args.TransformArgs`.
        slides: Take `data` for slides, of which random patches are read: patch_size, patches_per_slide, level or spacing,
            foreground.
        streaming: Run the model tile by tile, so that views may have any size: tile_size, memory_budget, batch_statistics and
            others of `widefield.StreamingCNN`. An empty dictionary lets the engine choose.
        loader_args: Of torch's `DataLoader`; batch_size counts per device here.
        trainer_args: Of Lightning's `Trainer`, such as max_steps.
        model_args: Of the constructor of a model that is given by name.
        activation_checkpoint_args: Of vision transformers: {"enabled": True} computes what is in a block again in the backward
            pass instead of keeping it; with "every_n_blocks" in one of so many blocks.
        resume: An older name of `resume_interrupted`.

    Raises:
        ValueError: Something that was given cannot be used; the message has a line for each error. `out` is as it was.
        NotFiniteError: A loss or a weight became NaN or infinite. The checkpoints and the exported model are of before, and the
            message says how to go on.
        UnsupportedOpError: A layer of the model cannot be streamed. `out` is as it was.
        ImageReadError: A bad image, with `on_bad_image="raise"`, or too many of them.
        OSError: No space is left on the disk. What was written before is whole, and the message says how to go on.
    """
    settings = parse(train, locals())
    folder = OutFolder(settings.given.out.expanduser().resolve())
    leads = _is_rank_zero()
    if leads:
        folder.check(settings.given.overwrite, settings.given.resume_interrupted)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        trainer, module, resumed = _prepare(settings, folder)
        if leads:
            # an error in the first step is of what was given
            stack.enter_context(folder.as_it_was(if_true=lambda: module.batches <= 1))
            stack.enter_context(folder.opened(clear=settings.given.overwrite))
            stack.enter_context(_logging_to(folder.log))
            folder.config.write_text(module.settings.as_yaml(), encoding="utf-8")
            _log.debug("settings:\n%s", module.settings.as_yaml(longest=10))
            _log.info("training %s images into %s", len(module.dataset), folder.path)
            if resumed is not None:
                _log.info("restoring %s: epoch %d, step %d", folder.last, resumed.epoch, resumed.step)
            elif settings.given.resume_interrupted:
                _log.warning("there is no %s to resume: starting from scratch", folder.last)
            if settings.given.resume_interrupted:
                forget_after(folder.metrics, 0 if resumed is None else resumed.step)
        _fit(trainer, module, folder, resumed is not None, settings)


pretrain = train


def _prepare(settings: Settings, folder: OutFolder) -> tuple[pl.Trainer, Pretraining, Checkpoint | None]:
    """The trainer, what it trains, and what is known of the checkpoint that it goes on with; nothing is written."""
    given = settings.given
    _seed(given.seed)
    if given.float32_matmul_precision != "auto":
        torch.set_float32_matmul_precision(given.float32_matmul_precision)
    resumed = read_to_resume(folder.last, given.method) if given.resume_interrupted else None
    views = Views(settings.transforms)
    source = make_source(given.data, settings.transforms.image_channels, views.reduction, given.slides, folder.views)
    dataset = ViewDataset(source, views, given.seed, given.on_bad_image)
    if given.epochs == "auto" and settings.method.auto_steps is not None:
        batches = len(dataset) / min(given.batch_size, len(dataset))
        settings = replace(settings, epochs=math.ceil(settings.method.auto_steps / batches))
    quality = settings.callbacks.quality
    labels = None if quality is None else labels_of(source, given.data, quality.labels)
    trainer = make_trainer(settings, folder, labels)
    on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
    dataset = replace(dataset, deferred=not on_cpu)
    wrapper = wrap(given.model, given.model_args, settings.transforms.channels)
    if "weight_decay" not in (given.optim_args or {}) or given.optim_args["weight_decay"] == "auto":
        settings = replace(settings, optim=settings.method.optim_for(settings.optim, wrapper))
    if given.checkpoint is not None:
        load_checkpoint(wrapper, given.checkpoint)
    embedding = EmbeddingModel(wrapper, given.embed_dim, settings.given.streaming)
    numbers = dry_run(embedding, settings.transforms.channels, views.sizes)
    _check_first_image(dataset)

    batch_size = _batch_size(settings, trainer, len(dataset))
    # Lightning makes a step of what is left at the end of an epoch
    per_epoch = math.ceil(len(dataset) // batch_size / given.gradient_accumulation_steps)
    steps = settings.epochs * per_epoch
    max_steps = (given.trainer_args or {}).get("max_steps")
    if max_steps is not None:
        steps = min(steps, max_steps)
        trainer.callbacks.append(StopAfter(max_steps))  # type: ignore[attr-defined]
    optimized = batch_size * given.gradient_accumulation_steps
    run = Run(numbers, len(dataset), optimized, steps, settings.transforms.normalize)
    to_training_mode(wrapper)  # before the method copies it
    if given.activation_checkpoint_args is not None and given.activation_checkpoint_args.enabled:
        checkpoint_blocks(wrapper.get_model(), given.activation_checkpoint_args.every_n_blocks)
    method = settings.method(embedding, run, **settings.method_args)
    loader_args = _loader_args(settings, dataset, on_cpu)
    # torch does not choose it itself on a CPU; Lightning could not clip gradients then in mixed precision
    fused = on_cpu and not isinstance(trainer.precision_plugin, MixedPrecision)
    module = Pretraining(method, settings, dataset, batch_size, loader_args, fused)
    module.configure_optimizers()  # raises ValueError for what an optimizer does not take
    if resumed is not None:
        module.check_resumed(resumed)
    if "log_every_n_steps" not in (given.trainer_args or {}):
        trainer.log_every_n_steps = max(1, min(LOG_EVERY, module.batches_per_epoch))
    return trainer, module, resumed


def _loader_args(settings: Settings, dataset: ViewDataset, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of the data loader, of which batches and their order are not; raises ValueError for wrong ones."""
    made: dict[str, Any] = {
        "num_workers": settings.num_workers,
        "pin_memory": not on_cpu,
        "worker_init_fn": leave_signals,
        "persistent_workers": settings.num_workers > 0,
    }
    given = settings.given.loader_args or {}
    made |= {name: value for name, value in given.items() if name not in ("batch_size", "shuffle", "drop_last")}
    try:
        DataLoader(dataset, **made)  # starts no worker process
    except (TypeError, ValueError) as error:
        raise ValueError(f"loader_args, with num_workers={settings.num_workers}: {error}") from error
    return made


def _check_first_image(dataset: ViewDataset) -> None:
    """Raises ValueError if no image can be used, or the values of the first one are not what its type says."""
    try:
        name, pixels, _, _ = dataset.image(Index(0, 0))
    except (ImageReadError, TypeError) as error:
        raise ValueError(f"data: {error}") from error
    if pixels.dtype == torch.uint8 or dataset.views.args.value_range is not None:
        return
    low, high = (v.item() for v in torch.aminmax(pixels if pixels.is_floating_point() else pixels.to(torch.int64)))
    hint = 'transform_args={"value_range": (low, high)}'
    if pixels.is_floating_point():
        if not (low >= -0.5 and high <= 1.5):  # NaN neither
            raise ValueError(
                f"data: {name} has float values from {low:g} to {high:g}, and 0 to 1 is expected; say which values "
                f"are 0 and 1 with {hint}"
            )
        return
    if low < 0:
        raise ValueError(
            f"data: {name} has values from {low} to {high}, and none below 0 is expected; say which values are 0 and 1 "
            f"with {hint}"
        )
    top = torch.iinfo(pixels.dtype).max
    if high < top // DARK:
        _log.warning(
            "the largest value of %s is %d, of %d that its type has: if all are so dark, say what white is, with "
            'transform_args={"value_range": (0, %d)} or the like',
            name,
            high,
            top,
            2 ** int(high).bit_length() - 1,
        )


def _batch_size(settings: Settings, trainer: pl.Trainer, images: int) -> int:
    """Images of a batch over all devices."""
    size, processes = settings.given.batch_size, trainer.world_size
    per_device = (settings.given.loader_args or {}).get("batch_size")
    if per_device is not None:
        size = per_device * processes
    if size > images:
        _log.warning("batch_size=%d is larger than the data set; it becomes %d, the number of images", size, images)
        size = images
    if size % processes:
        raise ValueError(f"batch_size={size} must be divisible by the number of devices on all nodes, {processes}")
    return size


def _fit(trainer: pl.Trainer, module: Pretraining, folder: OutFolder, resume: bool, settings: Settings) -> None:
    try:
        trainer.fit(module, ckpt_path=folder.last if resume else None, weights_only=True if resume else None)
    except BaseException as error:
        if not trainer.is_global_zero:
            raise
        left = f"in step {trainer.global_step}; {_left(folder)}"
        if isinstance(error, SystemExit):
            interrupted = error.code == 1 and not isinstance(error, SIGTERMException)  # what Lightning makes of Ctrl-C
            _log.warning("%s %s", "interrupted" if interrupted else "told to end by SIGTERM", left)
            raise (KeyboardInterrupt if interrupted else SystemExit(TERMINATED)) from None
        if isinstance(error, OSError) and error.errno in FULL:
            where = f" to write {error.filename}" if error.filename else ""
            raise OSError(error.errno, f"{error.strerror}{where}: the run ended {left}") from error
        _log.error("%s ended the run %s", type(error).__name__, left)
        _log.debug("the error:", exc_info=True)
        if isinstance(error, ImageReadError):
            raise type(error)(_without_traceback(error)) from error
        if isinstance(error, NotFiniteError):
            advice = "other optim_args need a new run, with its weights: checkpoint=..., and another out"
            raise NotFiniteError(f"{error}; {_left(folder)}; {advice}", error.step) from error
        raise
    saving = settings.callbacks.model_checkpoint
    if trainer.max_epochs == 0:
        if saving is not None and saving.save_last:
            trainer.save_checkpoint(folder.last)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Export):
                callback.export(trainer, module)
    _log.info(
        "training completed; model.load_state_dict(torch.load(%r, weights_only=True)) loads the model",
        str(folder.exported),
    )


def _without_traceback(error: Exception) -> str:
    """The message, to which torch adds the traceback of a worker process ahead of it."""
    kind = type(error)
    return str(error).rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def _left(folder: OutFolder) -> str:
    """Return how to go on with a run that has ended too soon."""
    try:
        step = read_torch_file(folder.last)["global_step"]
    except FileNotFoundError:
        return "it has written no checkpoint yet"
    return f"resume_interrupted=True goes on at step {step}, that of {folder.last}"


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _is_rank_zero() -> bool:
    """True if this process leads, or is not (yet) one of several."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return all(int(os.environ.get(name, "0") or 0) == 0 for name in names)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of itself, and warnings that do not apply to us."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*your dataloader is not resumable.*",  # it is
            ".*dirpath has changed from.*",
            ".*isinstance.treespec, LeafSpec.. is deprecated.*",
            ".*in eval mode at the start of training.*",  # what is frozen, see to_training_mode
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class _LogFile(logging.FileHandler):
    """A log file that leaves out what cannot be written on a full disk: the console has it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Our log lines in a file as well; on the console too, where nobody has set up logging."""
    ours = logging.getLogger("widefield")
    handlers: list[logging.Handler] = [_LogFile(path, encoding="utf-8")]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if not ours.hasHandlers():
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[1].setLevel(logging.INFO)
    level = ours.level
    ours.setLevel(logging.DEBUG)
    for handler in handlers:
        ours.addHandler(handler)
    try:
        yield
    finally:
        ours.setLevel(level)
        for handler in handlers:
            ours.removeHandler(handler)
            with suppress(OSError):
                handler.close()
