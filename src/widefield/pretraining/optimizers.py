"""Optimizers by name, and which weights decay."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from lightly.utils.lars import LARS as LightlyLARS
from lightly.utils.scheduler import cosine_warmup_schedule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from widefield.pretraining.settings import Checked, Count, NotNegative


@dataclass(frozen=True)
class _Optimizer(Checked):
    """The arguments of an optimizer."""

    name: ClassVar[str]
    kind: ClassVar[Any]
    takes_fused: ClassVar[bool] = True

    def make(self, groups: list[dict[str, Any]], lr: float, fused: bool = False) -> torch.optim.Optimizer:
        """Return the optimizer of parameter groups, with the learning rate `lr`.

        `fused` updates each weight in one pass, where there is such an update.
        """
        options = {**asdict(self), "lr": lr, **({"fused": fused or None} if self.takes_fused else {})}
        optimizer: torch.optim.Optimizer = self.kind(groups, **options)
        return optimizer


@dataclass(frozen=True)
class SGD(_Optimizer):
    """Stochastic gradient descent with momentum."""

    name = "sgd"
    kind = torch.optim.SGD
    lr: NotNegative = 0.1
    momentum: NotNegative = 0.9
    weight_decay: NotNegative = 1e-4


@dataclass(frozen=True)
class AdamW(_Optimizer):
    """Adam with decoupled weight decay."""

    name = "adamw"
    kind = torch.optim.AdamW
    lr: NotNegative = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    weight_decay: NotNegative = 0.01


@dataclass(frozen=True)
class AdamW8bit(AdamW):
    """The same with a state of 8 bits, by bitsandbytes."""

    name = "adamw8bit"
    takes_fused = False

    def make(self, groups: list[dict[str, Any]], lr: float, fused: bool = False) -> torch.optim.Optimizer:
        """Return the optimizer; ValueError if bitsandbytes is not installed."""
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            raise ValueError(
                "optim='adamw8bit' needs the package bitsandbytes, which is not installed; pip install 'widefield[adamw8bit]'"
            ) from error
        optimizer: torch.optim.Optimizer = kind(groups, **{**asdict(self), "lr": lr})
        return optimizer


@dataclass(frozen=True)
class LARS(_Optimizer):
    """SGD whose steps are scaled layer by layer (You et al., https://arxiv.org/abs/1708.03888), for large batches."""

    name = "lars"
    kind = LightlyLARS
    takes_fused = False
    lr: NotNegative = 0.2
    momentum: NotNegative = 0.9
    weight_decay: NotNegative = 1e-6
    dampening: NotNegative = 0.0
    nesterov: bool = False
    trust_coefficient: NotNegative = 0.001
    eps: NotNegative = 1e-8


OptimArgs = SGD | AdamW | LARS


def begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters of a fused SGD that get their first gradient a momentum of zero.

    torch's fused SGD (as of 2.15) raises TypeError if some parameters of a group have a momentum and others have none, as when a
    part is frozen in the first steps. From zero, the first momentum is the gradient, as without a fused update.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for parameter in group["params"]:
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    """Return True if torch's fused updates on the CPU are right for these parameters.

    They take a parameter and its gradient for arrays of one layout, but the gradient of a parameter with gaps in memory, such as a
    slice of a tensor, has none.
    """
    return all(torch.empty_like(p, device="meta").stride() == p.stride() for p in parameters)


@dataclass(frozen=True)
class Optim:
    """Settings by which a method is optimised unless the user says otherwise.

    Attributes:
        choices: Every optimizer that can be named, with the method's values for it; the first is the default.
        reference_batch_size: The batch size that their learning rates are for.
        lr_scale_method: How the learning rate grows with the batch: as batch / reference, or as its square root.
        gradient_clip_val: Largest norm of the gradient; None leaves it.
        end: Share of the learning rate that is left at the end of the run; 1 keeps it constant after the warm-up.
    """

    choices: tuple[OptimArgs, ...]
    reference_batch_size: Count = 256
    lr_scale_method: Literal["linear", "sqrt"] = "linear"
    gradient_clip_val: NotNegative | None = None
    end: float = 0.001

    def named(self, name: str) -> OptimArgs | None:
        """Return the values for the optimizer called `name` or "auto"; None if there is none of the name."""
        if name == AdamW8bit.name:
            return next((AdamW8bit(**asdict(one)) for one in self.choices if isinstance(one, AdamW)), None)
        return next((one for one in self.choices if name in ("auto", one.name)), None)

    def scaled(self, lr: float, batch_size: int) -> float:
        """Return the learning rate for batches of `batch_size`."""
        ratio = batch_size / self.reference_batch_size
        return lr * (ratio if self.lr_scale_method == "linear" else ratio**0.5)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    scale: Callable[[nn.Parameter], float] = lambda parameter: 1.0,
    frozen: Collection[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Return the parameters of `module` that train, in groups: those that decay and those that do not, for each learning rate.

    Biases, the weights of norm layers, scales per channel, tokens and embeddings of positions do not decay.

    Args:
        module: Its parameters that require a gradient.
        weight_decay: Of those that decay.
        scale: Factor of a parameter's learning rate, which its group has as "lr_scale".
        frozen: Parameters of `module` that are taken even if they require no gradient yet.
    """
    groups: dict[str, dict[str, Any]] = {}
    later = {id(p) for p in frozen}
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad or id(p) in later]
    for decays, kind in ((True, "params"), (False, "params_no_weight_decay")):
        for parameter in (p for name, p in named if _decays(name, p) == decays):
            factor = scale(parameter)
            name = kind if factor == 1 else f"{kind}_lr_{factor:.4g}"
            new = {"name": name, "params": [], "weight_decay": weight_decay * decays, "lr_scale": factor}
            groups.setdefault(name, new)["params"].append(parameter)
    return list(groups.values())


def _decays(name: str, parameter: nn.Parameter) -> bool:
    per_channel = parameter.ndim <= 1 or all(n == 1 for n in parameter.shape[1:])
    last = name.rpartition(".")[2]
    return not (per_channel or last == "bias" or "token" in last or "pos_embed" in last)


def warmup_and_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int, end: float = 0.001) -> LambdaLR:
    """Return a schedule that warms up linearly, then goes down to the share `end` as a cosine, step by step."""

    def scale(step: int) -> float:
        return cosine_warmup_schedule(
            min(step, steps), max(steps, 1), 1.0, end, warmup_steps=min(warmup_steps, steps), warmup_start_value=0.0
        )

    return LambdaLR(optimizer, scale)
