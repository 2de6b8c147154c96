"""Optimizer and learning rate schedule, made of their descriptions in a configuration."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau  # found by its name, so it has to be loaded
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from widefield.config import find_class
from widefield.modules.parameter_options import ParameterOptions, parameter_groups
from widefield.registry import arguments_of, import_object, split_description

Description = Mapping[str, Any]
"""`{type: AdamW, lr: 0.001}`, or with `class_path` and `init_args`."""
_TIMING = ("begin", "end", "by_epoch", "convert_to_iter_based")
"""Entries among the arguments of a schedule that `make_schedule` itself uses."""
_DURATIONS = ("total_iters", "T_max", "T_0", "step_size", "total_steps", "milestones")
"""Arguments of torch's schedules that count epochs or steps."""


def make_optimizer(description: Description, model: nn.Module, options: ParameterOptions | None = None) -> Optimizer:
    """The optimizer of the parameters of `model` that require a gradient.

    Raises:
        ValueError: It refuses its arguments, or `options` do not fit the model.
    """
    kind, arguments = _resolved(description, Optimizer)
    parameters: Iterable[Any] = [one for one in model.parameters() if one.requires_grad]
    if options is not None:
        defaults = arguments_of(kind).named
        lr, weight_decay = (
            arguments.get(name, defaults[name].default if name in defaults else 0.0) for name in ("lr", "weight_decay")
        )
        parameters = parameter_groups(model, options, lr, weight_decay)
    optimizer: Optimizer = kind(parameters, **arguments)
    return optimizer


def make_schedule(
    description: Description | Sequence[Description], optimizer: Optimizer, steps_per_epoch: int = 1
) -> tuple[LRScheduler, str]:
    """A schedule of `optimizer`, or several one after the other; and whether it goes on with each "step" or each "epoch".

    Beside the arguments of its class, each may have a `begin` and an `end`: it takes over at its `begin`, by default the `end` of
    the one before. Both, like the durations among the arguments, count epochs, or optimizer steps with `by_epoch: false`. If one
    of the schedules counts steps or has `convert_to_iter_based: true`, all go on with each step, their epochs converted.
    A schedule with `total_iters` (`LinearLR`, `ConstantLR`, `PolynomialLR`) lasts from its begin to its end by default.

    Raises:
        ValueError: Schedules that do not follow each other, or one that refuses its arguments.
    """
    each_step = counts_steps(description)
    resolved = [_resolved(one, LRScheduler) for one in _listed(description)]
    kinds = [kind for kind, _ in resolved]
    if any(issubclass(kind, ReduceLROnPlateau) for kind in kinds):
        if len(kinds) > 1:
            raise ValueError("ReduceLROnPlateau cannot follow or precede another schedule")
        if not issubclass(kinds[0], MonitoringPlateau):
            raise ValueError("what does it monitor? give {type: ReduceLROnPlateau, monitor: val_loss}")
    arguments = [_in_steps(one, steps_per_epoch if each_step else 1) for _, one in resolved]
    begins = _begins(arguments)
    made = []
    for k, (kind, one) in enumerate(zip(kinds, arguments, strict=True)):
        end = begins[k + 1] if k + 1 < len(begins) else one.get("end")
        if end is not None and "total_iters" in arguments_of(kind).named:
            one.setdefault("total_iters", end - begins[k])
        made.append(kind(optimizer, **{name: value for name, value in one.items() if name not in _TIMING}))
    schedule = made[0] if len(made) == 1 else SequentialLR(optimizer, made, milestones=begins[1:])
    return schedule, "step" if each_step else "epoch"


def counts_steps(description: Description | Sequence[Description]) -> bool:
    """True if schedules go on with each step, see `make_schedule`."""
    given = [split_description(one)[1] for one in _listed(description)]
    return any(not one.get("by_epoch", True) or one.get("convert_to_iter_based", False) for one in given)


def configure_optimizers(
    model: LightningModule,
    optimizer: Description,
    lr_scheduler: Description | Sequence[Description] | None,
    options: ParameterOptions | None,
) -> Any:
    """Return the result of a model's method of that name, made of descriptions."""
    made = make_optimizer(optimizer, model, options)
    if not lr_scheduler:
        return made
    steps = _steps_per_epoch(model.trainer) if counts_steps(lr_scheduler) else 1
    schedule, interval = make_schedule(lr_scheduler, made, steps)
    monitor = {"monitor": schedule.monitor} if isinstance(schedule, MonitoringPlateau) else {}
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": interval, **monitor}}


def _steps_per_epoch(trainer: Trainer) -> int:
    """Optimizer steps of each epoch."""
    _ = trainer.estimated_stepping_batches  # sets the number of batches
    if math.isinf(trainer.num_training_batches):
        raise ValueError("lr_scheduler: the training data has no length, so epochs cannot be converted to steps")
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def _listed(description: Description | Sequence[Description]) -> Sequence[Description]:
    return [description] if isinstance(description, Mapping) else description


def _resolved(description: Description, base: type) -> tuple[Any, dict[str, Any]]:
    """The class and its arguments; a text with a dot is the import path of a function."""
    name, arguments = split_description(description)
    return find_class(name, base), {
        key: import_object(value) if isinstance(value, str) and "." in value else value
        for key, value in arguments.items()
    }


def _in_steps(arguments: Mapping[str, Any], steps_per_epoch: int) -> dict[str, Any]:
    if not arguments.get("by_epoch", True):
        return dict(arguments)
    return {
        name: _times(value, steps_per_epoch) if name in (*_DURATIONS, "begin", "end") else value
        for name, value in arguments.items()
    }


def _times(duration: Any, factor: int) -> Any:
    return [one * factor for one in duration] if isinstance(duration, (list, tuple)) else duration * factor


def _begins(schedules: Sequence[Mapping[str, Any]]) -> list[int]:
    """When each begins."""
    begins: list[int] = []
    for k, one in enumerate(schedules):
        before = schedules[k - 1].get("end") if k else 0
        begin = one.get("begin", before)
        if begin is None:
            raise ValueError(f"schedule {k} has no begin, and schedule {k - 1} has no end; give one of them")
        if before is not None and begin != before:
            raise ValueError(
                f"schedule {k} begins at {begin}; it must begin at {before}, "
                f"{f'the end of schedule {k - 1}' if k else 'as the first does'}"
            )
        if begins and begin <= begins[-1]:
            raise ValueError(f"schedule {k} begins at {begin}; it must begin after schedule {k - 1}, at {begins[-1]}")
        begins.append(begin)
    return begins
