"""Metrics of rankings of a gallery."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from widefield.components.metrics import METRICS
from widefield.components.metrics.classification_metrics import MeanMetric, as_topk
from widefield.errors import WrongArgumentError


class RankingMetric(MeanMetric):
    """A mean over queries; a subclass writes `_values`.

    Args:
        names: Of the means.
        prefix: What their names begin with, before a slash.
        depth: Rank to look at; None looks at all.
        dtype: Of the sums.
    """

    def __init__(
        self, names: Sequence[str], prefix: str | None, depth: int | None, dtype: torch.dtype = torch.long
    ) -> None:
        super().__init__(names, prefix or "retrieval", dtype)
        self.depth = depth

    def update(self, preds: Tensor, target: Tensor | Sequence[Tensor]) -> None:
        """Add a batch of queries.

        Args:
            preds: Similarities (N, M) to the items of the gallery, or rankings, integers (N, R): items, the best first.
            target: Relevance (N, M), or the relevant items of each query, N tensors of indices.

        Raises:
            WrongArgumentError: Shapes that do not fit.
        """
        if preds.ndim != 2 or len(target) != len(preds):
            raise WrongArgumentError(
                f"predictions have the shape {tuple(preds.shape)}, and there are {len(target)} targets; "
                "give similarities (N, M) or rankings (N, R), and targets of N queries"
            )
        ranking = preds[:, : self.depth]
        if preds.is_floating_point():
            items = preds.shape[1]
            ranking = preds.topk(items if self.depth is None else min(self.depth, items), dim=1).indices
        if isinstance(target, Tensor) and target.ndim == 2:
            relevant, positives = (target > 0).gather(1, ranking), (target > 0).sum(1)
        else:
            indices = [torch.as_tensor(one, device=preds.device).reshape(-1).unique() for one in target]
            relevant = torch.stack([torch.isin(row, one) for row, one in zip(ranking, indices, strict=True)])
            positives = torch.tensor([len(one) for one in indices], device=preds.device)
        self._add(self._values(relevant, positives))

    def _values(self, relevant: Tensor, positives: Tensor) -> Tensor:
        """Return numbers (N, names) of N queries.

        Args:
            relevant: Which of the first items of each ranking are relevant (N, R).
            positives: How many are in the whole gallery (N,).
        """
        raise NotImplementedError


@METRICS.register_module()
class RetrievalRecall(RankingMetric):
    """Percent of queries with a relevant item among the first k, `retrieval/Recall@k`.

    It is a rate of hits: more relevant items among the k do not count.

    Args:
        topk: For which k.
        prefix: What the names begin with instead of "retrieval".
    """

    def __init__(self, topk: int | Sequence[int], prefix: str | None = None) -> None:
        self.topk = as_topk(topk)
        super().__init__([f"Recall@{k}" for k in self.topk], prefix, max(self.topk))

    def _values(self, relevant: Tensor, positives: Tensor) -> Tensor:
        return torch.stack([relevant[:, :k].any(dim=1) for k in self.topk], dim=1)


@METRICS.register_module()
class RetrievalAveragePrecision(RankingMetric):
    """Mean over queries of the average precision of the first k items in percent, `retrieval/mAP@k`.

    The sum of the precisions at the relevant items among the k, divided by the number of all relevant items, also where k is
    smaller; 0 for a query without any.

    Args:
        topk: k; None takes the whole ranking, and the name is `retrieval/mAP`.
        mode: The precision at a relevant item ("IR"), or the mean of that and of the one before it ("integrate"), the trapezoidal
            rule (Philbin et al., 2007).
        prefix: What the names begin with instead of "retrieval".
    """

    def __init__(
        self, topk: int | None = None, mode: Literal["IR", "integrate"] = "IR", prefix: str | None = None
    ) -> None:
        if mode not in ("IR", "integrate"):
            raise WrongArgumentError(f"mode={mode!r} is not one of 'IR', 'integrate'")
        self.topk = None if topk is None else as_topk(topk)[0]
        self.mode = mode
        super().__init__(["mAP" if topk is None else f"mAP@{topk}"], prefix, topk, torch.float32)

    def _values(self, relevant: Tensor, positives: Tensor) -> Tensor:
        rank = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
        found = relevant.cumsum(1)
        precision = found / rank
        if self.mode == "integrate":
            before = (found - 1) / (rank - 1).clamp(min=1)
            before[:, :1] = 1
            precision = (precision + before) / 2
        return (precision * relevant).sum(1, keepdim=True) / positives.clamp(min=1)[:, None]
