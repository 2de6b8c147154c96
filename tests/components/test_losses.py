"""Losses, against formulas and known values."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widefield.components import (
    AsymmetricLoss,
    ClsHead,
    CosineSimilarityLoss,
    CrossEntropyLoss,
    DataSample,
    FocalLoss,
    L1Loss,
    LabelSmoothLoss,
    LinearClsHead,
    PixelReconstructionLoss,
    weighted_loss,
)
from widefield.components.losses.label_losses import label_scores
from widefield.components.losses.reduction import weight_reduce_loss
from widefield.registry import MODELS

S = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
L = torch.tensor([0, 2])
MULTI = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.fixture
def double_scores() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def registrations() -> Iterator[None]:
    """Forget what a test registers."""
    yield
    for name in [name for name, held in MODELS._registered.items() if held.component.__module__ == __name__]:
        del MODELS._registered[name]


def close(value: Tensor, expected: Any, atol: float = 2e-6) -> None:
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=value.dtype), atol=atol, rtol=0)


def test_labels_become_scores() -> None:
    one_hot = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    for label in (L, L[:, None], L.int(), torch.tensor(one_hot), torch.tensor(one_hot).long()):
        assert label_scores(label, 3).tolist() == one_hot
    mixed = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    assert label_scores(mixed, 3) is mixed
    for wrong in (torch.tensor([0.0, 2.0]), torch.tensor(1), torch.zeros(2, 2), torch.zeros(2, 3, 1)):
        with pytest.raises(AssertionError, match=r"give class indices, integers of shape \(N,\), or scores"):
            label_scores(wrong, 3)


def test_a_weight_is_per_element_or_along_the_first_axes() -> None:
    losses = torch.arange(6.0).reshape(2, 3)
    square = torch.ones(2, 2)
    assert weight_reduce_loss(losses, torch.tensor([1.0, 10.0]), "none").tolist() == [[0, 1, 2], [30, 40, 50]]
    assert weight_reduce_loss(square, torch.tensor([1.0, 10.0]), "none").tolist() == [[1, 1], [10, 10]]
    assert weight_reduce_loss(losses, losses, "none").tolist() == losses.square().tolist()
    with pytest.raises(AssertionError, match=r"weights have the shape \(3,\), and the losses \(2, 3\)"):
        weight_reduce_loss(losses, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "target", "value"),
    [
        ({}, L, 2.203412),
        ({"mode": "classy_vision"}, L, 2.206442),
        ({"mode": "multi_label"}, MULTI, 0.614722),
    ],
)
def test_label_smoothing_has_the_known_values(options: dict[str, Any], target: Tensor, value: float) -> None:
    close(LabelSmoothLoss(0.1, **options)(S, target), value)


def test_label_smoothing_smooths_as_its_formula_says() -> None:
    close(LabelSmoothLoss(0.1, num_classes=3).smooth_label(L)[0], [0.933333, 0.033333, 0.033333])
    close(LabelSmoothLoss(0.1, 3, mode="classy_vision").smooth_label(L)[0], [0.939394, 0.030303, 0.030303])
    close(LabelSmoothLoss(0.1, 3, mode="multi_label").smooth_label(MULTI)[0], [0.9, 0.1, 0.9])
    with pytest.raises(ValueError, match="give num_classes"):
        LabelSmoothLoss(0.1).smooth_label(L)


def test_label_smoothing_is_that_of_torch(double_scores: Tensor) -> None:
    label = torch.tensor([0, 1, 2, 1])
    expected = nn.CrossEntropyLoss(label_smoothing=0.2)(double_scores, label)
    for form in (label, label[:, None], label_scores(label, 3)):
        torch.testing.assert_close(LabelSmoothLoss(0.2)(double_scores, form), expected)


def test_mixed_labels_are_mixed_losses(double_scores: Tensor) -> None:
    loss = LabelSmoothLoss(0.1)
    first, second = torch.tensor([0, 1, 2, 1]), torch.tensor([2, 2, 0, 1])
    mixed = 0.3 * label_scores(first, 3) + 0.7 * label_scores(second, 3)
    torch.testing.assert_close(
        loss(double_scores, mixed), 0.3 * loss(double_scores, first) + 0.7 * loss(double_scores, second)
    )


def test_label_smoothing_hands_weights_and_reductions_on() -> None:
    loss = LabelSmoothLoss(0.1, class_weight=[0.3, 0.7, 1.0], loss_weight=2.0, reduction="sum")
    smoothed = LabelSmoothLoss(0.1, 3).smooth_label(L)
    weight = torch.tensor([1.0, 3.0])
    rows = -(S.log_softmax(1) * smoothed * torch.tensor([0.3, 0.7, 1.0])).sum(1) * weight
    torch.testing.assert_close(loss(S, L, weight), 2 * rows.sum())
    torch.testing.assert_close(loss(S, L, weight, avg_factor=5, reduction_override="mean"), 2 * rows.sum() / 5)
    binary = LabelSmoothLoss(0.1, use_sigmoid=True, pos_weight=2.0)(S, L)
    p = S.sigmoid()
    torch.testing.assert_close(binary, -(2 * smoothed * p.log() + (1 - smoothed) * (1 - p).log()).mean())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smooth_val": 1.0}, "label_smooth_val=1.0 must be a float from 0.0 to below 1.0"),
        ({"label_smooth_val": "str"}, "label_smooth_val='str' must be"),
        ({"label_smooth_val": 0}, "label_smooth_val=0 must be a float"),
        ({"label_smooth_val": 0.1, "mode": "smooth"}, "mode='smooth' is not one of 'original', 'classy_vision'"),
        ({"label_smooth_val": 0.1, "mode": "multi_label", "use_sigmoid": False}, "leave use_sigmoid out"),
        ({"label_smooth_val": 0.1, "reduction": "average"}, "reduction='average' is not one of"),
    ],
)
def test_label_smoothing_refuses(arguments: dict[str, Any], message: str) -> None:
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match=message):
            LabelSmoothLoss(**arguments)


def test_label_smoothing_keeps_the_number_of_classes_of_the_first_batch() -> None:
    loss = LabelSmoothLoss(0.1)
    loss(S, L)
    with pytest.raises(AssertionError, match="scores of 2 classes, and num_classes=3"):
        loss(S[:, :2], torch.tensor([0, 1]))


def test_l1_has_the_known_values() -> None:
    pred, target, weight = torch.tensor([0.0, 2.0, 3.0]), torch.ones(3), torch.tensor([1.0, 0.0, 1.0])
    close(L1Loss()(pred, target), 4 / 3)
    close(L1Loss()(pred, target, weight), 1.0)
    close(L1Loss()(pred, target, weight, avg_factor=2), 1.5)
    close(L1Loss(reduction="none")(pred, target), [1.0, 1.0, 2.0])
    close(L1Loss(loss_weight=3.0)(pred, target, reduction_override="sum"), 12.0)
    with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
        L1Loss(reduction="sum")(pred, target, avg_factor=2)
    with pytest.raises(AssertionError, match=r"predictions of shape \(3,\) are compared with targets of shape \(2,\)"):
        L1Loss()(pred, target[:2])
    with pytest.raises(AssertionError, match="of one element at least"):
        L1Loss()(pred[:0], target[:0])
    with pytest.raises(AssertionError, match="reduction='average'"):
        L1Loss(reduction="average")  # type: ignore[arg-type]


def test_l1_of_class_indices_is_the_distance_from_certainty() -> None:
    """The last configuration of the page: a linear head with L1Loss, and integer labels."""
    head = LinearClsHead(num_classes=10, in_channels=4, loss={"type": "L1Loss", "loss_weight": 1.0}, topk=(1, 5))
    features, labels = torch.rand(3, 4), [7, 0, 7]
    loss = head.loss((features,), [DataSample().set_gt_label(label) for label in labels])["loss"]
    distances = [
        sum(abs(score - (k == label)) for k, score in enumerate(row))
        for row, label in zip(head((features,)).tolist(), labels, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(distances) / 3, rel=1e-5)


@pytest.mark.usefixtures("registrations")
def test_a_loss_of_a_user_works_in_heads() -> None:
    """The page's example, under another name."""

    @weighted_loss
    def absolute(pred: Tensor, target: Tensor) -> Tensor:
        assert pred.size() == target.size()
        assert target.numel() > 0
        return torch.abs(pred - target)

    @MODELS.register_module()
    class LossOfAUser(nn.Module):
        def __init__(self, reduction="mean", loss_weight=1.0):
            super().__init__()
            self.reduction = reduction
            self.loss_weight = loss_weight

        def forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
            assert reduction_override in (None, "none", "mean", "sum")
            reduction = reduction_override if reduction_override else self.reduction
            return self.loss_weight * absolute(pred, target, weight, reduction=reduction, avg_factor=avg_factor)

    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    samples = [DataSample().set_gt_score(row) for row in target]
    value = ClsHead(loss={"type": "LossOfAUser", "loss_weight": 2.0}).loss(S, samples)["loss"]
    close(value, 2 * (2 + 5) / 2)
    torch.testing.assert_close(value, L1Loss(loss_weight=2.0)(S, target, avg_factor=2))


def test_reconstruction_is_the_mean_over_masked_patches(double_scores: Tensor) -> None:
    pred, target = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    for criterion, power in (("L1", 1), ("L2", 2)):
        loss = PixelReconstructionLoss(criterion)  # type: ignore[arg-type]
        patches = [
            sum(abs(p - t) ** power for p, t in zip(pred[b, k].tolist(), target[b, k].tolist(), strict=True)) / 4
            for b in range(2)
            for k in range(5)
            if mask[b, k]
        ]
        close(loss(pred, target, mask), sum(patches) / 4, atol=1e-12)
        torch.testing.assert_close(loss(pred, target, mask.bool()), loss(pred, target, mask))
        torch.testing.assert_close(loss(pred, target), (pred - target).abs().pow(power).mean())


def test_reconstruction_of_pixels_divides_by_the_channels() -> None:
    loss = PixelReconstructionLoss("L1", channel=3)
    zeros, ones = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    mask = torch.ones(2, 1, 4, 4)
    assert loss(zeros, ones, mask).item() == 1.0
    mask[:, :, :2] = 0
    assert loss(zeros, ones, mask).item() == 1.0
    with pytest.raises(NotImplementedError, match="criterion='L3' is not one of 'L1', 'L2'"):
        PixelReconstructionLoss("L3")  # type: ignore[arg-type]


def test_a_mask_that_selects_nothing_costs_nothing() -> None:
    pred = torch.ones(2, 4, 3, requires_grad=True)
    for loss in (PixelReconstructionLoss("L2"), CosineSimilarityLoss()):
        value = loss(pred, torch.rand(2, 4, 3), torch.zeros(2, 4))
        (grad,) = torch.autograd.grad(value, pred)
        assert value.item() == 0
        assert not grad.any()


def test_sums_of_16_bit_masks_do_not_overflow() -> None:
    ones = torch.ones(2, 50_000, 1, dtype=torch.float16)
    mask = torch.ones(2, 50_000, dtype=torch.float16)
    assert PixelReconstructionLoss("L1")(ones, 0 * ones, mask).item() == 1.0


def test_cosine_similarity_has_the_known_value() -> None:
    pred, target = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    loss = CosineSimilarityLoss(shift_factor=2, scale_factor=2)
    close(loss(pred, target), 1.0)
    close(loss(pred, target, torch.tensor([0, 1])), 0.0)
    close(CosineSimilarityLoss()(3 * pred, target), -0.5)


def formula_focal(p: float, t: float, gamma: float, alpha: float) -> float:
    return -alpha * t * (1 - p) ** gamma * math.log(p) - (1 - alpha) * (1 - t) * p**gamma * math.log(1 - p)


def formula_asymmetric(p: float, t: float, gamma_pos: float, gamma_neg: float, clip: float) -> float:
    if t:
        return -((1 - p) ** gamma_pos) * math.log(p)
    q = max(p - clip, 0)
    return -(q**gamma_neg) * math.log(1 - q) if q else 0.0


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (0.5, 0.9)])
def test_focal_loss_is_its_formula(double_scores: Tensor, gamma: float, alpha: float) -> None:
    label = torch.tensor([0, 1, 2, 1])
    loss = FocalLoss(gamma, alpha, reduction="none", loss_weight=2.0)(double_scores, label)
    expected = [
        [2 * formula_focal(p, float(k == true), gamma, alpha) for k, p in enumerate(row)]
        for row, true in zip(double_scores.sigmoid().tolist(), label.tolist(), strict=True)
    ]
    close(loss, expected, atol=1e-12)
    if gamma == 0:
        binary = CrossEntropyLoss(use_sigmoid=True)(double_scores, label_scores(label, 3))
        torch.testing.assert_close(FocalLoss(0.0, 0.5)(double_scores, label), binary / 2)


@pytest.mark.parametrize(("gamma_pos", "gamma_neg", "clip"), [(0.0, 4.0, 0.05), (1.0, 2.0, 0.3), (0.5, 0.5, 0.0)])
@pytest.mark.parametrize("use_sigmoid", [True, False])
def test_asymmetric_loss_is_its_formula(
    double_scores: Tensor, gamma_pos: float, gamma_neg: float, clip: float, use_sigmoid: bool
) -> None:
    target = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.float64)
    p = double_scores.sigmoid() if use_sigmoid else double_scores.softmax(1)
    loss = AsymmetricLoss(gamma_pos, gamma_neg, clip, reduction="none", use_sigmoid=use_sigmoid)(double_scores, target)
    expected = [
        [formula_asymmetric(one, t, gamma_pos, gamma_neg, clip) for one, t in zip(row, truth, strict=True)]
        for row, truth in zip(p.tolist(), target.tolist(), strict=True)
    ]
    close(loss, expected, atol=1e-7)


@pytest.mark.parametrize("loss", [FocalLoss(), FocalLoss(0.5), AsymmetricLoss(), AsymmetricLoss(0.5, 0.5)], ids=str)
def test_gradients_are_those_of_the_value_and_numbers_everywhere(double_scores: Tensor, loss: nn.Module) -> None:
    target = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda score: loss(score, target), double_scores.requires_grad_())
    extreme = torch.tensor([[-500.0, 500.0, 0.0], [500.0, -500.0, 1e-9]], requires_grad=True)
    (grad,) = torch.autograd.grad(loss(extreme, MULTI), extreme)
    assert torch.isfinite(grad).all()


def test_losses_of_labels_take_weights_of_images() -> None:
    weight = torch.tensor([1.0, 0.0])
    for kind in (FocalLoss, AsymmetricLoss, L1Loss):
        rows = kind(reduction="none")(S, L).sum(1)
        torch.testing.assert_close(kind()(S, L, weight), rows[0] / 6)
        torch.testing.assert_close(kind()(S, L, weight, avg_factor=2), rows[0] / 2)


def test_losses_of_half_precision_are_computed_in_single() -> None:
    for kind in (FocalLoss, AsymmetricLoss):
        value = kind()(S.bfloat16(), L)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, kind()(S, L))
