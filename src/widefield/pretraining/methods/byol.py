"""BYOL."""

from collections.abc import Sequence

import torch
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from torch import Tensor

from widefield.components.losses.reconstruction_losses import CosineSimilarityLoss
from widefield.components.models.contrastive_models import follow, momentum_copy, rising
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, PairMethod, Run, Share
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import ColorJitter, GaussianBlur, SecondView, Solarize, TransformArgs

ASYMMETRIC = TransformArgs(
    color_jitter=ColorJitter(0.8, 1.0, 0.4, 0.4, 0.2, 0.1),
    gaussian_blur=GaussianBlur(1.0),
    global_view_1=SecondView(GaussianBlur(0.1), Solarize(0.2)),
)
"""The views of BYOL, which Barlow Twins has too."""


@METHODS.register_module("byol")
class BYOL(PairMethod):
    """Predicts what a slowly moving copy of the model says of the other view of the image.

    Grill et al., Bootstrap your own latent, https://arxiv.org/abs/2006.07733

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of projection and prediction head, and of what they make.
        momentum: Of the moving copy at the start; it rises to 1.
    """

    transforms = ASYMMETRIC
    optim = Optim((LARS(0.45, 0.9, 1e-6), SGD(0.05, 0.9, 1e-4), AdamW(1e-3, weight_decay=0.01)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 4096,
        output_dim: Count = 256,
        momentum: Share = 0.99,
    ) -> None:
        super().__init__(embedding, run)
        self.momentum = momentum
        self.projection = BYOLProjectionHead(run.embedding_dim, hidden_dim, output_dim)
        self.prediction = BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.target_embedding, self.target_projection = momentum_copy(embedding), momentum_copy(self.projection)
        self.criterion = CosineSimilarityLoss()

    def before_step(self, step: int) -> None:
        pairs = [(self.embedding, self.target_embedding), (self.projection, self.target_projection)]
        follow(pairs, rising(step, self.run.steps, self.momentum))

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        predicted = [self.prediction(self.projection(self.embedding.vectors(view))) for view in views]
        with torch.no_grad():
            targets = [self.target_projection(self.target_embedding.vectors(view)) for view in views]
        loss = self.criterion(predicted[0], targets[1]) + self.criterion(predicted[1], targets[0])
        return {"loss": loss, "schedule/momentum": rising(step, self.run.steps, self.momentum)}
