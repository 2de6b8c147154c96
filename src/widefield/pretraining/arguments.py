"""The arguments of `widefield.train`: checked all together, before anything is read or written.

The classes whose arguments they are, and torch, are imported only for a run: their outlines do for the check of a command line.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml

from widefield.config import check_value
from widefield.pretraining.methods import METHODS, RULE
from widefield.pretraining.settings import Count, Errors, updated, values_for
from widefield.pretraining.settings import arguments as arguments_of_call
from widefield.pretraining.transform_args import TransformArgs
from widefield.registry import Range, UnknownNameError, import_object, suggestion

if TYPE_CHECKING:  # they import torch
    from widefield.pretraining.callbacks import CallbackArgs
    from widefield.pretraining.loggers import LoggerArgs
    from widefield.pretraining.methods.base import Method
    from widefield.pretraining.optimizers import Optim, OptimArgs

_TRAINER_ARGUMENTS = {
    "accelerator": "accelerator",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "callbacks": "callbacks",
    "default_root_dir": "out",
    "devices": "devices",
    "enable_checkpointing": "callbacks={'model_checkpoint': None}",
    "limit_train_batches": "data",
    "logger": "loggers",
    "max_epochs": "epochs",
    "num_nodes": "num_nodes",
    "overfit_batches": "data",
    "precision": "precision",
    "reload_dataloaders_every_n_epochs": None,
    "strategy": "strategy",
    "use_distributed_sampler": None,
}
"""Arguments of Lightning's trainer that others of ours stand for; None where none does."""

_LOADER_ARGUMENTS = {
    "dataset": "data",
    "num_workers": "num_workers",
    "generator": "seed",
    **dict.fromkeys(("batch_sampler", "collate_fn", "sampler")),
}
_DONE_BY_LOADERS = ("shuffle", "drop_last")
"""Arguments of a `DataLoader` that are True here."""

_SAME_METHODS = {"distillationv3": "distillation"}
_OTHER_METHODS = {
    "distillationv1": "distillation, which compares positions too: method_args={'loss_local_weight': 0} leaves them out",
    "distillationv2": "distillation, which compares how features are alike, not by the squared error of the features themselves",
    "dinov31": "dinov3 with a checkpoint and method_args={'gram_start_step': 0, 'gram_updates': 0}, which keeps patches of a view "
    "as alike as they were; it does not align patches of two views",
}
"""Methods of LightlyTrain that are none here, and what is nearest."""

MAX_WORKERS = 8
Workers = Annotated[int, Range(0)] | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run.

    Attributes:
        given: The arguments of `widefield.train`, by their names.
        method, method_args, epochs, num_workers, transforms, optim, loggers, callbacks: What follows from them.
        rule: How the learning rate is scaled, and gradients are cut.
    """

    given: SimpleNamespace
    method: "type[Method]"
    method_args: dict[str, Any]
    epochs: int
    num_workers: int
    transforms: TransformArgs
    optim: "OptimArgs"
    rule: "Optim"
    loggers: "LoggerArgs"
    callbacks: "CallbackArgs"

    def as_yaml(self, longest: int | None = None) -> str:
        """Return the settings as YAML: models by the name of their class, lists of more than `longest` entries cut."""
        made = {name: value for name, value in vars(self).items() if name not in ("given", "method", "rule")}
        made["method_args"] = {**self.method_args, **{name: getattr(self.rule, name) for name in RULE}}
        plain = {name: _plain(value, longest) for name, value in (vars(self.given) | made).items()}
        return yaml.safe_dump({**plain, "optim": self.optim.name, "optim_args": asdict(self.optim)}, sort_keys=False)


def parse(train: Callable[..., None], given: Mapping[str, Any], find: Callable[[str], Any] = import_object) -> Settings:
    """Return the settings of a call of `train` with the arguments `given` by name.

    Args:
        train: The function, which says the types of its arguments.
        given: All of them.
        find: Returns the class called `package.module:Name`; with `outline` the settings are good for a check alone.

    Raises:
        ValueError: Something is of the wrong type, out of range or unknown; the message has a line for each error.
    """
    errors = Errors()
    arguments = arguments_of_call(train, given, errors, unchecked=("data", "model"))
    arguments.method = _SAME_METHODS.get(arguments.method, arguments.method)
    method = _method(arguments.method, errors, find)
    _check_resuming(arguments, errors)
    if arguments.trainer_args:
        trainer = find("lightning.pytorch:Trainer")
        _check_passed_on(trainer, arguments.trainer_args, _TRAINER_ARGUMENTS, "trainer_args", errors)
    if arguments.loader_args:
        loader = find("torch.utils.data:DataLoader")
        _check_passed_on(loader, arguments.loader_args, _LOADER_ARGUMENTS, "loader_args", errors)
    transforms = updated(method.transforms, arguments.transform_args, "transform_args", errors)
    if transforms.num_views < method.transforms.num_views:
        errors.append(
            f"transform_args.num_views={transforms.num_views}; {arguments.method} needs {method.transforms.num_views}"
        )
    if method.most_views is not None and transforms.num_views > method.most_views:
        errors.append(f"transform_args.num_views={transforms.num_views}; {arguments.method} takes {method.most_views}")
    if transforms.local_view is not None and not method.takes_local_views:
        errors.append(f"transform_args.local_view: {arguments.method} takes no local views; leave it out")
    optim = _optim(method, arguments, errors)
    method_args = dict(arguments.method_args or {})
    ruled = {name: method_args.pop(name) for name in RULE if name in method_args}
    rule = updated(method.optim, ruled, "method_args", errors)
    method_args = values_for(method, method_args, "method_args", errors, given=("embedding", "run"))
    errors.raise_if_any("widefield.train")
    assert optim is not None
    workers = arguments.num_workers
    return Settings(
        given=arguments,
        method=method,
        method_args=method_args,
        epochs=100 if arguments.epochs == "auto" else arguments.epochs,
        num_workers=auto_workers(os.cpu_count(), device_count(arguments.devices)) if workers == "auto" else workers,
        transforms=transforms.for_channels(),
        optim=optim,
        rule=rule,
        loggers=arguments.loggers or find("widefield.pretraining.loggers:LoggerArgs")(),
        callbacks=arguments.callbacks or find("widefield.pretraining.callbacks:CallbackArgs")(),
    )


def auto_workers(cpus: int | None, devices: int) -> int:
    """Worker processes for one device: all cores but one, shared among the devices, at most `MAX_WORKERS`; SLURM may say more."""
    if "SLURM_CPUS_PER_TASK" in os.environ:
        return max(0, int(os.environ["SLURM_CPUS_PER_TASK"]) - 1)
    if cpus is None:
        return MAX_WORKERS
    return max(0, min(cpus // devices - 1, MAX_WORKERS))


def device_count(devices: int | str | list[int]) -> int:
    """Return how many devices an argument of the trainer names, at least 1."""
    if isinstance(devices, str):
        return int(devices) if devices.isdecimal() and int(devices) > 0 else 1
    return max(1, devices if isinstance(devices, int) else len(devices))


def check_precision(precision: Any, on_cpu: bool) -> None:
    """Raises ValueError for weights of float16 on a CPU: small values and gradients are lost, and nothing scales them there."""
    if on_cpu and precision in ("16-true", "transformer-engine-float16"):
        raise ValueError(f"precision={precision!r} is for GPUs; give 'bf16-true', 'bf16-mixed' or '32-true' on a CPU")


def _method(name: str, errors: Errors, find: Callable[[str], Any]) -> "type[Method]":
    base: type[Method] = find("widefield.pretraining.methods.base:Method")
    try:
        found = METHODS.get(name, find=find)
    except UnknownNameError as error:
        near = _OTHER_METHODS.get(name)
        errors.append(f"method: {error}" if near is None else f"method={name!r} is not here; the nearest is {near}")
        return base
    if not (isinstance(found, type) and issubclass(found, base)):
        errors.append(f"method: {name} is no subclass of widefield.pretraining.Method")
        return base
    return found


def _check_resuming(arguments: SimpleNamespace, errors: Errors) -> None:
    if arguments.resume is False and arguments.resume_interrupted:
        errors.append("resume=False and resume_interrupted=True are the same argument; give resume_interrupted alone")
    arguments.resume_interrupted = arguments.resume_interrupted or bool(arguments.resume)
    if arguments.resume_interrupted and arguments.checkpoint is not None:
        errors.append("checkpoint begins a new run and resume_interrupted goes on with one; give one of them")
    if arguments.resume_interrupted and arguments.overwrite:
        errors.append("overwrite removes the run that resume_interrupted goes on with; give one of them")
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        errors.append(f"checkpoint: {arguments.checkpoint} does not exist")


def _check_passed_on(
    function: Any, given: Mapping[str, Any], ours: Mapping[str, str | None], where: str, errors: Errors
) -> None:
    for name in ours.keys() & given.keys():
        by = f"the argument {ours[name]}" if ours[name] else "Widefield"
        errors.append(f"{where}.{name} is set by {by}; leave it out here")
    values_for(function, {name: given[name] for name in given if name not in ours}, where, errors, given=("dataset",))
    for name in set(_DONE_BY_LOADERS) & given.keys() if where == "loader_args" else ():
        if given[name] is not True:
            errors.append(f"{where}.{name}={given[name]!r}; training batches are shuffled and full: leave it out")
    for name in ("max_steps", "batch_size"):
        if name in given:
            errors.add(check_value(given[name], Count, (where, name)))


def _optim(method: "type[Method]", arguments: SimpleNamespace, errors: Errors) -> "OptimArgs | None":
    optim = method.optim.named(arguments.optim)
    if optim is None:
        names = [one.name for one in method.optim.choices]
        errors.append(f"optim={arguments.optim!r}; {suggestion(arguments.optim, ['auto', *names, 'adamw8bit'])}")
        return None
    changes = arguments.optim_args
    if changes and changes.get("weight_decay") == "auto":  # as if it were left out, see `Method.optim_for`
        changes = {name: value for name, value in changes.items() if name != "weight_decay"}
    return updated(optim, changes, "optim_args", errors)


def _plain(value: Any, longest: int | None) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Path, timedelta)):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value), longest)
    if isinstance(value, Mapping):
        return {str(key): _plain(part, longest) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        shown = value if longest is None else value[:longest]
        more = [f"... and {len(value) - len(shown)} more"] if len(shown) < len(value) else []
        return [_plain(part, longest) for part in shown] + more
    return type(value).__name__
