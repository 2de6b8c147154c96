"""From a command line to one configuration: files, flags that are shortcuts for entries, and `path=value`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import LightningModule

from widefield.cli.fit_sections import SECTIONS
from widefield.cli.trial import try_out
from widefield.config import Config, ConfigError, check_config, load, override
from widefield.config.merge import IMPORTS
from widefield.inference.names import CONFIG, LAST
from widefield.models.instances import FEATURES
from widefield.registry import absolute_place, arguments_of, import_module_or_file, suggestion

SHORTCUTS = {
    "images": "data.images",
    "labels": "data.labels",
    "masks": "data.masks",
    "targets": "data.targets",
    "classes": "data.classes",
    "crop": "data.crop",
    "augment": "data.augment",
    "columns": "data.columns",
    "task": "data.task",
    "separator": "data.separator",
    "level": "data.level",
    "spacing": "data.spacing",
    "channels": "data.channels",
    "foreground": "data.foreground",
    "value_range": "model.value_range",
    "batch_size": "data.batch_size",
    "model": "model.model_name",
    "pooling": "model.pooling",
    "lora": "model.lora",
    "patch_size": "model.patch_size",
    "cache_features": "model.cache_features",
    "class_weights": "model.class_weights",
    "weights": "model.weights",
    "tile_size": "model.tile_size",
    "memory_budget": "model.memory_budget",
    "lr": "model.lr",
    "epochs": "trainer.max_epochs",
    "out": "trainer.default_root_dir",
}
_TEXTS = ("model", "pooling", "weights", "separator", "foreground")
"""Shortcuts whose value is a text even where it looks like a number."""
_LISTS = ("channels", "classes", "value_range", "class_weights")
"""Shortcuts whose value is a list, with or without its brackets: `0,2`; of `_WORDS` a word is a word."""
_WORDS = ("value_range", "class_weights")


def read_configuration(
    arguments: argparse.Namespace, files: Sequence[Path], others: Sequence[str], starts: bool = True
) -> tuple[Config, list[str]]:
    """The configuration, and what is left of the command line.

    Files come first, each over the last; whatever is given beside them wins.

    Args:
        arguments: The flags: `imports`, and those of `SHORTCUTS` and `seed` that the verb has.
        files: YAML or Python files.
        others: `path=value`, `--path=value` or `--path value`.
        starts: See `try_out`.

    Raises:
        FileNotFoundError: A file is not there.
        ConfigError: The configuration cannot be used.
    """
    config = load(*files)
    imports = [*(config.data.get(IMPORTS) or []), *(absolute_place(place, Path.cwd()) for place in arguments.imports)]
    if imports:
        config.data[IMPORTS] = list(dict.fromkeys(imports))
    for place in imports:
        import_module_or_file(place)
    overrides, left = _split(others)
    config = override(config, [*_from_flags(arguments, config), *overrides], SECTIONS)
    check_config(config, SECTIONS)
    _refuse_untrainable(config)
    try_out(config, starts)
    return config, left


def read_run(arguments: argparse.Namespace, others: list[str]) -> tuple[Config, Path]:
    """The configuration and the checkpoint of a trained model: of the folder of its run, or as they are named.

    Raises:
        ValueError: Neither is named, or entries of the configuration are wrong.
        FileNotFoundError: A file is not there.
    """
    if arguments.run is None and not (arguments.config and arguments.checkpoint):
        raise ValueError(
            "which model? name the folder of a run with --run DIR, or give --config FILE and --checkpoint CKPT"
        )
    files = list(arguments.config) or [arguments.run / CONFIG]
    checkpoint: Path = arguments.checkpoint or arguments.run / LAST
    if not arguments.config and not files[0].is_file():
        raise FileNotFoundError(
            f"there is no run in {arguments.run}: {files[0]} does not exist; name a folder that `widefield fit` wrote with --run"
        )
    if not checkpoint.is_file():
        raise FileNotFoundError(f"the checkpoint {checkpoint} does not exist; name one with --checkpoint CKPT")
    try:
        # The processes in which it was trained are not those of this command: one counts each image once.
        others = ["trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto", *others]
        config, left = read_configuration(argparse.Namespace(imports=arguments.imports), files, others, starts=False)
    except (ArgumentError, ConfigError) as error:
        raise ValueError(str(error)) from error
    if left:
        raise ValueError(f"unknown arguments: {' '.join(left)}")
    return config, checkpoint


def _refuse_untrainable(config: Config) -> None:
    model = SECTIONS["model"].resolve(config.data.get("model") or {})
    if not (isinstance(model, type) and issubclass(model, LightningModule)):
        advice = "inherit from widefield.components.models.base_model.BaseModel, and write loss()"
        problem = f"{model.__name__} is no LightningModule, so it cannot be trained; {advice}"
        raise config.error((("model",), problem))


def _from_flags(arguments: argparse.Namespace, config: Config) -> list[str]:
    overrides = []
    features = getattr(arguments, "features", None)
    if features is not None:
        overrides += [f"data.images={json.dumps(str(features.absolute()))}", f"model.model_name={FEATURES}"]
    for name, entry in SHORTCUTS.items():
        value = getattr(arguments, name, None)
        if isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, Path) or (value is not None and name in _TEXTS):
            value = json.dumps(str(value.absolute() if isinstance(value, Path) else value))
        elif name in _LISTS and isinstance(value, str) and not value.startswith("[") and value != "null":
            value = f"[{value}]" if name not in _WORDS or "," in value else value
        if value is not None:
            overrides.append(f"{entry}={value}")
    if getattr(arguments, "seed", None) is not None:
        overrides.append(f"seed_everything={arguments.seed}")
        if _takes_seed(config.data.get("data") or {}):
            overrides.append(f"data.seed={arguments.seed}")
    return overrides


def _takes_seed(data: dict[str, Any]) -> bool:
    """Return True if the data module has a seed; an unknown module has none, and the check of the configuration refuses it."""
    try:
        return "seed" in arguments_of(SECTIONS["data"].resolve(data)).named
    except (ValueError, ImportError):
        return False


def _split(others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides, and flags such as `--print_config` that are none."""
    overrides: list[str] = []
    left: list[str] = []
    rest = list(others)
    while rest:
        text = rest.pop(0)
        name, equals, _ = text.removeprefix("--").partition("=")
        if not text.startswith("--") and not equals and left:
            flags = [f"--{flag.replace('_', '-')}" for flag in SHORTCUTS]
            raise ValueError(f"there is no flag {left[-1]}; {suggestion(left[-1], flags)}")
        if not text.startswith("--") and not equals:
            raise ValueError(f"got {text!r}, expected a value for a path, as in model.lr=0.01")
        if text.startswith("--") and name.split(".")[0] not in SECTIONS:
            left.append(text)
        elif equals:
            overrides.append(text)
        elif rest and not rest[0].startswith("--"):
            overrides.append(f"{text}={rest.pop(0)}")
        else:
            raise ValueError(f"{text} has no value; give one, as in {text}=VALUE")
    return overrides, left
