"""The learning rate of every epoch, and its picture."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from widefield.modules.optimization import make_optimizer, make_schedule
from widefield.reports.figures import new_figure, save


def learning_rates(
    optimizer: dict[str, Any],
    lr_scheduler: dict[str, Any] | list[dict[str, Any]] | None,
    epochs: int,
    steps_per_epoch: int | None = None,
) -> list[float]:
    """The learning rate at the beginning of each epoch of `widefield fit`.

    Args:
        optimizer: `{type: SGD, lr: 0.1}`, or with `class_path` and `init_args`, a class of `torch.optim` or an import path.
        lr_scheduler: Likewise, of `torch.optim.lr_scheduler`, or several, see `make_schedule`; None keeps the rate.
        epochs: How many.
        steps_per_epoch: Optimizer steps of each epoch, for a schedule that counts them.

    Raises:
        ValueError: The schedule depends on what is measured in training, or on the number of steps, or has an unknown name.
        TypeError: Arguments that the classes do not take.
    """
    made = make_optimizer(optimizer, nn.Linear(1, 1, bias=False))
    if not lr_scheduler:
        return [float(made.param_groups[0]["lr"])] * epochs
    schedule, interval = make_schedule(lr_scheduler, made, steps_per_epoch or 1)
    if isinstance(schedule, ReduceLROnPlateau):
        raise ValueError(
            f"{type(schedule).__name__} depends on what is measured in training, so it has no curve beforehand"
        )
    if interval == "step" and steps_per_epoch is None:
        raise ValueError("the schedule goes on with each step; say how many an epoch has, with --steps-per-epoch N")
    rates = []
    for _ in range(epochs):
        rates.append(float(made.param_groups[0]["lr"]))
        for _ in range(steps_per_epoch or 1 if interval == "step" else 1):
            made.step()
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
