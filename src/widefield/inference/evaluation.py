"""Metrics of validation and test."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from widefield.components.data_sample import DataSample
from widefield.components.heads.classification_heads import MultiLabelClsHead, scores_of_labels
from widefield.components.metrics.classification_metrics import (
    Accuracy,
    AveragePrecision,
    ConfusionMatrix,
    MultiLabelMetric,
    SingleLabelMetric,
)
from widefield.components.metrics.retrieval_metrics import RetrievalAveragePrecision, RetrievalRecall
from widefield.components.models.image_classifier import ImageClassifier
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.prediction import predict_samples
from widefield.modules import SplitImages

_OF_SEVERAL = (MultiLabelMetric, AveragePrecision, RetrievalRecall, RetrievalAveragePrecision)
_OF_ONE = (Accuracy, SingleLabelMetric, ConfusionMatrix)


class Evaluation(Callback):
    """Computes metrics of what a model predicts in validation and test, and logs them as `val_NAME` and `test_NAME`.

    The backbone of a classifier runs once: what the head gets for the loss, it gets for the prediction. A single-label metric is
    given class indices (N,); a metric of several labels, and other metrics of a multi-label head, 0 and 1 per class (N, C); one of
    retrieval, 0 and 1 per item of the collection (N, M), whose indices are the labels.

    Attributes:
        results: What was computed last, by name without prefix; values that are no single number are only here.

    Args:
        metrics: As of `METRICS`: each computes a dictionary.
        views: Test-time augmentation, see `AveragedViews`. The loss stays that of the images as they are.
    """

    def __init__(self, metrics: Sequence[Metric], views: AveragedViews | None = None) -> None:
        self.metrics = list(metrics)
        self.views = views
        self.results: dict[str, Tensor] = {}
        self._features: Any = None
        self._hook: Any = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        for metric in self.metrics:
            metric.reset()
            metric.to(pl_module.device)
            if isinstance(trainer.strategy, SplitImages):
                metric.process_group = trainer.strategy.replicas
        # others may not predict by their head
        if isinstance(pl_module, ImageClassifier) and pl_module.head is not None:
            self._hook = pl_module.head.register_forward_pre_hook(self._keep)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *indices: int
    ) -> None:
        with trainer.precision_plugin.forward_context():
            self._update(pl_module, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(pl_module, "test")

    def _keep(self, head: Any, arguments: tuple[Any, ...]) -> None:
        self._features = arguments[0]

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._features = None

    @torch.no_grad()
    def _update(self, module: Any, batch: Any) -> None:
        inputs, targets = (batch["inputs"], batch["data_samples"]) if isinstance(batch, Mapping) else batch
        if self._features is None or self.views is not None:
            samples = predict_samples(module, list(inputs), self.views)
        else:
            features, self._features = self._features, None
            samples = module.head.predict(features, None)
        scores = torch.stack([sample.pred_score for sample in samples])
        for metric in self.metrics:
            of_head = isinstance(getattr(module, "head", None), MultiLabelClsHead) and not isinstance(metric, _OF_ONE)
            several = isinstance(metric, _OF_SEVERAL) or of_head
            metric.update(scores, _target(targets, several, scores))

    def _finish(self, module: LightningModule, phase: str) -> None:
        self._detach()
        self.results = {name: value for metric in self.metrics for name, value in metric.compute().items()}
        for name, value in self.results.items():
            if value.ndim == 0:
                module.log(f"{phase}_{name}", value.float(), sync_dist=True)  # the same in all processes


def _target(targets: Any, several: bool, scores: Tensor) -> Tensor:
    """True classes (N,), or with `several` 1 for each true class of each image, (N, C)."""
    if isinstance(targets, Tensor):
        targets = [DataSample().set_gt_label(target) for target in targets.cpu()]
    if not several:
        return torch.cat([_label(target) for target in targets]).to(scores.device)
    return torch.stack([scores_of_labels(one, scores.shape[1]).to(scores.device) for one in targets]).long()


def _label(sample: DataSample) -> Tensor:
    if "gt_label" not in sample or len(sample.gt_label) != 1:
        given = f"{len(sample.gt_label)} labels" if "gt_label" in sample else "no label"
        raise ValueError(f"an image has {given}, and this metric compares with one; choose one for several labels")
    label: Tensor = sample.gt_label
    return label.cpu()
