"""VICReg."""

from collections.abc import Sequence

from lightly.loss import VICRegLoss
from lightly.models.modules.heads import VICRegProjectionHead
from torch import Tensor

from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, PairMethod, Run, Weight
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import ColorJitter, Solarize, TransformArgs


@METHODS.register_module("vicreg")
class VICReg(PairMethod):
    """Brings the views of an image together while every number of the embedding keeps its variance and none repeats another.

    Bardes et al., VICReg: variance-invariance-covariance regularization, https://arxiv.org/abs/2105.04906

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the projection head, and of what it makes.
        lambda_param, mu_param, nu_param: Weights of invariance, variance and covariance.
    """

    transforms = TransformArgs(color_jitter=ColorJitter(0.8, 1.0, 0.4, 0.4, 0.2, 0.1), solarize=Solarize(0.1))
    optim = Optim((LARS(0.3, 0.9, 1e-6), SGD(0.05, 0.9, 1e-4), AdamW(1e-3, weight_decay=0.01)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 8192,
        output_dim: Count = 8192,
        lambda_param: Weight = 25.0,
        mu_param: Weight = 25.0,
        nu_param: Weight = 1.0,
    ) -> None:
        super().__init__(embedding, run)
        self.head = VICRegProjectionHead(run.embedding_dim, hidden_dim, output_dim, num_layers=3)
        self.criterion = VICRegLoss(lambda_param, mu_param, nu_param, gather_distributed=True)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        first, second = (self.head(self.embedding.vectors(view)) for view in views)
        return {"loss": self.criterion(first, second)}
