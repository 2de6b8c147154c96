"""DenseCL."""

from collections.abc import Sequence

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import DenseCLProjectionHead
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import select_most_similar
from torch import Tensor
from torch.nn import functional as F

from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import (
    Count,
    Method,
    Run,
    Share,
    Temperature,
    Weight,
    follow,
    momentum_copy,
    persistent_queue,
    queue_size,
)
from widefield.pretraining.methods.moco import MoCo


@METHODS.register_module("densecl")
class DenseCL(Method):
    """MoCo, and the same for every position of the map, whose partner is the most similar position of the other view.

    Wang et al., Dense contrastive learning for self-supervised visual pre-training, https://arxiv.org/abs/2011.09157

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the two projection heads, and of what they make.
        temperature: Of the similarities.
        momentum: Of the moving copy.
        dense_weight: Share of the loss of positions.
        queue_size: Images that are remembered; None: a power of two of at most half the images, at most 65536.
    """

    transforms = MoCo.transforms
    optim = MoCo.optim
    most_views = 2
    takes_local_views = False

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        output_dim: Count = 128,
        temperature: Temperature = 0.2,
        momentum: Share = 0.999,
        dense_weight: Weight = 0.5,
        queue_size: Count | None = None,
    ) -> None:
        super().__init__(embedding, run)
        self.momentum, self.temperature, self.dense_weight = momentum, temperature, dense_weight
        self.head = DenseCLProjectionHead(run.embedding_dim, hidden_dim, output_dim)
        self.dense_head = DenseCLProjectionHead(embedding.channels, hidden_dim, output_dim)
        self.key_embedding = momentum_copy(embedding)
        self.key_head, self.key_dense_head = momentum_copy(self.head), momentum_copy(self.dense_head)
        size = _size(queue_size, run.dataset_size, 65536), output_dim
        self.criterion = NTXentLoss(temperature, size, gather_distributed=True)
        self.dense_queue = MemoryBankModule(size, gather_distributed=True)
        persistent_queue(self.criterion.memory_bank)
        persistent_queue(self.dense_queue)

    def before_step(self, step: int) -> None:
        pairs = [
            (self.embedding, self.key_embedding),
            (self.head, self.key_head),
            (self.dense_head, self.key_dense_head),
        ]
        follow(pairs, self.momentum)

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
        _, others = self.dense_queue(F.normalize(keys.mean(1), dim=-1), update=query.requires_grad)
        positive = (query * partner).sum(-1, keepdim=True)
        logits = torch.cat([positive, query @ others], dim=-1).flatten(0, 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def _project(
    embedding: EmbeddingModel, head: torch.nn.Module, dense_head: torch.nn.Module, view: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The projected whole (B, D), the positions of the map (B, N, C), and those projected (B, N, D)."""
    features = embedding.features(view)
    positions = embedding.maps(features).flatten(2).transpose(1, 2)
    projected = dense_head(positions.flatten(0, 1)).unflatten(0, positions.shape[:2])
    return head(embedding.pooled(features).flatten(1)), positions.detach(), projected


_size = queue_size  # the argument has the same name
