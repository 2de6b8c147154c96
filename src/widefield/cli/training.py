"""A training run: from a configuration to checkpoints, a history and a report."""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from widefield.cli.history import History
from widefield.cli.lightning_form import lightning_form
from widefield.cli.progress import StreamingProgress
from widefield.cli.training_report import write_training_report
from widefield.components.base_module import BaseModule as Component
from widefield.components.models.base_model import BaseModel
from widefield.config import Config, write_yaml
from widefield.data import LabelledImages
from widefield.models import Classifier
from widefield.modules import AtomicCheckpointIO, RandomState
from widefield.modules import BaseModule as StreamedModule
from widefield.reports import PeakMemory
from widefield.streaming import calibrate_batch_norm

_log = logging.getLogger(__name__)
CONFIG, LAST, BEST = "config.yaml", "last.ckpt", "best.ckpt"
_IMAGE_CHANNELS = 3


class FitCLI(LightningCLI):
    """LightningCLI for what the configuration describes, by default a `Classifier` on `LabelledImages`.

    Of these the classes come from the data.

    Args:
        config: A checked configuration.
        others: Flags of LightningCLI such as `--print_config`.
    """

    def __init__(self, config: Config, others: list[str]) -> None:
        types = {key: (config.data.get(key) or {}).get("type") for key in ("model", "data")}
        self._links_classes = types == {"model": None, "data": None}
        super().__init__(
            LightningModule if types["model"] else Classifier,
            LightningDataModule if types["data"] else LabelledImages,
            subclass_mode_model=types["model"] is not None,
            subclass_mode_data=types["data"] is not None,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 20,
                "devices": 1,
                "logger": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            },
            auto_configure_optimizers="optimizer" in config.data,
            parser_kwargs={"exit_on_error": False, "prog": "widefield fit"},
            args=[f"--config={write_yaml(lightning_form(config))}", *others],
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--imports", type=list[str], default=[], help="Python files with components")
        if self._links_classes:
            parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the callbacks of every run; those of the configuration come before them."""
        if self.config.trainer.default_root_dir is None:
            raise ValueError("nowhere to write to; name a folder for the results with --out DIR")
        self.out = Path(self.config.trainer.default_root_dir)
        self.history = History(self.out / "history.csv")
        bars = [] if self.config.trainer.enable_progress_bar is False else [StreamingProgress()]
        self.trainer_defaults["callbacks"] = [*bars, self.history, RandomState(), self._keep_best()]
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **kwargs)

    def _keep_best(self) -> ModelCheckpoint:
        """Keep the last epoch, and that of the least validation loss (where there is none: the last one)."""
        logs_loss = isinstance(self.model, (StreamedModule, BaseModel))
        return ModelCheckpoint(
            dirpath=self.out,
            filename=Path(BEST).stem,
            monitor="val_loss" if logs_loss and len(getattr(self.datamodule, "val_set", ())) else None,
            save_last=True,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )


def train(config: Config, others: list[str], resume: bool) -> Path:
    """Train as `config` and flags of LightningCLI say; the folder of the results.

    Everything that can be wrong with the input is checked before the folder is made. It gets `config.yaml`, `best.ckpt`
    (least validation loss), `last.ckpt`, `history.csv`, and of a streamed classifier `memory.json` and `report.html`.

    Raises:
        ValueError, OSError, UnsupportedOpError: What the user gave cannot be used; the message says why.
    """
    with warnings.catch_warnings():
        _ignore_irrelevant_warnings()
        cli = FitCLI(config, others)
        _check_folder(cli.out, resume)
        return _train(cli, resume)


def _train(cli: FitCLI, resume: bool) -> Path:
    out = cli.out
    model, data = cli.model, cli.datamodule
    last = out / LAST if resume and (out / LAST).is_file() else None
    classifies = isinstance(model, Classifier) and isinstance(data, LabelledImages)
    if classifies:
        _check(model, data)
    if last:
        _log.info("continuing from %s", last)
    elif isinstance(model, Component):
        model.init_weights()
    elif classifies and cli.config.model.weights is None:
        _calibrate(model, data, cli.config.data.seed)
    out.mkdir(parents=True, exist_ok=True)
    cli.parser.save(cli.config, out / CONFIG, skip_none=False, overwrite=True, multifile=False)
    memory = PeakMemory(cli.trainer.strategy.root_device)
    try:
        cli.trainer.fit(model, data, ckpt_path=last, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        _log.info("`widefield fit --resume --out %s` continues from the last whole epoch", out)
        raise KeyboardInterrupt from None
    if classifies:
        write_training_report(out, model, data, cli.history.rows, memory.bytes_above_start())
        _log.info("report: %s", out / "report.html")
    _log.info("checkpoint: %s", out / BEST)
    return out


def _check_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder with --out DIR")
    if not resume and (out / LAST).exists():
        raise FileExistsError(
            f"{out} already holds a run; continue it with --resume, or name another folder with --out DIR"
        )


def _check(model: LightningModule, data: LabelledImages) -> None:
    """Plan the largest image, so that a network or a budget that won't do fails before anything is written."""
    if data.channels != _IMAGE_CHANNELS:
        raise ValueError(f"the images have {data.channels} channel(s) and the model takes 3 (RGB); convert the images")
    images = [image for image, _ in data.train_set]
    largest = max(images, key=lambda image: image.shape[1] * image.shape[2])
    plan = model.stream_network.plan(largest.shape)
    _log.info("an image of %d x %d pixels in %d steps of %d x %d", *largest.shape[1:], plan.steps, *plan.tile_size)


def _calibrate(model: Classifier, data: LabelledImages, seed: int) -> None:
    images = [image for image, _ in data.train_set]
    generator = torch.Generator().manual_seed(seed)
    layers = calibrate_batch_norm(model.stream_network, images, generator=generator)
    if layers:
        _log.info(
            "random weights: set the statistics of %d batch norm layers from crops of the training images", layers
        )


def _ignore_irrelevant_warnings() -> None:
    """What libraries deprecate in each other, and Lightning's advice that is wrong for lazily read images."""
    warnings.simplefilter("ignore", DeprecationWarning)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*configure_optimizers` will be overridden by.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*No (positive|negative) samples in targets.*",
        ".*available but not used.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
