"""Measures of the embeddings of a model that is trained without labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Number of neighbours that vote, and the temperature of their vote, as in Caron et al. (2021)."""


def effective_rank(embeddings: Tensor) -> float:
    """RankMe: about how many directions the embeddings (N, D) use, 1 to min(N, D).

    exp of the entropy of the singular values, divided by their sum; Garrido et al., RankMe,
    https://arxiv.org/abs/2210.02885. 1 if all point the same way, and if all are zero.
    """
    values = torch.linalg.svdvals(embeddings.float())
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


def spread(embeddings: Tensor) -> float:
    """Return the spread of the directions of embeddings (N, D), 0 to about 1: 0 if all are one, near 1 if they are independent.

    The root of the mean squared distance of unit vectors from their mean. It falls to 0 in a collapse; Chen and He, Exploring
    simple Siamese representation learning, https://arxiv.org/abs/2011.10566, section 4.1.
    """
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return float((unit - unit.mean(0)).square().sum(1).mean().sqrt())


def nearest(embeddings: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities and numbers (N, count) of the nearest others of each of embeddings (N, D), the nearest first."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    similarities = unit @ unit.T
    similarities.fill_diagonal_(-torch.inf)
    return similarities.topk(count)


def knn_accuracy(embeddings: Tensor, labels: Sequence[str]) -> float:
    """Share of embeddings (N, D) whose nearest others vote for their own label.

    The vote of a neighbour of cosine similarity s weighs exp(s / 0.07), of at most 20 neighbours and no more than a class has
    others; Wu et al., Unsupervised feature learning via non-parametric instance discrimination, https://arxiv.org/abs/1805.01978.
    """
    names = sorted(set(labels))
    classes = torch.tensor([names.index(label) for label in labels])
    count = min(NEIGHBOURS, max(1, len(labels) // len(names) - 1))
    similarities, others = nearest(embeddings, count)
    votes = torch.zeros(len(labels), len(names))
    votes.scatter_add_(1, classes[others], ((similarities - 1) / TEMPERATURE).exp())
    return float((votes.argmax(1) == classes).float().mean())
