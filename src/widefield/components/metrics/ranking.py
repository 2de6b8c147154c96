"""Rankings of a gallery."""

from collections.abc import Sequence

import torch
from torch import Tensor

from widefield.components.errors import WrongArgumentError


def ranked_relevance(
    preds: Tensor, target: Tensor | Sequence[Tensor], depth: int | None = None
) -> tuple[Tensor, Tensor]:
    """Which of the first items of each ranking are relevant (N, R), and how many are in the whole gallery (N,).

    Args:
        preds: Similarities (N, M) of N queries to M items of the gallery, or their rankings, integers (N, R), best items first.
        target: Relevance (N, M), or the relevant items of each query, N tensors of indices.
        depth: Rank to look at; None looks at all.

    Raises:
        WrongArgumentError: Shapes that do not fit.
    """
    if preds.ndim != 2 or len(target) != len(preds):
        raise WrongArgumentError(
            f"predictions have the shape {tuple(preds.shape)}, and there are {len(target)} targets; give similarities (N, M) or "
            f"rankings (N, R), and targets of N queries"
        )
    if not preds.is_floating_point():
        ranking = preds[:, :depth]
    else:
        items = preds.shape[1]
        ranking = preds.topk(items if depth is None else min(depth, items), dim=1).indices
    if isinstance(target, Tensor) and target.ndim == 2:
        relevant = target > 0
        return relevant.gather(1, ranking), relevant.sum(1)
    indices = [torch.as_tensor(one, device=preds.device).reshape(-1).unique() for one in target]
    found = [torch.isin(row, one) for row, one in zip(ranking, indices, strict=True)]
    return torch.stack(found), torch.tensor([len(one) for one in indices], device=preds.device)
