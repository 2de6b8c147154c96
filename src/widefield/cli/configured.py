"""Make the model, data and trainer that a configuration describes, by LightningCLI."""

import collections.abc
import typing
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torchmetrics import Metric

from widefield.cli.fit_sections import SECTIONS
from widefield.cli.progress import StreamingProgress
from widefield.components.heads.classification_heads import MultiLabelClsHead, ScoreHead
from widefield.components.metrics import METRICS
from widefield.config import Config, Foreign, Section, write_yaml
from widefield.config.check import MAPPINGS, mark_of
from widefield.data import LabelledImages, PairedImages, SegmentedImages
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.evaluation import Evaluation
from widefield.models import Classifier, MapRegressor, Segmenter
from widefield.models.feature_cache import FeatureCache
from widefield.modules import AtomicCheckpointIO, DenseModule
from widefield.modules.dense_components import DenseClassifier
from widefield.modules.optimization import ParameterOptions, configure_optimizers
from widefield.registry import MODELS, ComponentOf, Registry, arguments_of, import_object

_OF_CLASSES = {"class_names": "class_names", "ignore_index": "ignore_index"}
_OF_TARGETS = {"class_names": "class_names", "target": "target", "image_channels": "in_channels"}
"""Attributes of data modules that are arguments of models: of `LabelledImages`, and of maps."""
_FROM_MAPS: dict[Any, dict[str, str]] = {
    (Segmenter, SegmentedImages): {**_OF_CLASSES, "image_channels": "in_channels"},
    (DenseClassifier, SegmentedImages): _OF_CLASSES,
    (MapRegressor, PairedImages): _OF_TARGETS,
}
_TASKS_OF_MAPS = {
    "segment": ("segmentation", "label maps", "DenseClassifier"),
    "map": ("regression", "maps of numbers", "DenseRegressor"),
}
"""By the task of a data module: that of a `DenseModule`, words for the maps, and a model."""


class ConfiguredCLI(LightningCLI):
    """LightningCLI for what the configuration describes, by default a `Classifier` on `LabelledImages`.

    Of these the classes and the target come from the data, and so they do for a `Segmenter` or `DenseClassifier` on
    `SegmentedImages`, and a `MapRegressor` on `PairedImages`.

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
        kinds = [SECTIONS[key].resolve(config.data.get(key) or {}) for key in types]
        self._is_default = types == {"model": None, "data": None}
        self._links = _OF_TARGETS if self._is_default else _FROM_MAPS.get((kinds[0], kinds[1]), {})
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
            ("loggers", dict[str, Any]),
            ("optimizer", dict[str, Any]),
            ("paramwise_cfg", dict[str, Any]),
            ("lr_scheduler", dict[str, Any] | list[dict[str, Any]]),
        ):
            parser.add_argument(f"--{name}", type=kind | None, default=None, help="see `widefield fit --help`")
        place = "model" if self._is_default else "model.init_args"
        for source, name in self._links.items():
            parser.link_arguments(f"data.{source}", f"{place}.{name}", apply_on="instantiate")

    def after_instantiate_classes(self) -> None:
        _refuse_other_classes(self.model, self.datamodule)
        _refuse_other_tasks(self.model, self.datamodule, bool(self.evaluation.metrics))
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

    def keep_features(self) -> None:
        """Let a model that keeps the maps of its trunk keep them in the folder of the results."""
        root = self.config.trainer.default_root_dir
        if getattr(self.model, "cache_features", False) and root is not None:
            self.model.feature_cache = FeatureCache(Path(root) / "features")

    def callbacks(self) -> list[Callback]:
        """Callbacks that come behind those of the configuration."""
        bars = [] if self.config.trainer.enable_progress_bar is False else [StreamingProgress()]
        described = [METRICS.build(metric) for metric in self.config.metrics or ()]
        self.evaluation = Evaluation([*described, *self._metrics], self._views)
        return [*bars, *([self.evaluation] if self.evaluation.metrics else [])]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.trainer_defaults["callbacks"] = self.callbacks()
        return super().instantiate_trainer(plugins=[AtomicCheckpointIO()], **kwargs)


def _refuse_other_classes(model: LightningModule, data: LightningDataModule) -> None:
    scores, names = getattr(getattr(model, "head", None), "num_classes", None), getattr(data, "class_names", None)
    classes = max(len(names or ()), getattr(data, "label_count", 0))
    if scores is not None and scores < classes:
        has = f"{classes} classes" if names else f"labels up to {classes - 1}, that is {classes} classes"
        raise ValueError(
            f"the data has {has}, and model.head.num_classes={scores}; give model.head.num_classes={classes}"
        )


def _refuse_other_tasks(model: LightningModule, data: LightningDataModule, has_metrics: bool) -> None:
    """Refuse a task that the head or the metrics of the configuration are not for; they would compare other things in silence."""
    task, head = getattr(data, "target", {}).get("task", "classification"), getattr(model, "head", None)
    if task == "classification":
        return
    if task in _TASKS_OF_MAPS and isinstance(model, (DenseModule, Classifier)):
        own, maps, models = _TASKS_OF_MAPS[task]
        if getattr(model, "task", None) != own:
            raise ValueError(
                f"the data gives {maps}, which a {type(model).__name__} does not learn here; give model.type={models}, or a "
                f"DenseModule with task={own}"
            )
    if isinstance(head, ScoreHead) and not (task == "multilabel" and isinstance(head, MultiLabelClsHead)):
        others = ", or model.head.type=MultiLabelLinearClsHead" if task == "multilabel" else ""
        raise ValueError(
            f"data.task={task} does not go with a {type(head).__name__}; name a network with model.model_name, which gets "
            f"outputs and the loss of the task{others}"
        )
    if has_metrics:
        raise ValueError(
            f"the metrics of the configuration compare classes, and data.task={task}; leave them out, the task has its own"
        )


def ignore_irrelevant_warnings() -> None:
    """Ignore deprecations among other libraries, and advice of Lightning that is wrong for lazily read images."""
    warnings.simplefilter("ignore", DeprecationWarning)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LightningCLI's args parameter is intended.*",
        ".*You have overridden `transfer_batch_to_device`.*",
        ".*No (positive|negative) samples (in|found in) target.*",
        ".*for one or more classes was `nan`.*",
        ".*available but not used.*",
        ".*Total length of .* across ranks is zero.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def lightning_form(config: Config) -> dict[str, Any]:
    """The data of a checked `config` with `{class_path: X, init_args: {...}}` where Lightning makes an instance.

    Where a constructor takes a dictionary, the description stays as it is: components make their own parts.
    """
    return {
        key: _sections(value, SECTIONS[key]) if isinstance(SECTIONS[key], Section) else value
        for key, value in config.data.items()
        if value is not None and not isinstance(SECTIONS[key], Foreign)
    }


def _sections(value: Any, section: Section) -> Any:
    return [_section(one, section) for one in value] if isinstance(value, list) else _section(value, section)


def _section(value: dict[str, Any], section: Section) -> dict[str, Any]:
    function = section.resolve(value)
    if "type" not in value:
        return _arguments(value, function)
    return _instance(value, function, MODELS if section.component is None else section.component.registry)


def _instance(value: Mapping[str, Any], function: Any, registry: Registry = MODELS) -> dict[str, Any]:
    arguments = {name: item for name, item in value.items() if name != "type"}
    return {"class_path": _import_path(value["type"], registry), "init_args": _arguments(arguments, function)}


def _arguments(arguments: Mapping[str, Any], function: Any) -> dict[str, Any]:
    known = {} if function is None else arguments_of(function).named
    return {name: _value(item, known[name].annotation if name in known else Any) for name, item in arguments.items()}


def _value(value: Any, annotation: Any) -> Any:
    if _takes_dictionaries(annotation):
        return value
    if isinstance(value, list):
        return [_value(item, annotation) for item in value]
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        path = _import_path(value["type"])
        return _instance(value, import_object(path) if "." in path else None)
    return value


def _takes_dictionaries(annotation: Any) -> bool:
    origin = typing.get_origin(annotation)
    if (
        typing.is_typeddict(annotation)
        or annotation is Any
        or mark_of(annotation, ComponentOf) is not None
        or annotation in MAPPINGS
        or origin in MAPPINGS
    ):
        return True
    inside = () if origin in (None, collections.abc.Callable) else typing.get_args(annotation)
    return any(_takes_dictionaries(one) for one in inside)


def _import_path(name: str, registry: Registry = MODELS) -> str:
    if name not in registry:
        return name
    component = registry.get(name)
    return f"{component.__module__}.{component.__qualname__}"
