"""Lightning's trainer of a run, and batch norms that take the statistics of all processes on the CPU too, where torch's do not."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightly.utils.dist import gather
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.modules import AtomicCheckpointIO
from widefield.pretraining.arguments import Settings, check_precision, device_count
from widefield.pretraining.callbacks import make_callbacks
from widefield.pretraining.labels import Labels
from widefield.pretraining.loggers import make_loggers
from widefield.pretraining.out import OutFolder

_log = logging.getLogger(__name__)


def make_trainer(settings: Settings, folder: OutFolder, labels: Labels | None) -> pl.Trainer:
    """Return the trainer of a run on images with these labels.

    Raises:
        ValueError: There is none for these settings.
    """
    given = settings.given
    loggers = make_loggers(settings.loggers, folder.path, folder.metrics)
    options: dict[str, Any] = {
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": settings.rule.gradient_clip_val,
        **(given.trainer_args or {}),
    }
    options.pop("max_steps", None)
    callbacks = make_callbacks(settings.callbacks, folder, bool(loggers), labels)
    if options.get("enable_progress_bar") is not False:  # significant digits, which small learning rates need
        callbacks.append(RichProgressBar(theme=RichProgressBarTheme(metrics_format=".4g")))
    plugins = [AtomicCheckpointIO(), *_as_list(options.pop("plugins", None))]
    several = _several_devices(given.devices, given.num_nodes, given.accelerator)
    if several and settings.given.streaming is not None:
        _log.warning("streamed models on several devices: batch norms take the statistics of each device alone")
    elif several and "sync_batchnorm" not in options:
        if _is_cpu(given.accelerator):
            plugins.append(SyncBatchNormOnCPU())
        else:
            options["sync_batchnorm"] = True
    check_precision(given.precision, _is_cpu(given.accelerator))
    try:
        return pl.Trainer(
            default_root_dir=folder.path,
            max_epochs=settings.epochs,
            accelerator=given.accelerator,
            devices=given.devices if given.devices != "auto" or not _is_cpu(given.accelerator) else 1,
            num_nodes=given.num_nodes,
            strategy=_strategy(given.strategy, several),
            precision=_precision(given.precision, given.accelerator),
            accumulate_grad_batches=given.gradient_accumulation_steps,
            logger=loggers or False,
            callbacks=callbacks,
            enable_checkpointing=settings.callbacks.model_checkpoint is not None,
            use_distributed_sampler=False,
            plugins=plugins,
            **options,
        )
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(f"Lightning's Trainer cannot be made with these arguments: {error}") from error


def _strategy(strategy: Any, several: bool) -> Any:
    """Parameters that the loss does not reach, such as a classifier's, are allowed in all kinds of ddp."""
    if strategy == "auto" and several:
        return "ddp_find_unused_parameters_true"
    if strategy in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"):
        return f"{strategy}_find_unused_parameters_true"
    return strategy


def _is_cpu(accelerator: Any) -> bool:
    if accelerator == "auto":
        return not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return accelerator == "cpu" or isinstance(accelerator, CPUAccelerator)


def _several_devices(devices: Any, nodes: int, accelerator: Any) -> bool:
    if devices in ("auto", -1, "-1"):
        return nodes > 1 or (not _is_cpu(accelerator) and torch.cuda.device_count() > 1)
    return nodes * device_count(devices) > 1


def _precision(precision: Any, accelerator: Any) -> Any:
    if precision != "auto":
        return precision
    on_gpu = not _is_cpu(accelerator) and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


class SyncedBatchNorm(_BatchNorm):
    """A batch norm whose statistics in training are those of the batches of all processes together, with gradients through them."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        kind, dims = input.dtype, [0, *range(2, input.ndim)]
        input = input.to(torch.promote_types(kind, torch.float32))  # sums of squares do not fit in 16 bits
        count = torch.full((1,), float(input.numel() // input.shape[1]), dtype=input.dtype, device=input.device)
        sums = torch.cat([input.sum(dims), (input * input).sum(dims), count])
        sums = torch.stack(gather(sums)).sum(0)
        channels = input.shape[1]
        total = sums[-1]
        mean = sums[:channels] / total
        var = (sums[channels:-1] / total - mean * mean).clamp(min=0)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._follow(mean.detach(), var.detach() * (total / (total - 1)).detach())
        shape = [1, -1, *[1] * (input.ndim - 2)]
        out = (input - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        return (out if self.bias is None else out + self.bias.view(shape)).to(kind)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            assert self.num_batches_tracked is not None
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)


class SyncBatchNormOnCPU(LayerSync):
    """Changes the class of every batch norm, and back: the modules, their weights and names stay."""

    def __init__(self) -> None:
        self._changed: list[tuple[nn.Module, type[nn.Module]]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                self._changed.append((module, type(module)))
                module.__class__ = SyncedBatchNorm
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        while self._changed:
            module, kind = self._changed.pop()
            module.__class__ = kind
        return model
