"""The Lightning module of a run: a method, its views on the device, its optimizer."""

from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import widefield
from widefield.pretraining.arguments import Settings
from widefield.pretraining.checkpoint import KEY, Checkpoint, named_model
from widefield.pretraining.dataset import Batch, EpochOrder, ViewDataset, collate
from widefield.pretraining.methods.base import Method
from widefield.pretraining.optimizers import begin_momentum, can_fuse, warmup_and_cosine
from widefield.pretraining.views import to_unit

_LARGE = 128
"""Pixels of a side from which convolutions are faster on pixels whose channels lie together: ResNet-18 on
one CPU thread, forward and backward, takes 0.83 of the time at 224 pixels, 0.96 at 128, 1.07 at 96."""


def allows_channels_last(model: nn.Module) -> bool:
    """True if views may be given to `model` with their channels together.

    oneDNN in torch 2.15 writes beyond its memory in the backward pass of strided 1x1 convolutions of few such channels.
    """
    return not any(
        isinstance(part, nn.Conv2d) and max(part.kernel_size) == 1 and max(part.stride) > 1 and part.in_channels < 16  # type: ignore[type-var]
        for part in model.modules()
    )


def in_fastest_layout(views: Tensor) -> Tensor:
    """The same views (B, C, H, W), the channels of a pixel together if that is faster.

    A batch of one is left as it is: batch norm's derivative on the CPU is wrong for one whose layout differs from its gradient's.
    """
    if views.shape[0] > 1 and min(views.shape[-2:]) >= _LARGE:
        return views.contiguous(memory_format=torch.channels_last)
    return views


class Pretraining(pl.LightningModule):
    """Trains a method.

    The random numbers of a step depend on the seed, the step and the process alone, the order of images and their views on the
    seed, the epoch and the number of the image. So a run that is resumed does what an unbroken one does.

    Args:
        method: What is trained.
        settings: How.
        dataset: The views of the images.
        batch_size: Images of a batch over all processes.
        loader_args: Of the `DataLoader`.
        fused: True if the optimizer updates each weight in one pass, where that is right; see `optimizers.can_fuse`.
    """

    def __init__(
        self,
        method: Method,
        settings: Settings,
        dataset: ViewDataset,
        batch_size: int,
        loader_args: dict[str, Any],
        fused: bool,
    ) -> None:
        super().__init__()
        self.method = method
        self.settings = settings
        self.dataset = dataset
        self.batch_size, self.loader_args, self.fused = batch_size, loader_args, fused
        self.batches_per_epoch = len(dataset) // batch_size
        normalize = settings.transforms.normalize
        for name, values in (("mean", normalize.mean), ("std", normalize.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.batches = 0
        """Batches seen since the run began."""
        self._prepared_step = -1
        self._channels_last = allows_channels_last(method)

    def train_dataloader(self) -> DataLoader[Any]:
        seed, trainer = self.settings.given.seed, self.trainer
        order = EpochOrder(len(self.dataset), self.batch_size, seed, trainer.global_rank, trainer.world_size)
        order.resume(self.batches)
        # a generator of its own: else every epoch would draw from torch's default one
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            self.dataset, batch_sampler=order, collate_fn=collate, generator=generator, **self.loader_args
        )  # type: ignore[arg-type]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        words = np.random.SeedSequence([self.settings.given.seed, self.batches, self.global_rank]).generate_state(
            1, np.uint64
        )
        torch.manual_seed(int(words[0] >> np.uint64(1)))
        self.batches += 1
        step = self.global_step
        if step != self._prepared_step:
            self._prepared_step = step
            self.method.before_step(step)
        results = self.method.loss(self.floats(batch.finished()), step)
        count = len(batch.names)
        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        self.log("lr", rate, prog_bar=True, logger=False, batch_size=count)  # LearningRateMonitor logs it
        self.log("train_loss", torch.as_tensor(results["loss"]).detach(), prog_bar=True, batch_size=count)
        others = {name: torch.as_tensor(value) for name, value in results.items() if name != "loss"}
        self.log_dict(others, batch_size=count)
        return results["loss"]  # type: ignore[return-value]

    def floats(self, views: list[Tensor]) -> list[Tensor]:
        """Normalised views, in the type of the weights."""
        normalised = [((to_unit(view, None) - self.mean) / self.std).to(self.dtype) for view in views]
        return list(map(in_fastest_layout, normalised)) if self._channels_last else normalised

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.method.after_backward(self.global_step)
        for group in optimizer.param_groups:
            group["weight_decay"] = self.method.weight_decay(group["first_weight_decay"], self.global_step)
        begin_momentum(optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optim, run = self.settings.optim, self.method.run
        lr = self.settings.rule.scaled(optim.lr, run.batch_size)
        groups = self.method.parameter_groups(optim.weight_decay)
        for group in groups:
            group["lr"] = lr * group.pop("lr_scale", 1.0)
            group["first_weight_decay"] = group.get("weight_decay", optim.weight_decay)
        fused = self.fused and can_fuse(p for group in groups for p in group["params"])
        optimizer = optim.make(groups, lr, fused)
        usual = round(min(10 / max(self.settings.epochs, 1), 0.1) * run.steps)  # of what max_steps leaves
        warmup_steps = self.method.warmup_steps(usual)
        scheduler = warmup_and_cosine(optimizer, warmup_steps, run.steps, self.settings.method.optim.end)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        given = self.settings.given
        wrapper: Any = self.method.exported().wrapped_model
        wrapped, model = self._prefix(wrapper), self._prefix(wrapper.get_model())
        checkpoint[KEY] = {
            "version": widefield.__version__,
            "method": given.method,
            "batches": self.batches,
            "batches_per_epoch": self.batches_per_epoch,
            "wrapped_model": wrapped,
            "model": model,
            "embed_head": self._prefix(self.method.exported().embed_head),
            "named_model": named_model(given.model, given.model_args),
            "settings": self._kept_settings(),
            "transforms": {
                name: value
                for name, value in asdict(self.settings.transforms).items()
                if name in ("image_size", "num_channels", "value_range", "normalize")
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = checkpoint[KEY]["batches"]

    def _prefix(self, module: nn.Module) -> str | None:
        """Return the beginning of the names of the weights of `module` in our state dict; None if it is no part of us."""
        return next((f"{name}." for name, part in self.named_modules() if part is module), None)

    def check_resumed(self, found: Checkpoint) -> None:
        """Raises ValueError unless this run can go on with `found`: settings and weights must be those of the run that wrote it."""
        before, batches = found.about["batches_per_epoch"], self.batches_per_epoch
        if before != batches:
            raise ValueError(
                f"the run had {before} batches in an epoch, and with these data and batch_size there are {batches}; resume "
                "with those of the run"
            )
        known = found.about.get("settings", {})
        changed = [
            f"  {name} was {known[name]!r} and is {value!r}"
            for name, value in self._kept_settings().items()
            if name in known and known[name] != value
        ]
        if changed:
            raise ValueError(
                "\n".join([f"{found.path} is of a run with other arguments:", *changed])
                + "\nresume with those of the run, or begin a new run with its weights: checkpoint=..., and another out"
            )
        there, here = (
            {name: f"of shape {tuple(value.shape)}" for name, value in state.items() if isinstance(value, Tensor)}
            for state in (found.state, self.state_dict())
        )
        names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
        if names:
            first = names[0]
            raise ValueError(
                f"{found.path} is of another model, or of a method with other method_args: {len(names)} weights differ, such "
                f"as {first}, {there.get(first, 'missing')} there and {here.get(first, 'missing')} here; resume with those of "
                "the run"
            )

    def _kept_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must keep: another value would be ignored, or spoil schedules."""
        settings = self.settings
        return {
            "images": len(self.dataset),
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": settings.given.gradient_accumulation_steps,
            "seed": settings.given.seed,
            "embed_dim": settings.given.embed_dim,
            "optim": settings.optim.name,
            "optim_args": asdict(settings.optim),
            "lr_scale": [settings.rule.lr_scale_method, settings.rule.reference_batch_size],
            "transform_args": asdict(settings.transforms),
            "method_args": {
                name: value
                for name, value in settings.method_args.items()
                if value is None or isinstance(value, (bool, int, float, str))  # others are objects
            },
        }
