"""Metrics, against loops, scikit-learn and torchmetrics."""

import inspect
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import multiclass_confusion_matrix

from widefield.components.metrics import METRICS
from widefield.components.metrics.classification_metrics import (
    Accuracy,
    AveragePrecision,
    ConfusionMatrix,
    MultiLabelMetric,
    SingleLabelMetric,
)
from widefield.components.metrics.retrieval_metrics import RetrievalAveragePrecision, RetrievalRecall


@pytest.fixture
def scores() -> Tensor:
    return torch.rand(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)


@pytest.fixture
def labels() -> Tensor:
    """Of four of the five classes."""
    return torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def multi() -> Tensor:
    return (torch.rand(60, 5, generator=torch.Generator().manual_seed(2)) < 0.3).long()


def value(metric: Metric, preds: Any, target: Any) -> dict[str, Any]:
    metric.update(preds, target)
    return {name: computed.tolist() for name, computed in metric.compute().items()}


def test_accuracy_has_the_known_value() -> None:
    assert value(Accuracy(), torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 2, 3])) == {"accuracy/top1": 50}


def test_accuracy_is_the_share_of_images_among_the_first_k(scores: Tensor, labels: Tensor) -> None:
    thrs = (0.0, 0.25, None)
    found = value(Accuracy(topk=(1, 3), thrs=thrs), scores, labels)
    assert list(found) == [f"accuracy/top{k}{end}" for k in (1, 3) for end in ("_thr-0.00", "_thr-0.25", "_no-thr")]
    for k in (1, 3):
        for thr, end in zip(thrs, ("_thr-0.00", "_thr-0.25", "_no-thr"), strict=True):
            hits = 0
            for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
                best = sorted(range(5), key=lambda c, row=row: -row[c])[:k]
                hits += label in best and (thr is None or row[label] > thr)
            assert found[f"accuracy/top{k}{end}"] == pytest.approx(100 * hits / 60)
    assert set(value(Accuracy(5), scores, labels)) == {"accuracy/top5"}
    zeros = torch.zeros(2, 3)
    assert value(Accuracy(3), zeros, labels[:2]) == {"accuracy/top3": 0}, "a score counts above the threshold alone"


def test_accuracy_refuses_what_it_cannot_tell(scores: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="Top-5 accuracy is unavailable since the number of categories is 3"):
        Accuracy(topk=(1, 5)).update(scores[:, :3], labels)
    with pytest.raises(ValueError, match="Top-5 accuracy is unavailable for class indices"):
        Accuracy(topk=(1, 5)).update(labels, labels)
    with pytest.raises(ValueError, match="topk=0 must be positive"):
        Accuracy(0)
    for preds, target in ((scores, labels[:3]), (scores[:, 0], labels), (scores[None], labels)):
        for kind in (Accuracy, SingleLabelMetric, ConfusionMatrix):
            with pytest.raises(AssertionError, match=r"give scores \(N, C\) or class indices \(N,\), and targets"):
                kind().update(preds, target)


ITEMS = ("precision", "recall", "f1-score", "support")


def test_precision_recall_and_f1_are_those_of_scikit_learn(scores: Tensor, labels: Tensor) -> None:
    predicted = scores.argmax(1)
    for average, end in (("macro", ""), ("micro", "_micro"), (None, "_classwise")):
        expected = sklearn_metrics.precision_recall_fscore_support(
            labels, predicted, labels=range(5), average=average, zero_division=0
        )
        metric = SingleLabelMetric(items=ITEMS, average=average)  # type: ignore[arg-type]
        found = value(metric, scores, labels)
        assert list(found) == [f"single-label/{item}{end}" for item in ITEMS]
        for item, one in zip(ITEMS[:3], expected, strict=False):
            assert found[f"single-label/{item}{end}"] == pytest.approx(100 * np.asarray(one), rel=1e-5)
        support = found[f"single-label/support{end}"]
        assert support == (60 if average else np.bincount(labels, minlength=5).tolist())
        by_label = SingleLabelMetric(items=ITEMS, average=average, num_classes=5)  # type: ignore[arg-type]
        assert value(by_label, predicted, labels) == found


def test_a_class_below_the_threshold_is_not_predicted(scores: Tensor, labels: Tensor) -> None:
    found = value(SingleLabelMetric(thrs=(0.25, None), average=None), scores, labels)
    for thr, end in ((0.25, "_thr-0.25"), (0.0, "_no-thr")):
        for k in range(5):
            predicted = {i for i, row in enumerate(scores.tolist()) if max(row) == row[k] > thr}
            true = {i for i, label in enumerate(labels.tolist()) if label == k}
            precision = 100 * len(predicted & true) / max(len(predicted), 1)
            recall = 100 * len(predicted & true) / max(len(true), 1)
            f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
            for item, expected in (("precision", precision), ("recall", recall), ("f1-score", f1)):
                assert found[f"single-label/{item}_classwise{end}"][k] == pytest.approx(expected, rel=1e-5)


def test_the_confusion_matrix_has_true_classes_as_rows(scores: Tensor, labels: Tensor) -> None:
    expected = multiclass_confusion_matrix(scores, labels, 5)
    assert value(ConfusionMatrix(), scores, labels) == {"confusion_matrix/result": expected.tolist()}
    found = value(ConfusionMatrix(2), torch.tensor([1, 1, 0]), torch.tensor([0, 0, 0]))
    assert found == {"confusion_matrix/result": [[1, 2], [0, 0]]}


def test_class_indices_need_the_number_of_classes(labels: Tensor) -> None:
    for kind in (SingleLabelMetric, ConfusionMatrix):
        with pytest.raises(ValueError, match="cannot be told from class indices; give num_classes"):
            kind().update(labels, labels)
        with pytest.raises(ValueError, match="labels are from 0 to 3, and there are 2 classes"):
            kind(num_classes=2).update(labels, labels)
        with pytest.raises(ValueError, match="labels are from -1 to 1"):
            kind(num_classes=2).update(torch.tensor([0, 1]), torch.tensor([-1, 1]))


@pytest.mark.parametrize("options", [{"items": ("accuracy",)}, {"items": "support"}, {"average": "weighted"}])
def test_unknown_values_and_averages_are_refused(options: dict[str, Any]) -> None:
    for kind in (SingleLabelMetric, MultiLabelMetric):
        with pytest.raises(ValueError, match=r"must be a list of 'precision', .*|is not one of 'macro', 'micro', None"):
            kind(**options)


@pytest.mark.parametrize(
    ("options", "end"), [({}, ""), ({"thr": 0.2}, "_thr-0.20"), ({"topk": 2}, "_top2"), ({"topk": 9}, "_top9")]
)
def test_values_of_several_labels_are_those_of_scikit_learn(
    scores: Tensor, multi: Tensor, options: dict[str, Any], end: str
) -> None:
    ranks = scores.argsort(1, descending=True).argsort(1)
    predicted = ranks < options["topk"] if "topk" in options else scores >= options.get("thr", 0.5)
    for average, suffix in (("macro", ""), ("micro", "_micro"), (None, "_classwise")):
        expected = sklearn_metrics.precision_recall_fscore_support(multi, predicted, average=average, zero_division=0)
        metric = MultiLabelMetric(**options, items=ITEMS, average=average)  # type: ignore[arg-type]
        found = value(metric, scores, multi)
        for item, one in zip(ITEMS[:3], expected, strict=False):
            assert found[f"multi-label/{item}{suffix}{end}"] == pytest.approx(100 * np.asarray(one), rel=1e-5)
        support = found[f"multi-label/support{suffix}{end}"]
        assert support == (multi.sum().item() if average else multi.sum(0).tolist())


def test_the_threshold_of_several_labels_is_included() -> None:
    found = value(MultiLabelMetric(items=["recall"]), torch.tensor([[0.5]]), torch.tensor([[1]]))
    assert found == {"multi-label/recall": 100}
    with pytest.raises(ValueError, match="topk=0 must be positive"):
        MultiLabelMetric(topk=0)


def test_average_precision_is_the_mean_precision_at_positives(scores: Tensor, multi: Tensor) -> None:
    found = value(AveragePrecision(average=None), scores, multi)["multi-label/AP_classwise"]
    for k in range(5):
        ranked = sorted(range(60), key=lambda i, k=k: -scores[i, k].item())
        hits, precisions = 0, []
        for rank, i in enumerate(ranked, 1):
            if multi[i, k]:
                hits += 1
                precisions.append(hits / rank)
        assert found[k] == pytest.approx(100 * sum(precisions) / hits)
    assert value(AveragePrecision(), scores, multi) == {"multi-label/mAP": pytest.approx(sum(found) / 5)}


def test_average_precision_of_equal_scores_does_not_depend_on_the_order(scores: Tensor, multi: Tensor) -> None:
    rounded = (scores * 20).round()
    expected = [100 * sklearn_metrics.average_precision_score(multi[:, k], rounded[:, k]) for k in range(5)]
    for order in (torch.arange(60), torch.arange(60).flip(0)):
        found = value(AveragePrecision(average=None), rounded[order], multi[order])
        assert found["multi-label/AP_classwise"] == pytest.approx(expected)


def test_average_precision_leaves_out_what_does_not_count(scores: Tensor, multi: Tensor) -> None:
    ignored = multi.clone()
    ignored[::3, 0] = -1
    ignored[:, 1] = 0
    keep = ignored[:, 0] >= 0
    first = 100 * sklearn_metrics.average_precision_score(multi[keep, 0], scores[keep, 0])
    found = value(AveragePrecision(average=None), scores, ignored)["multi-label/AP_classwise"]
    assert found[0] == pytest.approx(first)
    assert math.isnan(found[1])
    mean = value(AveragePrecision(), scores, ignored)["multi-label/mAP"]
    assert mean == pytest.approx(np.nanmean(found))
    with pytest.raises(ValueError, match=r"scores have the shape \(60, 5\), and targets \(60,\)"):
        AveragePrecision().update(scores, multi[:, 0])
    with pytest.raises(ValueError, match="average='micro' is not one of 'macro', None"):
        AveragePrecision(average="micro")  # type: ignore[arg-type]


@pytest.fixture
def relevance() -> Tensor:
    relevance = torch.rand(8, 12, generator=torch.Generator().manual_seed(3)) < 0.25
    relevance[0] = False
    return relevance


@pytest.fixture
def similarity() -> Tensor:
    return torch.rand(8, 12, generator=torch.Generator().manual_seed(4))


def test_recall_of_retrieval_is_a_rate_of_hits(similarity: Tensor, relevance: Tensor) -> None:
    found = value(RetrievalRecall(topk=(1, 3, 20)), similarity, relevance)
    for k in (1, 3, 20):
        hits = sum(
            any(relevance[q, i] for i in sorted(range(12), key=lambda i, q=q: -similarity[q, i])[:k]) for q in range(8)
        )
        assert found[f"retrieval/Recall@{k}"] == pytest.approx(100 * hits / 8)
    with pytest.raises(ValueError, match="topk=0 must be positive"):
        RetrievalRecall(0)


@pytest.mark.parametrize("topk", [None, 1, 5, 20])
@pytest.mark.parametrize("mode", ["IR", "integrate"])
def test_average_precision_of_retrieval_divides_by_all_relevant_items(
    similarity: Tensor, relevance: Tensor, topk: int | None, mode: Any
) -> None:
    precisions = []
    for q in range(8):
        ranking = sorted(range(12), key=lambda i, q=q: -similarity[q, i])
        found, total = 0, 0.0
        for rank, item in enumerate(ranking[:topk], 1):
            if relevance[q, item]:
                before = found / (rank - 1) if rank > 1 else 1.0
                found += 1
                total += found / rank if mode == "IR" else (before + found / rank) / 2
        precisions.append(total / max(int(relevance[q].sum()), 1))
    name = "retrieval/mAP" if topk is None else f"retrieval/mAP@{topk}"
    expected = pytest.approx(100 * sum(precisions) / 8, rel=1e-5)
    assert value(RetrievalAveragePrecision(topk, mode), similarity, relevance) == {name: expected}


def test_rankings_and_relevant_items_say_the_same_as_similarities(similarity: Tensor, relevance: Tensor) -> None:
    ranking = similarity.argsort(1, descending=True)
    items = [row.nonzero()[:, 0] for row in relevance]
    for make in (lambda: RetrievalRecall((1, 3)), lambda: RetrievalAveragePrecision(4), RetrievalAveragePrecision):
        expected = value(make(), similarity, relevance)
        for preds, target in ((ranking, relevance), (ranking, items), (similarity, items)):
            assert value(make(), preds, target) == pytest.approx(expected)
    one = value(RetrievalAveragePrecision(), ranking, torch.arange(8))
    assert one == pytest.approx(value(RetrievalAveragePrecision(), ranking, functional.one_hot(torch.arange(8), 12)))
    with pytest.raises(ValueError, match="there are 7 targets; give similarities"):
        RetrievalRecall(1).update(similarity, items[:7])
    with pytest.raises(ValueError, match="topk=0"):
        RetrievalAveragePrecision(0)
    with pytest.raises(ValueError, match="mode='area' is not one of 'IR', 'integrate'"):
        RetrievalAveragePrecision(mode="area")  # type: ignore[arg-type]


def pairs(scores: Tensor, labels: Tensor, multi: Tensor) -> list[tuple[Metric, Tensor]]:
    return [
        (Accuracy((1, 2), (0.0, 0.3)), labels),
        (SingleLabelMetric((0.0, 0.3)), labels),
        (ConfusionMatrix(), labels),
        (MultiLabelMetric(), multi),
        (AveragePrecision(), multi),
        (RetrievalRecall(2), multi),
        (RetrievalAveragePrecision(3), multi),
    ]


def test_batches_add_up_and_processes_too(scores: Tensor, labels: Tensor, multi: Tensor) -> None:
    """Two instances stand for two processes: their states are merged as torchmetrics merges them."""
    for metric, target in pairs(scores, labels, multi):
        other = metric.clone()
        batched = metric.clone()
        metric.update(scores, target)
        expected = metric.compute()
        for part in torch.arange(60).split(25):
            batched(scores[part], target[part])
        torch.testing.assert_close(batched.compute(), expected)
        batched.reset()
        batched.update(scores[:25], target[:25])
        batched.update(scores[25:30], target[25:30])
        other.update(scores[30:], target[30:])
        other.merge_state(batched)
        torch.testing.assert_close(other.compute(), expected)


def test_a_collection_has_all_values_by_name(scores: Tensor, labels: Tensor) -> None:
    names = [{"type": "Accuracy", "topk": [1, 2]}, {"type": "SingleLabelMetric", "items": ["recall"]}]
    collection = MetricCollection([METRICS.build(one) for one in names])
    collection.update(scores, labels)
    assert set(collection.compute()) == {"accuracy/top1", "accuracy/top2", "single-label/recall"}


def test_the_index_says_what_the_metrics_say_of_themselves() -> None:
    for entry in METRICS.entries():
        found = METRICS.get(entry.name)
        assert isinstance(found, type)
        assert issubclass(found, Metric)
        assert entry.summary == (inspect.getdoc(found) or "").partition("\n")[0]
    assert len(METRICS.names()) == 7
    code = (
        "import sys; from widefield.components.metrics import METRICS; METRICS.names(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
