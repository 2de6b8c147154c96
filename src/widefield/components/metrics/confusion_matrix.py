"""Confusion matrix."""

from torch import Tensor

from widefield.components.metrics import METRICS
from widefield.components.metrics.counting import CountingMetric, count_classes, predicted_classes


@METRICS.register_module()
class ConfusionMatrix(CountingMetric):
    """How many images of each class are predicted as each class, `confusion_matrix/result`.

    Args:
        num_classes: Needed for predictions that are class indices.
    """

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            preds: Scores (N, C) or class indices (N,).
            target: True classes (N,).
        """
        label, _, classes = predicted_classes(preds, target, self.num_classes)
        self._add(count_classes(target * classes + label, classes**2).view(classes, classes))

    def compute(self) -> dict[str, Tensor]:
        """The matrix (C, C), with true classes as rows and predicted ones as columns."""
        return {"confusion_matrix/result": self._total()}
