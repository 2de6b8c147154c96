"""The loss and the metric of survival analysis."""

import numpy as np
import pytest
import torch
from torch import Tensor

from widefield.components.losses.survival_losses import HazardLoss, event_probabilities
from widefield.components.metrics.survival_metrics import ConcordanceIndex

EDGES = [2.0, 5.0, 9.0]
TARGET = torch.tensor(
    [[0.0, 1], [1.9, 0], [2.0, 1], [4.9, 0], [5.0, 0], [8.0, 1], [9.0, 1], [100.0, 0]], dtype=torch.float64
)
INTERVALS = [0, 0, 1, 1, 2, 2, 3, 3]


def published(logits: Tensor, intervals: Tensor, censored: Tensor) -> Tensor:
    """The formula of Zadeh and Schmid, written as in MCAT."""
    hazards = logits.sigmoid()
    survival = torch.cat([torch.ones(len(logits), 1, dtype=logits.dtype), torch.cumprod(1 - hazards, 1)], 1)
    at, before = survival.gather(1, intervals + 1), survival.gather(1, intervals)
    observed = -(1 - censored) * (before.log() + hazards.gather(1, intervals).log())
    return (observed - censored * at.log()).mean()


def test_the_loss_is_the_published_one() -> None:
    logits = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    censored = 1 - TARGET[:, 1:]
    expected = published(logits, torch.tensor(INTERVALS)[:, None], censored)
    found = HazardLoss(EDGES)(logits, TARGET)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_the_loss_of_one_image_of_extreme_hazards_is_finite() -> None:
    logits = torch.tensor([[200.0, -200.0, 200.0, 0.0]], requires_grad=True)
    loss = HazardLoss(EDGES)(logits, torch.tensor([[9.5, 1.0]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(400 + np.log(2))
    assert gradient.isfinite().all()


def test_probabilities_of_the_event_are_hazards_after_survival() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hazards = logits.sigmoid()
    survival = torch.cumprod(1 - hazards, 1)
    before = torch.cat([torch.ones(5, 1, dtype=torch.float64), survival[:, :-1]], 1)
    torch.testing.assert_close(event_probabilities(logits), before * hazards)
    torch.testing.assert_close(event_probabilities(logits).sum(1), 1 - survival[:, -1])


def concordance(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> float:
    pairs = concordant = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                concordant += 1 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0
    return concordant / pairs


def test_the_concordance_index_counts_pairs_with_ties_over_all_batches() -> None:
    generator = np.random.default_rng(0)
    risk, time = generator.integers(0, 6, 40).astype(float), generator.integers(1, 12, 40).astype(float)
    event = generator.random(40) < 0.6
    metric = ConcordanceIndex()
    target = torch.tensor(np.stack([time, event], 1))
    for part in (slice(0, 15), slice(15, 40)):
        metric.update(torch.tensor(risk)[part], target[part])
    assert float(metric.compute()) == pytest.approx(concordance(risk, time, event))


def test_sooner_events_are_riskier_and_without_a_pair_there_is_no_index() -> None:
    metric = ConcordanceIndex()
    metric.update(torch.tensor([[0.9, 0.1], [0.2, 0.7], [0.1, 0.1]]), torch.tensor([[1.0, 1], [2.0, 1], [3.0, 0]]))
    assert metric.compute() == 1
    metric.reset()
    metric.update(torch.tensor([[0.9, 0.1]]), torch.tensor([[1.0, 1]]))
    assert metric.compute().isnan()
