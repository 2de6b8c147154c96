"""Recall of retrieval."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from widefield.components.errors import WrongArgumentError
from widefield.components.metrics import METRICS
from widefield.components.metrics.ranking import ranked_relevance


@METRICS.register_module()
class RetrievalRecall(Metric):
    """Percent of queries with a relevant item among the first k, `retrieval/Recall@k`.

    It is a rate of hits: more relevant items among the k do not count.

    Args:
        topk: For which k.
    """

    full_state_update = False
    higher_is_better = True
    hits: Tensor
    queries: Tensor

    def __init__(self, topk: int | Sequence[int]) -> None:
        super().__init__()
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise WrongArgumentError(f"topk={topk} must be positive")
        self.add_state("hits", torch.zeros(len(self.topk), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("queries", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor | Sequence[Tensor]) -> None:
        """Count a batch of queries.

        Args:
            preds: Similarities (N, M) to the items of the gallery, or rankings, integers (N, R): items, the best first.
            target: Relevance (N, M), or the relevant items of each query, N tensors of indices.
        """
        relevant, _ = ranked_relevance(preds, target, max(self.topk))
        self.hits += torch.stack([relevant[:, :k].any(dim=1).sum() for k in self.topk])
        self.queries += len(preds)

    def compute(self) -> dict[str, Tensor]:
        """The rates by name."""
        percent = 100 * self.hits / self.queries
        return {f"retrieval/Recall@{k}": percent[i] for i, k in enumerate(self.topk)}
