"""Learning from several views of an image without a queue: SimSiam, BYOL, Barlow Twins, MoCo v3 and SwAV.

The steps that the methods of `widefield.pretraining` have too, `follow`, `rising` and the losses, are theirs.
"""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from widefield.components.data_sample import DataSample
from widefield.components.losses.embedding_losses import SwAVLoss
from widefield.components.models.base_model import BaseSelfSupervisor
from widefield.components.models.contrastive_models import follow, momentum_copy, rising, two_views
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


class SiameseModel(BaseSelfSupervisor):
    """A model that projects each view by backbone and neck; the head has the loss."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._require("neck", "head")

    def project(self, view: Tensor) -> Tensor:
        """Return projections (N, D) of images (N, C, H, W)."""
        projected: Tensor = self.neck(self.backbone(view))[0]
        return projected


@MODELS.register_module()
class SimSiam(SiameseModel):
    """SimSiam: what a predictor makes of one view is compared with the other view, which gets no gradient, and the other way round.

    Chen and He, 2020, https://arxiv.org/abs/2011.10566, algorithm 1. The parts: any backbone, NonLinearNeck, LatentPredictHead.
    """

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of two views, in a list, each (N, C, H, W)."""
        first, second = map(self.project, two_views(inputs))
        return {"loss": 0.5 * (self.head.loss(first, second) + self.head.loss(second, first))}


@MODELS.register_module()
class BarlowTwins(SiameseModel):
    """Barlow Twins: the cross-correlation of the two views' projections becomes the identity.

    Zbontar et al., 2021, https://arxiv.org/abs/2103.03230. The parts: any backbone, NonLinearNeck, LatentCrossCorrelationHead.
    """

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of two views, in a list, each (N, C, H, W)."""
        return {"loss": self.head.loss(*map(self.project, two_views(inputs)))}


class MomentumEncoder(nn.Module):
    """A copy of backbone and neck, whose weights follow theirs more and more slowly.

    Attributes:
        steps: How often they followed.

    Args:
        backbone, neck: What is copied.
    """

    steps: Tensor

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.module = momentum_copy(nn.Sequential(backbone, neck))
        self.register_buffer("steps", torch.tensor(0))

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        """Return projections (N, D) of images (N, C, H, W)."""
        projected: Tensor = self.module(view)[0]
        return projected


class MomentumModel(SiameseModel):
    """A model with a copy that follows: of the weights of the copy, `base_momentum` is taken from the model at each step.

    In training, at each call of `loss`, the copy moves first; in the course of the run its share falls to 0 as half a cosine.

    Args:
        base_momentum: The share at first.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    copy_name: ClassVar[str]
    """The attribute that holds the copy."""
    factor: ClassVar[float] = 1.0
    """The loss is this times the sum of the losses of both views."""
    _trainer: Any  # Lightning's; mypy does not see it

    def __init__(self, base_momentum: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= base_momentum <= 1:
            raise WrongArgumentError(f"base_momentum={base_momentum} must be from 0 to 1")
        self.base_momentum = base_momentum
        self.add_module(self.copy_name, MomentumEncoder(self.backbone, self.neck))

    def init_weights(self) -> None:
        """Initialise the weights; the copy begins as one."""
        super().init_weights()
        self._follow(0.0)

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of two views, in a list, each (N, C, H, W)."""
        first, second = two_views(inputs)
        copy: Any = self.get_submodule(self.copy_name)
        projected = self.project(first), self.project(second)
        if self.training:
            steps = int(copy.steps)
            self._follow(rising(steps, self._steps_of_run(), 1 - self.base_momentum) if steps else 0.0)
            copy.steps.add_(1)
        targets = copy(first), copy(second)
        losses = self.head.loss(projected[0], targets[1]), self.head.loss(projected[1], targets[0])
        return {"loss": self.factor * (losses[0] + losses[1])}

    def _follow(self, momentum: float) -> None:
        copy: Any = self.get_submodule(self.copy_name)
        follow([(nn.ModuleList([self.backbone, self.neck]), copy.module)], momentum)

    def _steps_of_run(self) -> float:
        if self._trainer is None:
            return float("inf")
        return float(self._trainer.estimated_stepping_batches * self._trainer.accumulate_grad_batches)


@MODELS.register_module()
class BYOL(MomentumModel):
    """BYOL: predicts what a slowly moving copy says of the other view.

    Grill et al., 2020, https://arxiv.org/abs/2006.07733. The parts: any backbone, NonLinearNeck, LatentPredictHead.

    Args:
        base_momentum: See `MomentumModel`; 0.004 is called 0.996 in the paper.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    copy_name = "target_net"
    factor = 2.0

    def __init__(self, base_momentum: float = 0.004, **kwargs: Any) -> None:
        super().__init__(base_momentum, **kwargs)


@MODELS.register_module()
class MoCoV3(MomentumModel):
    """MoCo v3: finds the other view of an image, as a slowly moving copy sees it, among those of the batch.

    Chen et al., 2021, https://arxiv.org/abs/2104.02057. The parts: any backbone, such as MoCoV3ViT, NonLinearNeck, MoCoV3Head.

    Args:
        base_momentum: See `MomentumModel`; 0.01 is called 0.99 in the paper.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    copy_name = "momentum_encoder"

    def __init__(self, base_momentum: float = 0.01, **kwargs: Any) -> None:
        super().__init__(base_momentum, **kwargs)


@MODELS.register_module()
class SwAV(SiameseModel):
    """SwAV: predicts to which prototypes the other crops of an image are assigned.

    Caron et al., 2020, https://arxiv.org/abs/2006.09882. The parts: any backbone, SwAVNeck, SwAVHead. A queue of earlier features
    is an argument of SwAVLoss.

    Args:
        epoch_queue_starts: The epoch, from 0, in which the queue begins to be filled.
        frozen_layers_cfg: For how many steps of the optimizer parameters do not train, by parts of their names:
            `{prototypes: 5005}`.
        kwargs: Those of `BaseSelfSupervisor`.
    """

    _trainer: Any  # Lightning's; mypy does not see it
    current_epoch: int
    global_step: int

    def __init__(
        self, epoch_queue_starts: int = 0, frozen_layers_cfg: dict[str, int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.epoch_queue_starts = epoch_queue_starts
        self.frozen_layers_cfg = frozen_layers_cfg or {}
        for part in self.frozen_layers_cfg:
            if not any(part in name for name, _ in self.named_parameters()):
                raise WrongArgumentError(f"frozen_layers_cfg: no parameter has {part!r} in its name")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Leave parameters without a gradient for as long as they are frozen."""
        for part, steps in self.frozen_layers_cfg.items():
            if self.global_step < steps:
                for name, parameter in self.named_parameters():
                    if part in name:
                        parameter.grad = None

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of crops, a list of images (N, C, H, W); those of one size stand together."""
        if isinstance(inputs, Tensor) or len(inputs) < 2:
            raise WrongArgumentError(
                "SwAV compares crops of each image, and there is one; give a list, as MultiView does"
            )
        criterion = self.head.loss_module
        if isinstance(criterion, SwAVLoss) and self._trainer is not None:
            criterion.has_begun = hasattr(criterion, "queue") and self.current_epoch >= self.epoch_queue_starts
        sizes = [list(crops) for _, crops in itertools.groupby(inputs, key=lambda crop: crop.shape[-2:])]
        features = [self.backbone(torch.cat(crops)) for crops in sizes]
        return {"loss": self.head.loss(self.neck(features))}
