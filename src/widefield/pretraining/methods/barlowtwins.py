"""Barlow Twins."""

from collections.abc import Sequence

from lightly.models.modules.heads import BarlowTwinsProjectionHead
from torch import Tensor

from widefield.components.heads.self_supervised_heads import LatentCrossCorrelationHead
from widefield.components.losses.embedding_losses import CrossCorrelationLoss
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, PairMethod, Run, Weight
from widefield.pretraining.methods.byol import ASYMMETRIC
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim


@METHODS.register_module("barlowtwins")
class BarlowTwins(PairMethod):
    """Makes the cross-correlation of the two views' embeddings the identity.

    Zbontar et al., Barlow Twins: self-supervised learning via redundancy reduction, https://arxiv.org/abs/2103.03230

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the projection head, and of what it makes.
        lambda_param: Weight of what lies off the diagonal.
    """

    transforms = ASYMMETRIC
    optim = Optim((LARS(0.2, 0.9, 1.5e-6), SGD(0.05, 0.9, 1e-4), AdamW(1e-3, weight_decay=0.01)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 8192,
        output_dim: Count = 8192,
        lambda_param: Weight = 5e-3,
    ) -> None:
        super().__init__(embedding, run)
        self.head = BarlowTwinsProjectionHead(run.embedding_dim, hidden_dim, output_dim)
        self.criterion = LatentCrossCorrelationHead(output_dim, CrossCorrelationLoss(lambda_param))

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        first, second = (self.head(self.embedding.vectors(view)) for view in views)
        return {"loss": self.criterion.loss(first, second)}
