"""SimCLR."""

from collections.abc import Sequence
from typing import Annotated

import torch
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import Tensor
from torch.nn import functional as F

from widefield.components.heads.self_supervised_heads import ContrastiveHead
from widefield.components.models.contrastive_models import compare_in_batch
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, PairMethod, Run, Temperature
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.registry import Range


@METHODS.register_module("simclr")
class SimCLR(PairMethod):
    """Tells two views of an image from the views of all other images of the batch.

    Chen et al., A simple framework for contrastive learning of visual representations, https://arxiv.org/abs/2002.05709

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the projection head, and of what it makes.
        num_layers: Of the head.
        batch_norm: Batch norm in the head.
        temperature: Of the similarities.
    """

    optim = Optim((SGD(0.3, 0.9, 1e-4), AdamW(1e-3, weight_decay=0.01), LARS(0.3, 0.9, 1e-6)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        output_dim: Count = 128,
        num_layers: Annotated[int, Range(2)] = 2,
        batch_norm: bool = True,
        temperature: Temperature = 0.1,
    ) -> None:
        super().__init__(embedding, run)
        self.head = SimCLRProjectionHead(run.embedding_dim, hidden_dim, output_dim, num_layers, batch_norm)
        self.criterion = ContrastiveHead(temperature=temperature)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        first, second = F.normalize(self.head(self.embedding.vectors(torch.cat(list(views))))).chunk(2)
        return {"loss": self.criterion.loss(*compare_in_batch(first, second))}
