"""Loggers of a run."""

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import TensorBoardLogger as WithoutFiles
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from widefield.pretraining.out import METRICS
from widefield.pretraining.settings import Count, Errors, updated
from widefield.writing import replacing


@dataclass(frozen=True)
class JsonlArgs:
    """metrics.jsonl. Every line is in the file at once, which `flush_logs_every_n_steps` asks for every so many."""

    flush_logs_every_n_steps: Count = 1


@dataclass(frozen=True)
class LoggerArgs:
    """The loggers of a run; None turns one off. TensorBoard is on where it is installed.

    The dictionaries are arguments of Lightning's logger of that name. Of `csv` each part of a run, begun or resumed, has a folder.
    """

    jsonl: JsonlArgs | None = field(default_factory=JsonlArgs)
    tensorboard: dict[str, Any] | None = field(default_factory=lambda: {} if has_tensorboard() else None)
    csv: dict[str, Any] | None = None
    mlflow: dict[str, Any] | None = None
    wandb: dict[str, Any] | None = None


def has_tensorboard() -> bool:
    """Return True if a TensorBoard logger can be made."""
    return any(importlib.util.find_spec(name) is not None for name in ("tensorboard", "tensorboardX"))


def named_loggers(given: Mapping[str, Any], out: Path) -> list[Logger]:
    """Return the loggers of `widefield fit`: those that are named, and no others.

    Args:
        given: Fields of `LoggerArgs` by name.
        out: The folder of the run.

    Raises:
        ValueError: There is no such logger, or see `make_loggers`.
    """
    errors = Errors()
    args = updated(LoggerArgs(jsonl=None, tensorboard=None), given, "loggers", errors)
    errors.raise_if_any("fit")
    return make_loggers(args, out, out / METRICS)


def make_loggers(args: LoggerArgs, out: Path, metrics: Path) -> list[Logger]:
    """The loggers; nothing is written before the first number.

    Raises:
        ValueError: A package is not installed, or does not take an argument.
    """
    loggers: list[Logger] = [] if args.jsonl is None else [JsonlLogger(metrics)]
    from lightning.pytorch import loggers as lightning

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "tensorboard": (TensorBoard, {"save_dir": out, "name": "", "version": ""}),
        "csv": (lightning.CSVLogger, {"save_dir": out, "name": "csv"}),
        "mlflow": (lightning.MLFlowLogger, {"save_dir": str(out)}),
        "wandb": (lightning.WandbLogger, {"save_dir": out}),
    }
    for name, (kind, defaults) in kinds.items():
        given = getattr(args, name)
        if given is None:
            continue
        try:
            loggers.append(kind(**{**defaults, **given}))
        except ModuleNotFoundError as error:
            raise ValueError(
                f"loggers.{name} needs the package {name}, which is not installed; pip install {name}"
            ) from error
        except TypeError as error:
            raise ValueError(f"loggers.{name}: {error}") from error
    return loggers


class TensorBoard(TensorBoardLogger):
    """Lightning's, without a file of hyperparameters beside it: config.yaml has them."""

    def save(self) -> None:
        WithoutFiles.save(self)


class JsonlLogger(Logger):
    """Writes a JSON object per line: the step, the epoch and the numbers, NaN and infinities as text.

    Args:
        path: The file, which is made at the first line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of `step` and later: a run that is resumed there writes them again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < step]
    with replacing(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line that was being written when the process was killed
        return math.inf
