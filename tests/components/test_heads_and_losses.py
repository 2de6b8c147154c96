"""Necks, heads and losses, against formulas and known values."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from widefield.components import (
    ClsHead,
    CrossEntropyLoss,
    DataSample,
    GlobalAveragePooling,
    LinearClsHead,
    weighted_loss,
)
from widefield.components.losses.reduction import weight_reduce_loss

S = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0]])
L = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("options", "call", "value"),
    [
        ({}, {}, 2.236745),
        ({"reduction": "none"}, {}, [0.407606, 4.065884]),
        ({"reduction": "sum"}, {}, 4.473490),
        ({}, {"avg_factor": 4}, 1.118373),
        ({}, {"weight": torch.tensor([1.0, 0.0])}, 0.203803),
        ({"loss_weight": 2.0}, {}, 4.473490),
        ({"class_weight": [0.3, 0.7, 1.0]}, {}, 2.094083),
        ({}, {"reduction_override": "sum"}, 4.473490),
    ],
)
def test_cross_entropy_has_the_known_values(options: dict[str, Any], call: dict[str, Any], value: Any) -> None:
    torch.testing.assert_close(CrossEntropyLoss(**options)(S, L, **call), torch.tensor(value), atol=2e-6, rtol=0)


def test_soft_and_hard_labels_agree_where_they_say_the_same() -> None:
    one_hot = functional.one_hot(L, 3).float()
    for options in ({}, {"class_weight": [0.3, 0.7, 1.0]}):
        hard, soft = CrossEntropyLoss(**options)(S, L), CrossEntropyLoss(use_soft=True, **options)(S, one_hot)
        torch.testing.assert_close(hard, soft)
    torch.testing.assert_close(CrossEntropyLoss()(S, one_hot), CrossEntropyLoss()(S, L))


def test_independent_labels_are_binary_cross_entropy() -> None:
    target = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    p = S.sigmoid()
    elements = -(2 * target * p.log() + (1 - target) * (1 - p).log()) * torch.tensor([1.0, 2.0, 3.0])
    loss = CrossEntropyLoss(use_sigmoid=True, class_weight=[1.0, 2.0, 3.0], pos_weight=2.0, reduction="none")
    torch.testing.assert_close(loss(S, target), elements)
    torch.testing.assert_close(loss(S, target, weight=torch.tensor([1.0, 0.0]))[1], torch.zeros(3))


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_labels_are_not_both_independent_and_soft(error: type[Exception]) -> None:
    with pytest.raises(error, match="exclude each other"):
        CrossEntropyLoss(use_sigmoid=True, use_soft=True)


def test_reductions_of_a_loss_of_ones_own() -> None:
    @weighted_loss
    def l1(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (pred - target).abs()

    pred, target = torch.tensor([0.0, 2.0, 3.0]), torch.ones(3)
    weight = torch.tensor([1.0, 0.0, 1.0])
    assert l1(pred, target).item() == pytest.approx(4 / 3)
    assert l1(pred, target, weight).item() == 1.0
    assert l1(pred, target, weight, avg_factor=2).item() == 1.5
    assert l1(pred, target, reduction="none").tolist() == [1, 1, 2]
    assert l1(pred, target, reduction="none", avg_factor=2).tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
        l1(pred, target, reduction="sum", avg_factor=2)
    with pytest.raises(ValueError, match="'average' is not one of"):
        weight_reduce_loss(pred, reduction="average")


def test_pooling_keeps_the_structure_and_the_batch() -> None:
    pool = GlobalAveragePooling()
    maps = (torch.rand(1, 4, 3, 3), torch.rand(1, 8, 2, 2))
    assert [tuple(one.shape) for one in pool(maps)] == [(1, 4), (1, 8)]
    torch.testing.assert_close(pool(maps[0]), maps[0].mean((2, 3)))
    assert GlobalAveragePooling(dim=1)(torch.rand(2, 3, 5)).shape == (2, 3)
    with pytest.raises(TypeError, match="a tuple of tensors or a tensor, not a list"):
        pool(list(maps))
    with pytest.raises(AssertionError, match="dim=4"):
        GlobalAveragePooling(dim=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with dim=2 it has 4 axes"):
        pool(torch.rand(2, 3, 5))


def samples() -> list[DataSample]:
    return [DataSample(name=str(label)).set_gt_label(int(label)) for label in L]


def test_a_head_computes_loss_and_accuracy() -> None:
    losses = ClsHead(topk=(1, 2), cal_acc=True).loss((torch.zeros(1), S), samples())
    assert losses["loss"].item() == pytest.approx(2.236745, abs=1e-6)
    assert (losses["accuracy_top-1"], losses["accuracy_top-2"]) == (50, 50)
    assert set(ClsHead().loss(S, samples())) == {"loss"}


def test_a_head_predicts_into_the_samples() -> None:
    given = samples()
    predicted = ClsHead().predict((S,), given)
    assert all(one is other for one, other in zip(given, predicted, strict=True))
    torch.testing.assert_close(predicted[0].pred_score, torch.tensor([0.665241, 0.244728, 0.090031]), atol=1e-6, rtol=0)
    assert predicted[0].pred_label.tolist() == [0]
    assert [sample.pred_label.tolist() for sample in ClsHead().predict((S,))] == [[0], [1]]


def test_a_head_takes_mixed_labels_but_no_accuracy_of_them() -> None:
    mixed = [DataSample().set_gt_score([0.5, 0.5, 0.0]) for _ in range(2)]
    loss = {"type": "CrossEntropyLoss", "use_soft": True}
    value = ClsHead(loss=loss).loss((S,), mixed)["loss"]
    torch.testing.assert_close(value, -(S.log_softmax(1)[:, :2].sum(1) / 2).mean())
    with pytest.raises(AssertionError, match="batch augmentation"):
        ClsHead(loss=loss, cal_acc=True).loss((S,), mixed)
    with pytest.raises(ValueError, match="Top-5 accuracy is unavailable since the number of categories is 3"):
        ClsHead(topk=5, cal_acc=True).loss((S,), samples())


def test_a_linear_head_is_a_linear_layer() -> None:
    head = LinearClsHead(3, 4, topk=(1, 2), loss=nn.CrossEntropyLoss())
    head.init_weights()
    assert head.fc.weight.std().item() < 0.05
    assert not head.fc.bias.any()
    features = torch.rand(2, 4)
    torch.testing.assert_close(head((features,)), features @ head.fc.weight.T)
    assert head(features).shape == (2, 3), "a tensor is the features of the last stage, not a list of images"
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="num_classes=-5 must be"):
            LinearClsHead(-5, 4)


def test_a_loss_of_torch_is_a_loss_of_a_head() -> None:
    value = ClsHead(loss={"type": "torch.nn.CrossEntropyLoss"}).loss((S,), samples())["loss"]
    assert value.item() == pytest.approx(2.236745, abs=1e-6)


def test_a_sample_holds_labels_and_scores() -> None:
    sample = DataSample(img_path="a.png").set_gt_label([1, 2]).set_pred_label(3)
    assert (sample.gt_label.tolist(), sample.pred_label.tolist()) == ([1, 2], [3])
    assert "gt_label" in sample
    assert "gt_score" not in sample
    assert sample.get("gt_score") is None
    assert "img_path='a.png'" in repr(sample)
    sample.set_gt_score([0.1, 0.9])
    with pytest.raises(ValueError, match="3 scores, and there were 2 classes"):
        sample.set_pred_score([0.1, 0.9, 0.0])
    with pytest.raises(ValueError, match="class indices"):
        sample.set_gt_label(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not a list"):
        sample.set_mask([1])  # type: ignore[arg-type]
