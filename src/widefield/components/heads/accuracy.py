"""How often the true class is among the first k."""

from collections.abc import Sequence

from torch import Tensor


def top_k_accuracy(score: Tensor, label: Tensor, topk: Sequence[int]) -> list[float]:
    """Percent of images whose class is among the `k` of highest score, for each k.

    Args:
        score: (N, C).
        label: Class indices (N,).
        topk: Each at most C.

    Raises:
        ValueError: A k above the number of classes.
    """
    classes = score.shape[1]
    if max(topk) > classes:
        raise ValueError(f"Top-{max(topk)} accuracy is unavailable since the number of categories is {classes}.")
    ranked = score.topk(max(topk), dim=1).indices == label[:, None]
    return [100 * ranked[:, :k].any(dim=1).float().mean().item() for k in topk]
