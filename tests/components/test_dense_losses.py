"""Losses of maps: their values are those of brute force, of PyTorch and of scikit-image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional

from widefield.components.losses.dense_losses import (
    DenseCrossEntropyLoss,
    DenseFocalLoss,
    DiceLoss,
    JaccardLoss,
    SSIMLoss,
)
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS

WEIGHTS = [1.0, 2.0, 0.5]
DRAW = torch.Generator().manual_seed(0)
LOGITS = torch.randn(2, 3, 7, 9, dtype=torch.float64, generator=DRAW)
LABELS = torch.randint(0, 3, (2, 7, 9), generator=DRAW)
LABELS[:, 2:4, 3:] = 255


def of_each(logits: Tensor, labels: Tensor, one: Callable[[float, int], float]) -> float:
    """The weighted mean over positions of a function of the probability of the true class and of that class."""
    total = weight = 0.0
    shares = logits.softmax(1)
    for n, y, x in np.ndindex(*labels.shape):
        label = int(labels[n, y, x])
        if label != 255:
            total += WEIGHTS[label] * one(float(shares[n, label, y, x]), label)
            weight += WEIGHTS[label]
    return total / weight


def overlap(logits: Tensor, labels: Tensor, jaccard: bool, batch: bool) -> list[list[float]]:
    """1 - overlap per image (or of the batch) and class, by loops."""
    shares, images = logits.softmax(1), range(len(logits))
    losses = []
    for group in [list(images)] if batch else [[n] for n in images]:
        row = []
        for c in range(3):
            both = sum(float(shares[n, c][labels[n] == c].sum()) for n in group)
            area = sum(float(shares[n, c][labels[n] != 255].sum()) + int((labels[n] == c).sum()) for n in group)
            row.append(1 - (2 * both + 1e-5) / ((2 * (area - both) if jaccard else area) + 1e-5))
        losses.append(row)
    return losses


def test_cross_entropy_is_that_of_pytorch() -> None:
    expected = functional.cross_entropy(LOGITS, LABELS, torch.tensor(WEIGHTS, dtype=torch.float64), ignore_index=255)
    assert float(DenseCrossEntropyLoss(class_weights=WEIGHTS)(LOGITS, LABELS)) == pytest.approx(float(expected), 1e-12)
    logits = LOGITS.clone().requires_grad_()
    nothing = DenseCrossEntropyLoss()(logits, LABELS * 0 + 255)
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_focal_loss_is_that_of_brute_force_and_cross_entropy_without_gamma() -> None:
    expected = of_each(LOGITS, LABELS, lambda p, _: -((1 - p) ** 1.5) * np.log(p))
    assert float(DenseFocalLoss(1.5, class_weights=WEIGHTS)(LOGITS, LABELS)) == pytest.approx(expected, 1e-12)
    plain = DenseCrossEntropyLoss(class_weights=WEIGHTS)(LOGITS, LABELS)
    assert float(DenseFocalLoss(0.0, class_weights=WEIGHTS)(LOGITS, LABELS)) == pytest.approx(float(plain), 1e-12)


@pytest.mark.parametrize("kind", [DiceLoss, JaccardLoss])
@pytest.mark.parametrize("batch", [False, True], ids=["images", "batch"])
def test_overlaps_are_those_of_brute_force(kind: type, batch: bool) -> None:
    losses = np.array(overlap(LOGITS.detach(), LABELS, kind is JaccardLoss, batch))
    assert float(kind(whole_batch=batch)(LOGITS, LABELS)) == pytest.approx(losses.mean(), 1e-10)
    weighted = (losses * WEIGHTS).sum(1).mean() / sum(WEIGHTS)
    assert float(kind(whole_batch=batch, class_weights=WEIGHTS)(LOGITS, LABELS)) == pytest.approx(weighted, 1e-10)


def test_structural_similarity_is_that_of_scikit_image() -> None:
    x, y = np.random.default_rng(0).random((2, 2, 3, 20, 24))
    expected = np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=0) for a, b in zip(x, y)])
    assert float(SSIMLoss()(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(1 - expected, 1e-10)


def test_they_are_components() -> None:
    described = {"type": "DiceLoss", "whole_batch": True, "ignore_index": 7}
    assert MODELS.build(described).ignore_index == 7
    assert {"DenseCrossEntropyLoss", "DenseFocalLoss", "DiceLoss", "JaccardLoss", "SSIMLoss"} <= set(
        MODELS.names("loss")
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiceLoss(smooth=0.0), "smooth=0.0 must be above 0"),
        (lambda: DenseFocalLoss(-1.0), "gamma=-1.0 must not be negative"),
        (lambda: DiceLoss(class_weights=[0.0, 0.0]), "must be finite, none negative, and not all 0"),
        (lambda: DiceLoss(class_weights=[1.0, 2.0])(LOGITS, LABELS), "2 class weights, and logits of 3 classes"),
        (lambda: SSIMLoss(1), "window=1 must be at least 2"),
    ],
    ids=["smooth", "gamma", "weights", "count", "window"],
)
def test_what_cannot_be_used_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(WrongArgumentError, match=message):
        make()
