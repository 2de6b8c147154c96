"""What a `Classifier` learns beside classes."""

from typing import Any

import pytest
import torch

from widefield.models import Classifier
from widefield.models.tasks import parts_of


def test_numbers_are_learned_in_standard_deviations_and_predicted_in_units() -> None:
    task = parts_of(["age", "weight"], {"task": "regression", "mean": [50.0, 7000.0], "std": [10.0, 500.0]})
    target = torch.tensor([[40.0, 7000.0], [60.0, 8000.0]])
    output = torch.tensor([[-1.0, 0.0], [1.0, 2.0]])
    assert task.loss(output, target) == 0
    assert task.loss(torch.zeros(2, 2), target) == (1 + 1 + 4) / 4
    torch.testing.assert_close(task.predictions(output.bfloat16()), target)
    for metric in task.metrics.values():
        metric.update(task.predictions(torch.zeros(2, 2)), target)
    found = {name: float(metric.compute()) for name, metric in task.metrics.items()}
    assert found == {"mae_age": 10, "rmse_age": 10, "mae_weight": 500, "rmse_weight": pytest.approx(1000 / 2**0.5)}
    for metric in task.metrics.values():
        metric.reset()
        metric.update(target, target)
        assert metric.compute() == 0


def test_several_labels_have_probabilities_of_their_own() -> None:
    task = parts_of(["a", "b"], {"task": "multilabel"})
    output, target = torch.tensor([[3.0, 2.0], [-1.0, 1.0], [1.0, -2.0]]), torch.tensor([[1.0, 1], [0, 1], [1, 0]])
    scores = task.predictions(output)
    torch.testing.assert_close(scores, output.sigmoid())
    torch.testing.assert_close(task.loss(output, target), -torch.where(target > 0, scores, 1 - scores).log().mean())
    for metric in task.metrics.values():
        metric.update(scores, target)
        assert metric.compute() == 1
        metric.update(1 - scores, target)
        assert metric.compute() < 1


@pytest.mark.parametrize(
    ("names", "target", "message"),
    [
        (["a"], None, "at least two classes"),
        (["a"], {"task": "regresion"}, "no task 'regresion'; did you mean regression"),
        (["a", "b"], {"task": "regression", "mean": [1.0], "std": [1.0]}, r"target.mean has 1 number\(s\), expected 2"),
        (["a", "b"], {"task": "survival", "edges": [1.0, 2.0]}, r"target.edges has 2 number\(s\), expected 1"),
        (["a"], {"task": "regression", "mean": [1.0]}, "target has no 'std', which task=regression needs"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(names: list[str], target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier("resnet10_w16", names, target=target)
