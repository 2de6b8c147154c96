"""Tasks of a `Classifier`: the loss of each, its metrics, and what its outputs mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from torchmetrics.wrappers.abstract import WrapperMetric

from widefield.components.losses.survival_losses import HazardLoss, event_probabilities
from widefield.components.metrics.survival_metrics import ConcordanceIndex
from widefield.data import Target, Task
from widefield.modules.streaming_module import Loss
from widefield.registry import suggestion


@dataclass(frozen=True)
class TaskParts:
    """Parts that a task brings.

    Attributes:
        loss: Called with outputs (N, K) and targets.
        metrics: By name, updated with predictions and targets.
        predictions: From outputs to predictions (N, K).
    """

    loss: Loss
    metrics: dict[str, Metric]
    predictions: Callable[[Tensor], Tensor]


def parts_of(names: Sequence[str], target: Target) -> TaskParts:
    """Return the parts of a task with an output for each of `names`.

    Raises:
        ValueError: An unknown task, fewer than two classes, or numbers of the target for other outputs than there are.
    """
    count, task = len(names), target.get("task")
    if task == "classification":
        if count < 2:
            raise ValueError(f"a classifier needs at least two classes, got {list(names)}")
        metrics = {"accuracy": MulticlassAccuracy(count, average="micro"), "auc": MulticlassAUROC(count)}
        return TaskParts(nn.CrossEntropyLoss(), metrics, partial(torch.softmax, dim=-1))
    if task == "multilabel":
        # Targets are 0.0 and 1.0, as the loss wants them; torchmetrics works with them but its checks ask for integers.
        kinds = {"auc": MultilabelAUROC, "map": MultilabelAveragePrecision, "f1": MultilabelF1Score}
        metrics = {name: kind(count, validate_args=False) for name, kind in kinds.items()}
        return TaskParts(nn.BCEWithLogitsLoss(), metrics, torch.sigmoid)
    if task == "regression":
        _check(names, target, "mean", len(names))
        _check(names, target, "std", len(names))
        return _regression(names, target["mean"], target["std"])
    if task == "survival":
        _check(names, target, "edges", len(names) - 1)
        return TaskParts(HazardLoss(target["edges"]), {"c_index": ConcordanceIndex()}, event_probabilities)
    raise ValueError(f"target: there is no task {task!r}; {suggestion(str(task), get_args(Task))}")


def _check(names: Sequence[str], target: Mapping[str, Any], key: str, count: int) -> None:
    if key not in target:
        raise ValueError(
            f"target has no {key!r}, which task={target['task']} needs; take that of LabelledImages.target"
        )
    if len(target[key]) != count:
        raise ValueError(
            f"target.{key} has {len(target[key])} number(s), expected {count}: there are the outputs {list(names)}"
        )


def _regression(names: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> TaskParts:
    metrics: dict[str, Metric] = {}
    for k, name in enumerate(names):
        suffix = "" if len(names) == 1 else f"_{name}"
        metrics[f"mae{suffix}"] = OutputMetric(MeanAbsoluteError(), k)
        metrics[f"rmse{suffix}"] = OutputMetric(MeanSquaredError(squared=False), k)
    return TaskParts(
        partial(standardized_error, mean=mean, std=std), metrics, partial(_unstandardized, mean=mean, std=std)
    )


def standardized_error(output: Tensor, target: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the mean squared difference of outputs (N, K) and (target - mean) / std.

    So a network learns numbers of any unit at the usual learning rates, and several numbers count alike. 1 is the loss of one that
    always predicts the mean.
    """
    return functional.mse_loss(output, (target - target.new_tensor(mean)) / target.new_tensor(std))


def _unstandardized(output: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    output = output.float()
    return output * output.new_tensor(std) + output.new_tensor(mean)


class OutputMetric(WrapperMetric):
    """A metric of one of the outputs.

    Args:
        metric: The metric.
        index: Which of the K outputs.
    """

    def __init__(self, metric: Metric, index: int) -> None:
        super().__init__()
        self.metric = metric
        self.index = index

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Update the metric with column `index` of predictions and targets (N, K)."""
        self.metric.update(preds[:, self.index].contiguous(), target[:, self.index].contiguous())

    def compute(self) -> Tensor:
        """Return the value of the metric."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forget all images."""
        self.metric.reset()
        super().reset()
