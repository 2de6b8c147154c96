"""A training run: from a configuration to checkpoints, a history and a report."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import DistError

from widefield.cli.configured import ConfiguredCLI, ignore_irrelevant_warnings
from widefield.cli.first_checks import check_folder
from widefield.cli.fit_resuming import Optimization, check_resumed, optimization_of, settings_of
from widefield.cli.history import History, LastValidation, StepMemory
from widefield.cli.training_report import largest_step, write_curves, write_training_report
from widefield.components.checkpoints import read_torch_file
from widefield.components.component import Component
from widefield.components.models.base_model import BaseModel
from widefield.config import Config
from widefield.data import LazyImages
from widefield.data.statistics import PixelStatistics, pixel_statistics
from widefield.inference.masks import keep_background_if_usable
from widefield.inference.models import other_weights
from widefield.inference.names import BEST, CONFIG, LAST
from widefield.models import FromCheckpoint
from widefield.models.instances import is_patches
from widefield.modules import BaseModule, FiniteTraining, NotFiniteError, RandomState
from widefield.pretraining.loggers import forget_after, named_loggers
from widefield.pretraining.out import METRICS
from widefield.streaming import calibrate_batch_norm
from widefield.writing import replacing, write_csv

_log = logging.getLogger(__name__)
_IMAGE_CHANNELS = 3
_SETTLED = 50  # batches after which, with PyTorch's momentum of 0.1, half a per cent of the initial statistics is left


class LastEpoch(ModelCheckpoint):
    """Keeps the last epoch, which `save_last` of the callback that keeps the best one does only where that is the best.

    A class of its own has a state of its own in checkpoints, which the default callback of a Lightning trainer does not load.
    """


class FitCLI(ConfiguredCLI):
    """Makes what is trained, with the callbacks of a training run.

    Attributes:
        out: The folder of the results.
        history: The numbers of the epochs.
        memory: What a step needs.
        seen: What was predicted in the last validation.
        settings: The configuration, with all defaults.
    """

    def callbacks(self) -> list[Callback]:
        if self.config.trainer.default_root_dir is None:
            raise ValueError("nowhere to write to; name a folder for the results with --out DIR")
        self.out = Path(self.config.trainer.default_root_dir)
        self.history = History(self.out / "history.csv")
        self.memory = StepMemory()
        self.settings = settings_of(self.parser, self.config)
        optimization = Optimization(optimization_of(self.settings))
        self.seen = LastValidation()
        own = [
            FiniteTraining(),
            optimization,
            self.history,
            self.memory,
            self.seen,
            RandomState(),
            *self._checkpoints(),
        ]
        rates = [LearningRateMonitor()] if self.config.loggers else []
        return [*super().callbacks(), *own, *rates]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if not self.config.loggers:
            return super().instantiate_trainer(**kwargs)
        if self.config.trainer.logger:
            raise ValueError("trainer.logger and loggers both say where numbers are logged; give one of them")
        root = self.config.trainer.default_root_dir
        loggers = [] if root is None else named_loggers(self.config.loggers, Path(root))  # `callbacks` tells of none
        return super().instantiate_trainer(logger=loggers or False, **kwargs)

    def _checkpoints(self) -> list[ModelCheckpoint]:
        """Keep the last epoch, and that of the least validation loss (where there is none: the last one)."""
        logs_loss = isinstance(self.model, (BaseModule, BaseModel))
        measured = logs_loss and len(getattr(self.datamodule, "val_set", ())) > 0
        options: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
        if not measured:
            return [ModelCheckpoint(self.out, Path(BEST).stem, save_last=True, **options)]
        best = ModelCheckpoint(self.out, Path(BEST).stem, "val_loss", **options)
        return [best, LastEpoch(self.out, Path(LAST).stem, **options)]


def train(config: Config, others: list[str], resume: bool) -> Path:
    """Train as `config` and flags of LightningCLI say; the folder of the results.

    Everything that can be wrong with the input is checked before the folder is made. It gets `config.yaml`, `best.ckpt`
    (least validation loss), `last.ckpt`, `history.csv`, of labelled images `split.csv` (their table, with the split that was
    drawn), `report.html`, and of a streamed classifier `memory.json`.

    Raises:
        ValueError, OSError, UnsupportedOpError: What the user gave cannot be used; the message says why.
    """
    with warnings.catch_warnings():
        ignore_irrelevant_warnings()
        cli = FitCLI(config, others, "widefield fit")
        check_folder(cli.out, resume)
        return _train(cli, resume)


def _train(cli: FitCLI, resume: bool) -> Path:
    out, settings = cli.out, cli.out / CONFIG
    last = out / LAST if resume and (out / LAST).is_file() else None
    former = settings.read_bytes() if last and settings.is_file() else None
    if resume and not last:
        _log.warning("%s has no %s, for no epoch of the run was finished: it starts from the beginning", out, LAST)
    if last and former is not None:
        check_resumed(settings_of(cli.parser, cli.parser.parse_path(settings)), cli.settings, last)
    _prepare(cli, last)
    writes = cli.trainer.is_global_zero
    if writes:
        _write_settings(cli)
        if last:
            forget_after(out / METRICS, read_torch_file(last)["global_step"])
    for logger in cli.trainer.loggers if cli.config.loggers else ():
        logger.log_hyperparams(cli.settings)
    try:
        with _explained_errors(out, last):
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=last, weights_only=True)
    finally:
        if writes and former is not None and not cli.history.has_started:  # the checkpoint is that of the former one
            settings.write_bytes(former)
    if writes:
        _report(cli)
    kept = [out / name for name in (BEST, LAST) if (out / name).is_file()]  # without a validation there is no best one
    if kept:
        _log.info("checkpoint: %s", kept[0])
    else:
        _log.warning("no epoch was trained, so there is no checkpoint in %s", out)
    return out


def _prepare(cli: FitCLI, last: Path | None) -> None:
    """Fit the model to the images and plan the largest, before anything is written; `last` is the checkpoint of a resumed run."""
    model, data = cli.model, cli.datamodule
    reads_pixels = isinstance(model, FromCheckpoint) and isinstance(data, LazyImages) and model.reads_pixels
    if reads_pixels:
        section = cli.config.model
        given = section.init_args if "init_args" in section else section  # it names its class, or not
        statistics = _normalise(model, data, given)
    if isinstance(data, LazyImages):
        _settle_background(model, data)
    cli.keep_features()  # no earlier, as a mask that is tried out is not kept
    if reads_pixels:
        _check(model, data)
    if last:
        # or Lightning would round weights of 64 bits to 32 as it loads them
        cli.trainer.precision_plugin.convert_module(model)
        _log.info("continuing from %s", last)
    elif isinstance(model, Component):
        model.init_weights()
    elif reads_pixels and (given.weights is None or _unsettled(model)):
        why = "random weights" if given.weights is None else "weights of a short training"
        _calibrate(model, data, statistics, why)


@contextmanager
def _explained_errors(out: Path, last: Path | None) -> Iterator[None]:
    """Say of errors that end a training what to do; `last` is the checkpoint that a resumed one goes on with."""
    try:
        yield
    except SystemExit:  # what Lightning makes of Ctrl-C
        _log.info("`widefield fit --resume --out %s` continues from the last whole epoch", out)
        raise KeyboardInterrupt from None
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}; {_left(out)}", error.step) from error
    except RuntimeError as error:
        if last and "state_dict" in str(error):
            raise other_weights(error, last) from error
        if str(error).startswith("Early stopping conditioned on"):
            raise ValueError(f"trainer.callbacks: {error}") from error
        if "gloo" in str(error) or isinstance(error, DistError):
            raise ConnectionError(
                f"another process of this training has ended, see what it said ({str(error).splitlines()[0]:.200}); "
                f"`--resume --out {out}` with the same processes goes on from the last whole epoch"
            ) from error
        raise


def _report(cli: FitCLI) -> None:
    rows, peak = cli.history.rows, cli.memory.peak
    if isinstance(cli.model, FromCheckpoint) and isinstance(cli.datamodule, LazyImages):
        cli.model.to(cli.trainer.strategy.root_device)  # from which Lightning has taken it
        write_training_report(cli.out, cli.model, cli.datamodule, rows, peak, cli.seen.images)
    else:
        write_curves(cli.out, type(cli.model).__name__, rows, peak)
    _log.info("report: %s", cli.out / "report.html")


def _write_settings(cli: FitCLI) -> None:
    """Write the configuration, whole or not at all, as other processes may read it; and the split of labelled images."""
    cli.out.mkdir(parents=True, exist_ok=True)
    with replacing(cli.out / CONFIG) as partial:
        cli.parser.save(cli.config, partial, skip_none=False, overwrite=True, multifile=False)
    if isinstance(cli.datamodule, LazyImages):
        write_csv(cli.out / "split.csv", cli.datamodule.split_rows())


def _left(out: Path) -> str:
    """Return how to go on with a run that an error has ended."""
    if not (out / LAST).is_file():
        return "no epoch was finished, so there is no checkpoint; begin again"
    kept = read_torch_file(out / LAST)
    return (
        f"{out / LAST} is that of the end of epoch {kept['epoch'] + 1}, step {kept['global_step']}, and its weights are "
        f"finite: `widefield fit --resume --out {out}` goes on from there, optimizer.lr=..., --lr or trainer.precision=... "
        "beside it with other values"
    )


def _check(model: LightningModule, data: LazyImages) -> None:
    """Plan the largest image, so that a network or a budget that won't do fails before anything is written."""
    shape, maps, mask = largest_step(data)
    plan = model.stream_network.plan(shape, *maps, mask=mask)
    skipped = f", {1 - plan.computed_fraction:.0%} skipped" if mask is not None else ""
    crops = f"{shape[0]} crop(s)" if len(shape) == 4 else "an image"
    _log.info("%s of %d x %d pixels in %d steps of %d x %d%s", crops, *shape[-2:], plan.steps, *plan.tile_size, skipped)


def _settle_background(model: LightningModule, data: LazyImages) -> None:
    """Say how much of the images is background, which is left out; take all of them if the model takes no masks."""
    images = [image for dataset in (data.train_set, data.val_set, data.test_set) for image, _ in dataset]
    masked = [image for image in images if image.background is not None]
    if not masked:
        return
    if not keep_background_if_usable(model, masked[0]):
        data.take_all_of_images()
        return
    pixels = [image.shape[1] * image.shape[2] for image in masked]
    blank = sum(n * (1 - image.background.mask.share) for n, image in zip(pixels, masked, strict=True)) / sum(pixels)
    _log.info(
        "%d of %d images have a background, %.0f%% of their pixels, which is skipped (--foreground %s)",
        len(masked), len(images), 100 * blank, data.foreground,
    )  # fmt: skip


def _normalise(model: FromCheckpoint, data: LazyImages, given: Any) -> PixelStatistics:
    """Set what the training images say of the range, mean and standard deviation, where the configuration leaves it open."""
    found = pixel_statistics([image for image, _ in data.train_set], data.seed)
    used = model.stream_network.normalisation
    value_range = used.value_range
    if given.value_range == "percentiles" or (given.value_range is None and not found.fills_its_type()):
        if not found.high > found.low:
            raise ValueError(
                f"all training images hold the value {found.low:g} only; check them, or give model.value_range=[LOW, HIGH]"
            )
        value_range = (found.low, found.high)
        _log.info(
            "values from %g to %g of %s stand for 0 to 1 (percentiles of the training images; --value-range says otherwise)",
            *value_range, found.dtype,
        )  # fmt: skip
    mean, std = used.mean, used.std
    from_images = (given.weights is None and not is_patches(model.model_name)) or data.image_channels != _IMAGE_CHANNELS
    if given.mean is None and given.std is None and from_images:
        low, high = value_range or (0.0, 1.0 if found.dtype.kind == "f" else float(np.iinfo(found.dtype).max))
        mean = tuple((value - low) / (high - low) for value in found.mean)
        std = tuple(max(value / (high - low), 1e-3) for value in found.std)
        _log.info(
            "mean %s and standard deviation %s per channel, of the training images", _rounded(mean), _rounded(std)
        )
    if found.missing:
        data.options["fill"] = low = (value_range or (0.0, 1.0))[0]
        _log.info("pixels without data (NaN, or the value that a file names for them) count as %g", low)
    if (mean, std, value_range) != (used.mean, used.std, used.value_range):
        model.normalise_by(mean, std, value_range)
    return found


def _rounded(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _unsettled(model: FromCheckpoint) -> bool:
    """True if running statistics come from so few batches that their initial values, 0 and 1, still count in them."""
    counts = (buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked"))
    return any(0 < int(count) < _SETTLED for count in counts)  # 0 in files that do not tell it


def _calibrate(model: FromCheckpoint, data: LazyImages, found: PixelStatistics, why: str) -> None:
    images = [image for image, _ in data.train_set][: len(found.masks)]
    generator = torch.Generator().manual_seed(data.seed)
    layers = calibrate_batch_norm(model.stream_network, images, masks=found.masks, generator=generator)
    if layers:
        _log.info("%s: set the statistics of %d batch norm layers from crops of the training images", why, layers)
