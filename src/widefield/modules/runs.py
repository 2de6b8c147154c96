"""Runs that can be trusted: they end where their numbers end, resume as if unbroken, and write checkpoints whole or not at all."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.writing import write_torch_file

_SECONDS = 10.0
"""Between two looks at the losses of a GPU, each of which waits for the steps that are under way."""
_BATCHES = 50
"""The same with several processes, which must look at the same time."""
_NEVER = torch.iinfo(torch.int64).max


class NotFiniteError(WidefieldError, ValueError):
    """A loss, a weight or the state of an optimizer became NaN or infinite, so training cannot go on.

    Attributes:
        step: Optimizer step in which that was seen, the first is 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class FiniteTraining(Callback):
    """Raises `NotFiniteError` when the loss of a training step is not finite, or a checkpoint would hold what is not.

    Losses are looked at on the device: in every step on a CPU, every few seconds on a GPU, every few batches with several
    processes, before every validation and at the end of every epoch; the error names the first step whose loss was not finite.
    Weights, buffers and the state of the optimizers are looked at before a checkpoint is written, by whatever callback, and at
    the end of every epoch and of the training, so give this callback ahead of those that write files. Checkpoints of weights
    alone (`save_weights_only`) that are written within an epoch are not looked at. Buffers that were not finite when training
    began, such as masks, may stay so.

    A monitored number that is not finite makes no checkpoint of a `ModelCheckpoint` the best one.
    """

    def __init__(self) -> None:
        self._step = 1
        self._first: Tensor | None = None
        self._looked = 0.0
        self._exempt: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and "check_monitor_top_k" not in vars(callback):
                callback.check_monitor_top_k = partial(_is_among_best, callback)  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first, self._looked = None, time.monotonic()
        self._exempt = frozenset(_not_finite({"": dict(pl_module.named_buffers())}))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step + 1  # with accumulated gradients, the one to which this batch belongs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor):
            return
        step = torch.where(loss.detach().isfinite().all(), _NEVER, self._step)
        self._first = step if self._first is None else torch.minimum(self._first, step)
        if trainer.world_size > 1:
            due = (batch_idx + 1) % _BATCHES == 0
        else:
            due = loss.device.type == "cpu" or time.monotonic() - self._looked >= _SECONDS
        if due:
            self._check_losses(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_losses(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_losses(trainer)
        self._check_state(trainer, {"": pl_module.state_dict()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_losses(trainer)
        self._check_state(trainer, {"": pl_module.state_dict()})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = {f"optimizer {k}": state["state"] for k, state in enumerate(checkpoint.get("optimizer_states", ()))}
        self._check_state(trainer, {"": checkpoint["state_dict"], **states})

    def _check_losses(self, trainer: Trainer) -> None:
        if self._first is None:
            return
        first = int(trainer.strategy.reduce(self._first, reduce_op="min"))
        self._first, self._looked = None, time.monotonic()
        if first != _NEVER:
            raise _error(trainer, f"the loss of step {first}", first)

    def _check_state(self, trainer: Trainer, state: Mapping[str, Any]) -> None:
        names = [name for name in _not_finite(state) if name not in self._exempt]
        if names:
            others = f" and {len(names) - 1} more" if names[1:] else ""
            raise _error(trainer, f"after step {trainer.global_step}, {names[0]}{others}", trainer.global_step)


def _error(trainer: Trainer, what: str, step: int) -> NotFiniteError:
    half = "16" in str(trainer.precision)
    precision = f", or precision 32-true instead of {trainer.precision}" if half else ""
    return NotFiniteError(
        f"{what} (epoch {trainer.current_epoch + 1}) is NaN or infinite, and training has ended; try a smaller learning rate, "
        f"clipped gradients (gradient_clip_val){precision}, and look whether images have pixels that are NaN",
        step,
    )


def _not_finite(state: Any, name: str = "") -> Iterator[str]:
    """Names of the tensors that are not finite, in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        if (state.is_floating_point() or state.is_complex()) and not bool(state.isfinite().all()):
            yield name
    elif isinstance(state, (Mapping, list, tuple)):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        for key, value in items:
            yield from _not_finite(value, f"{name}.{key}" if name else str(key))


def _is_among_best(callback: ModelCheckpoint, trainer: Trainer, current: Any = None) -> bool:
    """`ModelCheckpoint.check_monitor_top_k` for finite numbers; others are not among the best."""
    if isinstance(current, Tensor) and not bool(current.isfinite()):
        return False
    return type(callback).check_monitor_top_k(callback, trainer, current)


class RandomState(Callback):
    """Keeps the state of torch's default generators in the checkpoint and restores it when training starts again.

    With a checkpoint of the end of an epoch, dropout and the order of a shuffled `DataLoader` go on as in an unbroken run.

    Examples:
        >>> trainer = lightning.pytorch.Trainer(max_epochs=1, logger=False, callbacks=[wf.RandomState()], accelerator="cpu")
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:
            return
        torch.set_rng_state(self._restored["cpu"])
        if len(self._restored["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(self._restored["cuda"])
        self._restored = None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, then rename it: a process killed while writing leaves the old one intact.

    Checkpoints hold tensors and plain data only and are read with `weights_only=True`.

    Examples:
        >>> trainer = lightning.pytorch.Trainer(max_epochs=1, logger=False, plugins=[wf.AtomicCheckpointIO()], accelerator="cpu")
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(f"AtomicCheckpointIO takes no storage_options, got {storage_options!r}; omit them")
        write_torch_file(checkpoint, Path(path))
