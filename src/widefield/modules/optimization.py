"""Optimizer and learning rate schedule, made of their descriptions in a configuration."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau  # found by its name, so it has to be loaded
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from widefield.config import find_class
from widefield.registry import Range, arguments_of, import_object, split_description

Description = Mapping[str, Any]
"""`{type: AdamW, lr: 0.001}`, or with `class_path` and `init_args`."""
_TIMING = ("begin", "end", "by_epoch", "convert_to_iter_based")
"""Entries among the arguments of a schedule that `make_schedule` itself uses."""
_DURATIONS = ("total_iters", "T_max", "T_0", "step_size", "total_steps", "milestones")
"""Arguments of torch's schedules that count epochs or steps."""
Factor = Annotated[float, Range(0)]
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Factors:
    """Factors of the learning rate and of the weight decay; with `fix_lr` no schedule changes the rate."""

    lr_mult: Factor = 1.0
    decay_mult: Factor = 1.0
    fix_lr: bool = False


@dataclass(frozen=True)
class ParameterOptions:
    """Learning rates and weight decays by kind of parameter, as in MMEngine's `paramwise_cfg`.

    Of a parameter's decay the first of these decides that knows it: custom keys, norm layers, biases, parameters of one axis.

    Args:
        norm_decay_mult: Factor of the weight decay of norm layers.
        bias_decay_mult: Of other biases.
        flat_decay_mult: Of other parameters with one axis, such as the scales of layers.
        custom_keys: Factors by parts of parameters' names, such as `{backbone: {lr_mult: 0.1}}`; of several the longest counts.
            `{predictor: {fix_lr: true}}` keeps a rate as it is at first, as SimSiam does.
        layer_decay_rate: Factor of the learning rate from each layer to the one before it, for a `backbone` that says how deep
            its layers lie: a vision transformer.
    """

    norm_decay_mult: Factor = 1.0
    bias_decay_mult: Factor = 1.0
    flat_decay_mult: Factor = 1.0
    custom_keys: dict[str, Factors] = field(default_factory=dict)
    layer_decay_rate: Factor | None = None

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> "ParameterOptions":
        """The options that stand in a configuration."""
        keys = {key: Factors(**factors) for key, factors in (description.get("custom_keys") or {}).items()}
        return cls(**{**description, "custom_keys": keys})


def parameter_groups(
    model: nn.Module, options: ParameterOptions, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The parameters of `model` that require a gradient, in groups of one learning rate and weight decay each.

    Raises:
        ValueError: A custom key is part of no parameter's name, or the backbone does not say how deep its layers lie.
    """
    groups: dict[Factors, list[nn.Parameter]] = {}
    named = list(_named(model))
    for key in options.custom_keys:
        if not any(key in name for name, _, _ in named):
            raise ValueError(f"no parameter has the custom key {key!r} in its name")
    for name, module, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(_factors(name, module, parameter, model, options), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * factors.lr_mult,
            "weight_decay": weight_decay * factors.decay_mult,
            **({"fixed_lr": lr * factors.lr_mult} if factors.fix_lr else {}),
        }
        for factors, parameters in groups.items()
    ]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter once, with its name and the module that holds it."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        yield name, modules[name.rpartition(".")[0]], parameter


def _factors(
    name: str, module: nn.Module, parameter: nn.Parameter, model: nn.Module, options: ParameterOptions
) -> Factors:
    layer = _layer_factor(name, model, options.layer_decay_rate)
    keys = sorted((key for key in options.custom_keys if key in name), key=len)
    if keys:
        custom = options.custom_keys[keys[-1]]
        return Factors(layer * custom.lr_mult, custom.decay_mult, custom.fix_lr)
    if isinstance(module, _NORMS):
        return Factors(layer, options.norm_decay_mult)
    if name.rpartition(".")[2] == "bias":
        return Factors(layer, options.bias_decay_mult)
    return Factors(layer, options.flat_decay_mult if parameter.ndim == 1 else 1.0)


def _layer_factor(name: str, model: nn.Module, rate: float | None) -> float:
    if rate is None:
        return 1.0
    backbone: Any = getattr(model, "backbone", None)
    if not hasattr(backbone, "get_layer_depth"):
        raise ValueError(
            f"layer_decay_rate needs a backbone that says how deep its layers lie (get_layer_depth); "
            f"{type(model if backbone is None else backbone).__name__} does not"
        )
    depth, depths = backbone.get_layer_depth(name, "backbone.")
    return float(rate ** (depths - 1 - depth))


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
    if any("fixed_lr" in group for group in optimizer.param_groups):
        optimizer.register_step_pre_hook(_fix_rates)
    return optimizer


def _fix_rates(optimizer: Optimizer, *_: Any) -> None:
    """Undo what a schedule made of the rates that are fixed."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("fixed_lr", group["lr"])


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
