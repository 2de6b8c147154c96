"""The learning rate of every epoch, and its picture."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from widefield.registry import import_object, split_description, suggestion
from widefield.reports.figures import new_figure, save


def learning_rates(optimizer: dict[str, Any], lr_scheduler: dict[str, Any] | None, epochs: int) -> list[float]:
    """The learning rate in each epoch, of a schedule that is stepped once after every epoch, as `widefield fit` does.

    Args:
        optimizer: `{type: SGD, lr: 0.1}`, or with `class_path` and `init_args`, a class of `torch.optim` or an import path.
        lr_scheduler: Likewise, of `torch.optim.lr_scheduler`; None keeps the rate.
        epochs: How many.

    Raises:
        ValueError: The schedule depends on what is measured in training, or an unknown name.
        TypeError: Arguments that the classes do not take.
    """
    made: Optimizer = _build(optimizer, torch.optim, [nn.Parameter(torch.zeros(1))])
    schedule = None if lr_scheduler is None else _build(lr_scheduler, torch.optim.lr_scheduler, made)
    if schedule is not None and isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            f"{type(schedule).__name__} depends on what is measured in training, so it has no curve beforehand"
        )
    rates = []
    for _ in range(epochs):
        rates.append(float(made.param_groups[0]["lr"]))
        made.step()
        if schedule is not None:
            schedule.step()
    return rates


def save_schedule(path: str | Path, rates: list[float]) -> None:
    """Write a PNG: learning rates by epoch, from 1."""
    figure, axes = new_figure()
    axes.step(range(1, len(rates) + 1), rates, where="mid")
    axes.set_xlabel("epoch")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    save(figure, path)


def _build(description: dict[str, Any], package: Any, given: Any) -> Any:
    name, arguments = split_description(description)
    if "." in name:
        made = import_object(name)
    elif hasattr(package, name):
        made = getattr(package, name)
    else:
        known = [one for one in dir(package) if one[0].isupper()]
        raise ValueError(f"there is no {name} in {package.__name__}; {suggestion(name, known)}")
    return made(given, **arguments)
