"""MoCo."""

from collections.abc import Sequence

import torch
from lightly.models.modules.heads import MoCoProjectionHead
from torch import Tensor
from torch.nn import functional as F

from widefield.components.heads.self_supervised_heads import ContrastiveHead
from widefield.components.models.contrastive_models import compare_with_queue, follow, momentum_copy
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Auto, Count, PairMethod, Queue, Run, Share, Temperature, queue_length
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import ColorJitter, RandomResize, TransformArgs


class QueueLoss(ContrastiveHead):
    """InfoNCE of queries and keys against a queue of earlier keys.

    Args:
        temperature: Similarities are divided by it.
        size, dim: Keys in the queue, and their width.
    """

    def __init__(self, temperature: float, size: int, dim: int) -> None:
        super().__init__(temperature=temperature)
        self.memory_bank = Queue(size, dim)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the loss of queries (N, D) and keys (N, D), which join the queue if queries have gradients."""
        query, key = F.normalize(query), F.normalize(key)
        _, queue = self.memory_bank(key, update=query.requires_grad)
        return self.loss(*compare_with_queue(query, key, queue))


@METHODS.register_module("moco")
class MoCo(PairMethod):
    """Tells a view of an image from a queue of other images, as a slowly moving copy of the model sees them.

    Chen et al., Improved baselines with momentum contrastive learning (version 2), https://arxiv.org/abs/2003.04297.
    Batches are not shuffled among processes: norm layers are synchronised, so that none can tell what it saw together.

    Args:
        embedding, run: See `Method`.
        hidden_dim, output_dim: Width of the projection head, and of what it makes.
        temperature: Of the similarities.
        momentum: Of the moving copy.
        queue_size: Images that are remembered; "auto": a power of two of at most half the images, at most 65536.
    """

    transforms = TransformArgs(
        random_resize=RandomResize(0.2, 1.0), color_jitter=ColorJitter(0.8, 1.0, 0.4, 0.4, 0.4, 0.1)
    )
    optim = Optim((SGD(0.03, 0.9, 1e-4), AdamW(1e-3, weight_decay=0.01), LARS(0.3, 0.9, 1e-6)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        output_dim: Count = 128,
        temperature: Temperature = 0.2,
        momentum: Share = 0.999,
        queue_size: Count | Auto = "auto",
    ) -> None:
        super().__init__(embedding, run)
        self.momentum = momentum
        self.head = MoCoProjectionHead(run.embedding_dim, hidden_dim, output_dim)
        self.key_embedding, self.key_head = momentum_copy(embedding), momentum_copy(self.head)
        self.criterion = QueueLoss(temperature, queue_length(queue_size, run.dataset_size, 65536), output_dim)

    def before_step(self, step: int) -> None:
        follow([(self.embedding, self.key_embedding), (self.head, self.key_head)], self.momentum)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        query = self.head(self.embedding.vectors(views[0]))
        with torch.no_grad():
            key = self.key_head(self.key_embedding.vectors(views[1]))
        return {"loss": self.criterion(query, key)}
