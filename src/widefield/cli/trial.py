"""Make all that a configuration describes once before any data is read: constructors refuse more than their types say."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from widefield.cli.first_checks import is_missing_file
from widefield.components.component import Component
from widefield.components.metrics import METRICS
from widefield.config import Config, build, find_class
from widefield.config.check import Problem, mark_of, written
from widefield.config.config import Path
from widefield.data.pipeline import Pipeline
from widefield.modules.optimization import ParameterOptions, make_optimizer, make_schedule
from widefield.registry import DATASETS, MODELS, TRANSFORMS, ComponentOf, arguments_of, split_description

_WITH_EFFECTS = ("logger", "profiler", "plugins", "deterministic", "benchmark", "callbacks")
"""Arguments of the trainer that write to disk or change settings of torch when it is made."""
_WITHOUT_EFFECTS = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
_ONE_WEIGHT = nn.Linear(1, 1, bias=False)


def try_out(config: Config, starts: bool = True) -> None:
    """Make all of a checked `config` but its data, to see whether it can be made.

    Args:
        config: A checked configuration.
        starts: Training begins with it, so the checkpoints that it names have to be there and to fit.

    Raises:
        ConfigError: Something cannot be made; a line for each part.
    """
    model = None
    if _of(config, "model").get("type") in MODELS:
        model = build(config, ("model",))
    for k in range(len(config.data.get("metrics") or [])):
        build(config, ("metrics", str(k)), METRICS)
    problems = [*_transforms(config), *_trainer(config), *_optimization(config, model)]
    if starts:
        problems += _missing_weights(config) if model is None else _checkpoints(config, model)
    if problems:
        raise config.error(*problems)


def _missing_weights(config: Config) -> list[Problem]:
    """Return a problem if the weights of a network are those of a file that is not there; published ones have names."""
    weights = _of(config, "model").get("weights")
    return [(("model", "weights"), f"{weights} does not exist")] if is_missing_file(weights) else []


def _checkpoints(config: Config, model: nn.Module) -> Iterator[Problem]:
    """Yield problems of the checkpoints of the model and its parts, each where the configuration has it."""
    seen = []
    for name, part in model.named_modules():
        for checkpoint in part.checkpoints if isinstance(part, Component) else ():
            if (checkpoint, type(part)) in seen:  # of a copy
                continue
            seen.append((checkpoint, type(part)))
            try:
                with _quiet():
                    checkpoint.check(part)
            except (OSError, ValueError) as error:
                last = "init_cfg" if name or "pretrained" not in config.data["model"] else "pretrained"
                yield _written(config, ("model", *name.split("."), last) if name else ("model", last)), str(error)


def _written(config: Config, path: Path) -> Path:
    """Return the longest begin of `path` that stands in the configuration."""
    value: Any = config.data
    for end, key in enumerate(path):
        if isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return path[:end]
    return path


def _of(config: Config, key: str) -> Any:
    return config.data.get(key) or {}


def _attempt(make: Callable[[dict[str, Any]], Any], arguments: Mapping[str, Any], path: Path) -> list[Problem]:
    """Return what is wrong if `make` fails with `arguments`: the argument without which it does not, or else all."""
    given = dict(arguments)
    message = _failure(make, given)
    if message is None:
        return []
    for name, value in given.items():
        if _failure(make, {key: item for key, item in given.items() if key != name}) is None:
            return [((*path, name), f"got {written(value)}: {message}")]
    return [(path, message)]


def _failure(make: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> str | None:
    with _quiet():
        try:
            make(arguments)
        except Exception as error:  # of whatever kind: constructors of others raise what they like
            return str(error) or type(error).__name__
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _transforms(config: Config) -> Iterator[Problem]:
    """Yield problems of the transforms of described data sets."""
    for name, one in _of(config, "data").items():
        if not isinstance(one, dict) or one.get("type") not in DATASETS:
            continue
        known = arguments_of(DATASETS.get(one["type"])).named
        for key, value in one.items():
            mark = mark_of(known[key].annotation, ComponentOf) if key in known else None
            if mark is None or value is None:
                continue
            if mark.registry is TRANSFORMS:
                for k, transform in enumerate(value):
                    yield from _attempt(lambda made: Pipeline([made]), transform, ("data", name, key, str(k)))
            else:
                yield from _attempt(mark.registry.build, value, ("data", name, key))


def _trainer(config: Config) -> Iterator[Problem]:
    described = _of(config, "trainer")
    arguments = {
        name: value
        for name, value in described.items()
        if name not in (*_WITH_EFFECTS, "type") and not _describes(value)
    }
    yield from _attempt(lambda given: Trainer(**{**given, **_WITHOUT_EFFECTS}), arguments, ("trainer",))
    callbacks = described.get("callbacks") or []
    for k, one in enumerate(callbacks if isinstance(callbacks, list) else []):
        if not any(map(_describes, split_description(one)[1].values())):
            yield from _attempt(partial(_instance, base=Callback), one, ("trainer", "callbacks", str(k)))


def _describes(value: Any) -> bool:
    """Return True if the value describes an object, which Lightning's parser makes."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_describes, value)))


def _instance(description: Mapping[str, Any], base: type) -> Any:
    name, arguments = split_description(description)
    return find_class(name, base)(**arguments)


def _optimization(config: Config, model: nn.Module | None) -> Iterator[Problem]:
    """Yield problems of the optimizer, for the parameters of the model if there is one already, and of the schedule."""
    described = config.data.get("optimizer")
    for key in ("lr_scheduler", "paramwise_cfg"):
        if described is None and config.data.get(key):
            yield (
                (key,),
                "there is no optimizer to which it belongs; describe one, as in optimizer={type: AdamW, lr: 1e-3}",
            )
    if described is None:
        return
    problems = _attempt(
        partial(make_optimizer, model=_ONE_WEIGHT if model is None else model), described, ("optimizer",)
    )
    yield from problems
    if problems:
        return
    if model is not None and config.data.get("paramwise_cfg"):
        yield from _attempt(
            lambda options: make_optimizer(described, model, ParameterOptions.described(options)),
            config.data["paramwise_cfg"],
            ("paramwise_cfg",),
        )

    def step(schedule: dict[str, Any] | list[dict[str, Any]]) -> None:
        made, _ = make_schedule(schedule, make_optimizer(described, _ONE_WEIGHT))
        if not isinstance(made, ReduceLROnPlateau):  # which takes a measured number
            made.step()

    schedule = config.data.get("lr_scheduler") or []
    if isinstance(schedule, dict):
        yield from _attempt(step, schedule, ("lr_scheduler",))
    elif schedule:
        yield from _attempt(lambda _: step(schedule), {}, ("lr_scheduler",))
