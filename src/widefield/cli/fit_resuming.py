"""Changed settings of a run that `widefield fit --resume` goes on with: they take effect, or they are refused."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim.lr_scheduler import ReduceLROnPlateau

from widefield.config import Config, dotted
from widefield.config.merge import with_types

Settings = dict[str, Any]
"""A configuration with all defaults, as nested plain data."""
_OF_THE_RUN = ("accumulate_grad_batches", "limit_train_batches", "overfit_batches")
"""Arguments of the trainer that say what an epoch is."""
_PLACES = ("images", "labels", "masks", "targets", "root", "ann_file", "num_workers")
"""Arguments of data that say where they lie and who reads them."""
_MEMORY = ("tile_size", "memory_budget", "streaming", "cache_features")
"""Arguments of models that say how they are computed."""


def settings_of(parser: LightningArgumentParser, parsed: Any) -> Settings:
    """Return what `parser` has parsed as plain data, with `type` where Lightning writes `class_path`."""
    return with_types(Config(yaml.safe_load(parser.dump(parsed, skip_none=False, skip_validation=True)))).data


def optimization_of(settings: Settings) -> Settings:
    """Return the settings of the optimizer and its schedule."""
    model = settings.get("model") or {}
    rates = {name: model.get(name) for name in ("lr", "weight_decay")}
    return {"optimizer": settings.get("optimizer"), "lr_scheduler": settings.get("lr_scheduler"), **rates}


def check_resumed(before: Settings, after: Settings, checkpoint: Path) -> None:
    """Refuse settings that a resumed run cannot take on.

    Free are the trainer (epochs, precision, clipping, devices, logging, callbacks) but for what makes an epoch, the arguments
    of the optimizer and its schedule, metrics, the place of the data, and how a model is computed: tiles, memory, streaming.

    Args:
        before, after: Settings of the run, and those that were given now.
        checkpoint: What the run goes on with, for the message.

    Raises:
        ValueError: Others differ; the message has a line for each.
    """
    refused = [
        f"  {dotted(path)} was {old!r} and is {new!r}"
        for path, old, new in _changes(before, after)
        if not _may_change(path, old, new)
    ]
    if refused:
        raise ValueError(
            "\n".join([f"{checkpoint} is of a run with other values:", *refused])
            + "\nresume with those of the run, or begin a new run in another folder with --out DIR"
        )


class Optimization(Callback):
    """Gives a resumed run the settings of the optimizer and its schedule that hold now, if they are not those of the checkpoint.

    The state of the optimizer, such as its moments, goes on. Rates become what the new settings give at this point of the run, as
    if they had held from its start; only `ReduceLROnPlateau`, which depends on what was measured, begins anew.

    Args:
        settings: See `optimization_of`; kept in the checkpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._before: Settings | None = None
        self._fresh: tuple[list[Any], list[Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self._settings

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was made of the settings, which Lightning then overwrites with what the checkpoint holds."""
        if self._before is None or self._before == self._settings:
            return
        all_groups = [[dict(group) for group in one.param_groups] for one in trainer.optimizers]
        groups = [[{name: group[name] for name in group if name != "params"} for group in one] for one in all_groups]
        schedules = [copy.deepcopy(one.scheduler.state_dict()) for one in trainer.lr_scheduler_configs]
        self._fresh = groups, schedules

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fresh is None or self._before is None:
            return
        for optimizer, groups in zip(trainer.optimizers, self._fresh[0], strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
        for config, state in zip(trainer.lr_scheduler_configs, self._fresh[1], strict=True):
            schedule: Any = config.scheduler
            counted = trainer.current_epoch if config.interval == "epoch" else trainer.global_step
            steps = schedule.last_epoch if self._before["lr_scheduler"] else counted
            schedule.load_state_dict(state)
            if not isinstance(schedule, ReduceLROnPlateau):
                _advance(schedule, steps)


def _advance(schedule: Any, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that no step of the optimizer came before
        for _ in range(steps):
            schedule.step()


def _changes(before: Any, after: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the path, the former and the new value of all that differs; None where there is none."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _changes(before.get(key), after.get(key), (*path, str(key)))
    elif before != after:
        yield path, before, after


def _may_change(path: tuple[str, ...], old: Any, new: Any) -> bool:
    section, *names = path
    if section == "trainer":
        return names[0] not in _OF_THE_RUN and (names[0] != "callbacks" or _callbacks_may_change(old, new))
    if section == "model":
        return names in (["lr"], ["weight_decay"]) or any(name in _MEMORY for name in names)
    if section == "data":
        return bool(names) and names[-1] in _PLACES
    if section == "optimizer":
        return bool(names) and names != ["type"]
    return section in ("lr_scheduler", "metrics", "imports")


def _callbacks_may_change(old: Any, new: Any) -> bool:
    """Return True if callbacks come or go; one with other arguments would take its former ones from the checkpoint."""
    former = {one["type"]: one for one in old or () if isinstance(one, Mapping) and "type" in one}
    return all(former.get(one.get("type"), one) == one for one in new or () if isinstance(one, Mapping))
