"""Average precision of retrieval."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from widefield.components.errors import WrongArgumentError
from widefield.components.metrics import METRICS
from widefield.components.metrics.ranking import ranked_relevance


@METRICS.register_module()
class RetrievalAveragePrecision(Metric):
    """Mean over queries of the average precision of the first k items in percent, `retrieval/mAP@k`.

    The sum of the precisions at the relevant items among the k, divided by the number of all relevant items, also where k is
    smaller; 0 for a query without any.

    Args:
        topk: k; None takes the whole ranking, and the name is `retrieval/mAP`.
        mode: The precision at a relevant item ("IR"), or the mean of that and of the one before it ("integrate"), the trapezoidal
            rule (Philbin et al., 2007).
    """

    full_state_update = False
    higher_is_better = True
    precision: Tensor
    queries: Tensor

    def __init__(self, topk: int | None = None, mode: Literal["IR", "integrate"] = "IR") -> None:
        super().__init__()
        if topk is not None and topk < 1:
            raise WrongArgumentError(f"topk={topk} must be positive")
        if mode not in ("IR", "integrate"):
            raise WrongArgumentError(f"mode={mode!r} is not one of 'IR', 'integrate'")
        self.topk = topk
        self.mode = mode
        self.add_state("precision", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("queries", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor | Sequence[Tensor]) -> None:
        """Add a batch of queries.

        Args:
            preds: Similarities (N, M) to the items of the gallery, or rankings, integers (N, R): items, the best first.
            target: Relevance (N, M), or the relevant items of each query, N tensors of indices.
        """
        relevant, positives = ranked_relevance(preds, target, self.topk)
        rank = torch.arange(1, relevant.shape[1] + 1, device=preds.device)
        found = relevant.cumsum(1)
        precision = found / rank
        if self.mode == "integrate":
            before = (found - 1) / (rank - 1).clamp(min=1)
            before[:, :1] = 1
            precision = (precision + before) / 2
        self.precision += ((precision * relevant).sum(1) / positives.clamp(min=1)).sum()
        self.queries += len(preds)

    def compute(self) -> dict[str, Tensor]:
        """The mean by name."""
        name = "retrieval/mAP" if self.topk is None else f"retrieval/mAP@{self.topk}"
        return {name: 100 * self.precision / self.queries}
