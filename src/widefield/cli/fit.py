"""`widefield fit`, on the command line and in Python: how arguments become a Lightning configuration."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from widefield.cli import fit_run
from widefield.cli.configuration import SHORTCUTS, read_configuration
from widefield.cli.verb import foreground_argument
from widefield.config import ConfigError
from widefield.inference.names import BEST, CONFIG, LAST


def fit(
    out: str | Path,
    images: str | Path | None = None,
    labels: str | Path | None = None,
    model: str | None = None,
    *,
    features: str | Path | None = None,
    masks: str | Path | None = None,
    targets: str | Path | None = None,
    config: str | Path | Sequence[str | Path] = (),
    imports: Sequence[str] = (),
    resume: bool = False,
    split_images: bool | int = False,
    **entries: Any,
) -> Path:
    """Train a network on whole images with a label, a label map or a map of numbers each, as `widefield fit` does.

    Args:
        out: Folder of the checkpoints, the configuration and the report.
        images: Folder of image files.
        labels: CSV or Parquet file with a row per image, see `widefield.data.read_labels`.
        model: resnet18, ..., a narrow one such as resnet18_w16, timm/NAME, or patches:timm/NAME.
        features: Folder of files of features, in place of `images` and `model`.
        masks: With `task="segment"`, the folder of a label map for each image, see `widefield.data.SegmentedImages`.
        targets: With `task="regression"`, the folder of a map of numbers for each image, see `widefield.data.PairedImages`.
        config: Configuration to start from, YAML or Python, or several, each over the last.
        imports: Python files (or modules) with components of yours.
        resume: Continue the run in `out`.
        split_images: How many processes share each image; True: all of them. They are started with torchrun, or by
            `**{"trainer.devices": 4}`. False: each trains on images of its own.
        entries: The other flags of the command by their names (`epochs=3`, `memory_budget="2GiB"`), and entries of the
            configuration by their paths (`**{"trainer.precision": "bf16-mixed"}`).

    Returns:
        The folder of the results.

    Raises:
        ValueError, OSError, UnsupportedOpError: What was given cannot be used; the message says why.
    """
    flags = {name: entries.pop(name) for name in (*SHORTCUTS, "seed") if name in entries}
    flags |= {name: list(value) for name, value in flags.items() if isinstance(value, tuple)}
    if "foreground" in flags:
        flags["foreground"] = foreground_argument(flags["foreground"])
    given = {"images": images, "labels": labels, "features": features, "masks": masks, "targets": targets}
    places = {name: None if place is None else Path(place) for name, place in given.items()}
    files = [Path(file) for file in ([config] if isinstance(config, (str, Path)) else config)]
    arguments = argparse.Namespace(
        out=Path(out),
        model=model,
        config=files,
        imports=list(imports),
        resume=resume,
        split_images=split_images,
        **places,
        **flags,
    )
    return _train(arguments, [f"{path}={json.dumps(value, default=str)}" for path, value in entries.items()])


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Train as the arguments say; `others` are entries of the configuration."""
    _train(arguments, others)


def _train(arguments: argparse.Namespace, others: list[str]) -> Path:
    try:
        others = [*_maps(arguments), *_processes(arguments.split_images), *others]
        config, left = read_configuration(arguments, _files(arguments), others, starts=not arguments.resume)
        return fit_run.train(config, left, resume=arguments.resume)
    except (ArgumentError, ConfigError) as error:
        message = str(error)
        for name, entry in SHORTCUTS.items():
            message = message.replace(entry, f"--{name.replace('_', '-')}")
        raise ValueError(message) from error


_OF_LABEL_MAPS = ("masks", "classes", "class_weights")
_OF_MAPS = ("crop", "augment")


def _maps(arguments: argparse.Namespace) -> list[str]:
    """Return entries of the configuration for a network and data of maps, if that is the task.

    Raises:
        ValueError: Flags of this task are given for another.
    """
    task, targets = getattr(arguments, "task", None), getattr(arguments, "targets", None)
    segments, regresses = task == "segment", task == "regression" and targets is not None
    others = () if segments else _OF_LABEL_MAPS if regresses else (*_OF_LABEL_MAPS, *_OF_MAPS)
    named = [name for name in others if getattr(arguments, name, None) is not None]
    if named and not (arguments.config or arguments.resume):
        raise ValueError(f"--{named[0].replace('_', '-')} is for label maps; add --task segment, or leave it out")
    if targets is not None and not regresses and not (arguments.config or arguments.resume):
        raise ValueError("--targets is for maps of numbers; add --task regression, or leave it out")
    if not segments and not regresses:
        return []
    arguments.task = None
    model, data = ("Segmenter", "SegmentedImages") if segments else ("MapRegressor", "PairedImages")
    return [f"model.type=widefield.models.{model}", f"data.type={data}"]


def _processes(split_images: bool | int | None) -> list[str]:
    """Return entries of the configuration for the processes that torchrun has started, and for how many share an image."""
    entries = []
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        entries = [f"trainer.devices={local}", f"trainer.num_nodes={world // local}"]
    if split_images:
        processes = None if split_images is True else split_images
        entries.append(
            f"trainer.strategy={json.dumps({'type': 'widefield.modules.SplitImages', 'processes': processes})}"
        )
    return entries


def _files(arguments: argparse.Namespace) -> list[Path]:
    files = list(arguments.config)
    if arguments.resume:
        if arguments.out is None:
            raise ValueError("--resume continues the run in a folder; name it with --out DIR")
        saved = arguments.out / CONFIG
        if not saved.is_file():
            raise FileNotFoundError(
                f"there is no run to resume in {arguments.out}: {saved} does not exist; name the folder of the run with --out, or "
                "leave --resume out to begin one"
            )
        best, last = (arguments.out / name for name in (BEST, LAST))
        if best.is_file() and not last.is_file():
            raise FileNotFoundError(
                f"{last}, from which a run goes on, does not exist, but {best} does; put it back, or remove {best} to train from "
                "the beginning"
            )
        files.insert(0, saved)
    return files
