"""LeJEPA."""

from collections.abc import Sequence

import torch
from lightly.loss import LeJEPALoss
from lightly.models.modules.heads import LeJEPAProjectionHead
from torch import Tensor

from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, Method, Run, Weight, for_each
from widefield.pretraining.methods.dino import DINO
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim


@METHODS.register_module("lejepa")
class LeJEPA(Method):
    """All views come near to the mean of the global ones, and embeddings near to a normal distribution; no copy, no queue.

    Balestriero and LeCun, LeJEPA, https://arxiv.org/abs/2511.08544: `weight` times SIGReg of all projections, the distance of
    their characteristic functions along random directions from that of the normal distribution, plus (1 - `weight`) times their
    mean squared distance from the mean of the global views.

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the projection head, and of what it makes.
        weight: Of SIGReg, from 0 to 1.
        directions: Random directions of a step.
    """

    transforms = DINO.transforms
    optim = Optim((AdamW(5e-4, weight_decay=0.05), SGD(0.03, 0.9, 1e-4), LARS(0.3, 0.9, 1e-6)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        output_dim: Count = 64,
        weight: Weight = 0.05,
        directions: Count = 1024,
    ) -> None:
        super().__init__(embedding, run)
        self.head = LeJEPAProjectionHead(run.embedding_dim, hidden_dim, output_dim)
        self.criterion = LeJEPALoss(weight, gather_distributed=True, sigreg_num_vectors=directions)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        projected = for_each(views, lambda images: self.head(self.embedding.vectors(images)))
        whole = torch.stack(projected[:2])
        # without local views the global ones take their part
        local = torch.stack(projected[2:]) if len(projected) > 2 else whole
        return {"loss": self.criterion(local_proj=local, global_proj=whole)}
