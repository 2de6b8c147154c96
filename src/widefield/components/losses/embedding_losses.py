"""Losses of the embeddings of a batch as a whole, and not of one image each."""

from collections.abc import Sequence

import torch
from lightly.loss import SwaVLoss as LightlySwaVLoss
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor, nn

from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


def joint(batch: Tensor) -> Tensor:
    """Return the batches (N, ...) of all processes, one after the other, (N * processes, ...), with gradients.

    A loss of it, averaged over the processes as DistributedDataParallel does, has the gradient of one process on all of them. Each
    process has to bring as many rows.
    """
    return torch.cat(gather(batch.contiguous())) if world_size() > 1 else batch


@MODELS.register_module()
class CrossCorrelationLoss(nn.Module):
    """The distance of a cross-correlation matrix from the identity: sum of (1 - c_ii)^2 + lambd * sum of c_ij^2, i and j different.

    Zbontar et al., 2021 (Barlow Twins), https://arxiv.org/abs/2103.03230, equation 1.

    Args:
        lambd: The weight of what lies off the diagonal.
    """

    component_kind = "loss"

    def __init__(self, lambd: float = 0.0051) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, cross_correlation_matrix: Tensor) -> Tensor:
        """Return the loss of a matrix (D, D)."""
        on_diagonal = torch.eye(len(cross_correlation_matrix), device=cross_correlation_matrix.device)
        squares = (cross_correlation_matrix - on_diagonal) ** 2
        return (squares * (self.lambd + (1 - self.lambd) * on_diagonal)).sum()


@MODELS.register_module()
class SwAVLoss(nn.Module):
    """Predicts which prototypes the other crops of an image are assigned to, where a batch is assigned evenly to all prototypes.

    Caron et al., 2020, https://arxiv.org/abs/2006.09882. The loss and the assignment (Sinkhorn-Knopp) are lightly's; the batch is
    that of all processes. Prototypes are scaled to length 1 at each call.

    Attributes:
        queue: The last features (crops_for_assign, queue_length, feat_dim) of all processes, the newest first. In training it is
            filled, and once it is full the assignment is that of the batch and the queue together.
        has_begun: Whether the queue is filled and used.

    Args:
        feat_dim: Width of the features.
        sinkhorn_iterations: Iterations of the assignment.
        epsilon: Its temperature.
        temperature: Of the predictions.
        crops_for_assign: The crops that are assigned; the others are only predicted from.
        num_crops: Crops of each size.
        num_prototypes: How many there are.
        queue_length: Earlier features in the queue, at least as many as images in a batch of all processes, and as many in each
            process; 0 for no queue.
    """

    component_kind = "loss"
    queue: Tensor

    def __init__(
        self,
        feat_dim: int,
        sinkhorn_iterations: int = 3,
        epsilon: float = 0.05,
        temperature: float = 0.1,
        crops_for_assign: Sequence[int] = (0, 1),
        num_crops: Sequence[int] = (2,),
        num_prototypes: int = 3000,
        queue_length: int = 0,
    ) -> None:
        super().__init__()
        if queue_length < 0:
            raise WrongArgumentError(f"queue_length={queue_length} must not be negative")
        self.num_crops = sum(num_crops)
        self.crops_for_assign = tuple(crops_for_assign)
        if not self.crops_for_assign or not set(self.crops_for_assign) <= set(range(self.num_crops)):
            raise WrongArgumentError(
                f"crops_for_assign={list(crops_for_assign)} must be among the {self.num_crops} crops, from 0"
            )
        self.prototypes = nn.Linear(feat_dim, num_prototypes, bias=False)
        self.criterion = LightlySwaVLoss(temperature, sinkhorn_iterations, epsilon, sinkhorn_gather_distributed=True)
        self.has_begun = queue_length > 0
        if queue_length:
            self.register_buffer("queue", torch.zeros(len(self.crops_for_assign), queue_length, feat_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss of features (crops * N, feat_dim) of length 1, those of one crop of all images after those of another.

        Raises:
            WrongArgumentError: There are not as many for each crop, or more than the queue takes.
        """
        if len(x) % self.num_crops:
            raise WrongArgumentError(
                f"there are {len(x)} features for {self.num_crops} crops of each image; give num_crops as the views are"
            )
        with torch.no_grad():
            self.prototypes.weight.copy_(nn.functional.normalize(self.prototypes.weight, dim=1))
        scores = self.prototypes(x)
        crops = scores.to(torch.promote_types(scores.dtype, torch.float32)).chunk(self.num_crops)
        assigned = [crops[k] for k in self.crops_for_assign]
        others = [crop for k, crop in enumerate(crops) if k not in self.crops_for_assign]
        earlier = self._earlier(x.detach()) if self.has_begun and self.training else None
        loss: Tensor = self.criterion(assigned, others, earlier)[0]
        return loss

    @torch.no_grad()
    def _earlier(self, x: Tensor) -> list[Tensor] | None:
        """Return the scores of this process' share of the queue, if that is full, and put the features of the batch in front."""
        share = self.queue[:, rank() :: world_size()]
        scores = list(nn.functional.linear(share, self.prototypes.weight)) if bool(self.queue[:, -1].any()) else None
        crops = x.chunk(self.num_crops)
        for queue, k in zip(self.queue, self.crops_for_assign, strict=True):
            newest = joint(crops[k]).to(queue)
            if len(newest) > len(queue) or len(queue) % world_size():
                raise WrongArgumentError(
                    f"queue_length={len(queue)} must be at least {len(newest)}, the images of a batch, and a multiple of "
                    f"{world_size()}, the processes"
                )
            queue.copy_(torch.cat([newest, queue[: len(queue) - len(newest)]]))
        return scores
