"""DenseCL."""

from collections.abc import Sequence
from typing import Any

import torch
from lightly.models.modules.heads import DenseCLProjectionHead
from lightly.models.utils import select_most_similar
from torch import Tensor
from torch.nn import functional as F

from widefield.components.models.contrastive_models import compare_with_queue, follow, momentum_copy
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, Queue, Run, Weight
from widefield.pretraining.methods.moco import MoCo


@METHODS.register_module("densecl")
class DenseCL(MoCo):
    """MoCo, and the same for every position of the map, whose partner is the most similar position of the other view.

    Wang et al., Dense contrastive learning for self-supervised visual pre-training, https://arxiv.org/abs/2011.09157

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the two projection heads, and of what they make.
        dense_weight: Share of the loss of positions.
        kwargs: Those of `MoCo`.
    """

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        output_dim: Count = 128,
        dense_weight: Weight = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(embedding, run, hidden_dim, output_dim, **kwargs)
        self.dense_weight = dense_weight
        self.dense_head = DenseCLProjectionHead(embedding.channels, hidden_dim, output_dim)
        self.key_dense_head = momentum_copy(self.dense_head)
        self.dense_queue = Queue(len(self.criterion.memory_bank.bank), output_dim)

    def before_step(self, step: int) -> None:
        super().before_step(step)
        follow([(self.dense_head, self.key_dense_head)], self.momentum)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        query, query_map, query_dense = _project(self.embedding, self.head, self.dense_head, views[0])
        with torch.no_grad():
            key, key_map, key_dense = _project(self.key_embedding, self.key_head, self.key_dense_head, views[1])
            partner = select_most_similar(query_map, key_map, key_dense)
        whole, dense = self.criterion(query, key), self._dense_loss(query_dense, partner, key_dense)
        weight = self.dense_weight
        return {
            "loss": (1 - weight) * whole + weight * dense,
            "train_loss/global": whole.detach(),
            "train_loss/dense": dense.detach(),
        }

    def _dense_loss(self, query: Tensor, partner: Tensor, keys: Tensor) -> Tensor:
        """Cross-entropy of every position (B, N, D) with its partner among means of other images, formula (2) of the paper."""
        query, partner = F.normalize(query, dim=-1), F.normalize(partner, dim=-1)
        _, queue = self.dense_queue(F.normalize(keys.mean(1), dim=-1), update=query.requires_grad)
        return self.criterion.loss(*compare_with_queue(query.flatten(0, 1), partner.flatten(0, 1), queue))


def _project(
    embedding: EmbeddingModel, head: torch.nn.Module, dense_head: torch.nn.Module, view: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The projected whole (B, D), the positions of the map (B, N, C), and those projected (B, N, D)."""
    features = embedding.features(view)
    positions = embedding.maps(features).flatten(2).transpose(1, 2)
    projected = dense_head(positions.flatten(0, 1)).unflatten(0, positions.shape[:2])
    return head(embedding.pooled(features).flatten(1)), positions.detach(), projected
