"""Make the model, data and trainer that a configuration describes."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torchmetrics import Metric

from widefield.cli.lightning_form import lightning_form
from widefield.cli.progress import StreamingProgress
from widefield.components.metrics import METRICS
from widefield.config import Config, write_yaml
from widefield.data import LabelledImages
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.evaluation import Evaluation
from widefield.models import Classifier
from widefield.modules import AtomicCheckpointIO
from widefield.modules.optimization import ParameterOptions, configure_optimizers

_MESSAGE = 300
"""Characters of an error that lists all weights."""


class ConfiguredCLI(LightningCLI):
    """LightningCLI for what the configuration describes, by default a `Classifier` on `LabelledImages`.

    Of these the classes come from the data.

    Attributes:
        evaluation: What computes the metrics of the configuration.

    Args:
        config: A checked configuration.
        others: Flags of LightningCLI such as `--print_config`.
        program: The command, for messages.
        views: Test-time augmentation of the metrics.
        metrics: Beside those of the configuration.
    """

    def __init__(
        self,
        config: Config,
        others: list[str],
        program: str,
        views: AveragedViews | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        self._views, self._metrics = views, metrics
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
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "prog": program},
            args=[f"--config={write_yaml(lightning_form(config))}", *others],
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--imports", type=list[str], default=[], help="Python files with components")
        parser.add_argument(
            "--metrics", type=list[dict[str, Any]] | None, default=None, help="computed in validation and test"
        )
        for name, kind in (
            ("optimizer", dict[str, Any]),
            ("paramwise_cfg", dict[str, Any]),
            ("lr_scheduler", dict[str, Any] | list[dict[str, Any]]),
        ):
            parser.add_argument(f"--{name}", type=kind | None, default=None, help="see `widefield fit --help`")
        if self._links_classes:
            parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def after_instantiate_classes(self) -> None:
        _refuse_other_classes(self.model, self.datamodule)
        described = self.config.optimizer
        if described is None:
            return
        options = ParameterOptions.described(self.config.paramwise_cfg) if self.config.paramwise_cfg else None
        self.model.configure_optimizers = partial(
            configure_optimizers, self.model, described, self.config.lr_scheduler, options
        )

    def instantiate_classes(self) -> None:
        """As LightningCLI does; what a constructor says is not buried in a list of types and values."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if error.__cause__ is not None and str(error).startswith("Does not validate against any of the Union"):
                raise error.__cause__ from error
            raise

    def callbacks(self) -> list[Callback]:
        """Callbacks that come behind those of the configuration."""
        bars = [] if self.config.trainer.enable_progress_bar is False else [StreamingProgress()]
        described = [METRICS.build(metric) for metric in self.config.metrics or ()]
        self.evaluation = Evaluation([*described, *self._metrics], self._views)
        return [*bars, *([self.evaluation] if self.evaluation.metrics else [])]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = self.callbacks()
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **kwargs)


def other_weights(error: RuntimeError, checkpoint: Path) -> ValueError:
    """The error to raise for one of `load_state_dict`: the first difference between the model and the checkpoint."""
    lines = [line.strip() for line in str(error).splitlines()]
    return ValueError(f"{checkpoint} is no checkpoint of this model: {shorten(' '.join(lines[:2]), _MESSAGE)}")


def _refuse_other_classes(model: LightningModule, data: LightningDataModule) -> None:
    scores, names = getattr(getattr(model, "head", None), "num_classes", None), getattr(data, "class_names", None)
    classes = max(len(names or ()), getattr(data, "label_count", 0))
    if scores is not None and scores < classes:
        has = f"{classes} classes" if names else f"labels up to {classes - 1}, that is {classes} classes"
        raise ValueError(
            f"the data has {has}, and model.head.num_classes={scores}; give model.head.num_classes={classes}"
        )


def ignore_irrelevant_warnings() -> None:
    """Ignore deprecations among other libraries, and advice of Lightning that is wrong for lazily read images."""
    warnings.simplefilter("ignore", DeprecationWarning)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*No (positive|negative) samples in targets.*",
        ".*available but not used.*",
        ".*Total length of .* across ranks is zero.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
