"""What a `Classifier` learns beside classes."""

from typing import Any

import pytest
import torch
from torchmetrics import MetricCollection

from widefield.models import Classifier, make_model, parts_of
from widefield.modules import StreamingModule
from widefield.streaming import split


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


@pytest.mark.parametrize(
    ("names", "target", "targets"),
    [
        (["age"], {"task": "regression", "mean": [50.0], "std": [10.0]}, [[40.0], [70.0]]),
        (["1", "2"], {"task": "survival", "edges": [5.0]}, [[3.0, 1.0], [9.0, 0.0]]),
    ],
)
def test_a_network_of_ones_own_learns_and_measures_as_the_classifier_does(
    names: Any, target: Any, targets: Any
) -> None:
    parts = parts_of(names, target)

    class Own(StreamingModule):
        def predictions(self, output: torch.Tensor) -> torch.Tensor:
            return parts.predictions(output)

    torch.manual_seed(0)
    classifier = Classifier("resnet10_w16", names, tile_size=64, target=target).eval()
    net = make_model("resnet10_w16", len(names), None)
    net.load_state_dict(classifier.plain_state_dict())
    own = Own(*split(net), tile_size=64, loss_fn=parts.loss, metrics=MetricCollection(parts.metrics)).eval()
    images, wanted = torch.rand(2, 3, 64, 64), torch.tensor(targets)
    own.stream_network.normalisation = classifier.stream_network.normalisation
    outputs = [module(images) for module in (own, classifier)]
    assert own.loss_fn(outputs[0], wanted) == classifier.loss_fn(outputs[1], wanted)
    torch.testing.assert_close(*(module.predictions(output) for module, output in zip((own, classifier), outputs)))
    assert own.val_metrics.keys() == classifier.val_metrics.keys()
