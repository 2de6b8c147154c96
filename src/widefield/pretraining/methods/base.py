"""The base class of methods of pretraining, and what several of them use."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn

from widefield.components.losses.embedding_losses import joint
from widefield.components.models.contrastive_models import enqueue
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim, OptimArgs, parameter_groups
from widefield.pretraining.transform_args import Normalize, TransformArgs
from widefield.registry import Range

Auto = Literal["auto"]
Count = Annotated[int, Range(1)]
Steps = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Temperature = Annotated[float, Range(1e-4)]


@dataclass(frozen=True)
class Run:
    """Facts of the run that a method is made for.

    Attributes:
        embedding_dim: Numbers in a pooled embedding.
        dataset_size: Images of an epoch.
        batch_size: Images of an optimizer step, over all processes and accumulated batches.
        steps: Optimizer steps of the whole run.
        normalize: Mean and standard deviation that views are normalised with.
    """

    embedding_dim: int
    dataset_size: int
    batch_size: int
    steps: int
    normalize: Normalize = field(default_factory=Normalize)


class Method(nn.Module):
    """One way to learn without labels: the views it sees, the modules it adds, its loss.

    Subclasses give `loss`; further keyword arguments of their constructor are what `method_args` may say.

    Attributes:
        transforms: The views, unless `transform_args` says otherwise.
        optim: The optimizer, unless `optim` and `optim_args` say otherwise.
        most_views: Global views that it can take; None: any number.
        takes_local_views: Whether it can take local ones beside.
        needs_transformer: The model must be a vision transformer, of which it hides patches.
        auto_steps: Steps of a run with epochs="auto"; None: as many as 100 epochs have.
        also_called, fixed: Arguments as users of LightlyTrain know them; see `widefield.pretraining.settings.values_for`.
        companions: Modules that never train: they go where the method goes, and stand in no checkpoint.

    Args:
        embedding: The model that is trained, with its embedding layer.
        run: What is known of the run.
    """

    component_kind = "method"
    transforms: ClassVar[TransformArgs] = TransformArgs()
    optim: ClassVar[Optim] = Optim((SGD(), AdamW(), LARS()))
    most_views: ClassVar[int | None] = None
    takes_local_views: ClassVar[bool] = True
    needs_transformer: ClassVar[bool] = False
    auto_steps: ClassVar[int | None] = None
    also_called: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {}

    def __init__(self, embedding: EmbeddingModel, run: Run) -> None:
        super().__init__()
        self.embedding = embedding
        self.run = run
        self.companions: tuple[nn.Module, ...] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for module in self.companions:
            module._apply(fn)
        return super()._apply(fn, recurse)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        """The loss of normalised views, each (B, C, height, width), under "loss"; other entries are logged.

        Args:
            views: In the order of `transforms`: global ones, then local ones.
            step: Optimizer steps done.
        """
        raise NotImplementedError

    @classmethod
    def optim_for(cls, optim: OptimArgs, wrapper: Any) -> OptimArgs:
        """Return `optim` with the weight decay that suits the model in `wrapper`, for a user who says none."""
        return optim

    def before_step(self, step: int) -> None:
        """Called once before every optimizer step, ahead of the losses that it accumulates."""

    def after_backward(self, step: int) -> None:
        """Called before the optimizer uses the gradients."""

    def exported(self) -> EmbeddingModel:
        """The model that is exported."""
        return self.embedding

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups for the optimizer; a group's learning rate is the run's times its "lr_scale", if it has one.

        All of the model is in them, so that a part that is frozen at the start trains once it requires gradients.
        """
        return parameter_groups(self, weight_decay, frozen=list(self.embedding.parameters()))

    def weight_decay(self, start: float, step: int) -> float:
        """Weight decay of a group that begins with `start`, after so many optimizer steps."""
        return start

    def warmup_steps(self, usual: int) -> int:
        """Return the steps in which the learning rate rises; `usual` are 10 epochs, at most a tenth of the run."""
        return usual


class PairMethod(Method):
    """A method that compares two global views of each image."""

    most_views = 2
    takes_local_views = False


def for_run(momentum: float, steps: int) -> float:
    """`momentum`, but less in a run of few steps, so that a copy remembers no more than the last tenth of it.

    A copy remembers 1 / (1 - momentum) steps. At 0.99, rising to 1, it would after 160 steps still be by 45 % the untrained model.
    """
    return max(0.0, min(momentum, 1 - 10 / max(steps, 1)))


class Queue(MemoryBankModule):
    """lightly's memory bank of keys of all processes, which stands in checkpoints and goes on at its beginning where it ends.

    Args:
        size: Keys.
        dim: Width of a key.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__((size, dim))
        for name in ("bank", "bank_ptr"):
            self.register_buffer(name, getattr(self, name), persistent=True)

    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        enqueue(self.bank, self.bank_ptr, joint(batch))


def queue_length(size: int | Literal["auto"], dataset_size: int, largest: int) -> int:
    """`size`, or if that is "auto" a power of two of at most half the images.

    Raises:
        ValueError: The queue would hold more than all images.
    """
    if size == "auto":
        return min(largest, 2 ** max(0, int(math.log2(max(1, dataset_size // 2)))))
    if not 0 < size < dataset_size:
        raise ValueError(f"queue_size={size} must be above 0 and below the number of images, {dataset_size}")
    return size


def for_each(views: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return what `function` makes of each of `views`; neighbours of one size go through it as one batch."""
    results: list[Tensor] = []
    for _, group in itertools.groupby(views, key=lambda view: view.shape):
        same_size = list(group)
        results += function(torch.cat(same_size)).chunk(len(same_size))
    return results
