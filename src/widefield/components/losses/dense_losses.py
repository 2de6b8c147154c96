"""Losses of maps: of a class at each position, or of numbers. They are sums and means over whole maps, so that all of them stream.

Logits are (N, C, H, W) and labels class indices (N, H, W), whole numbers of any type; a position with the label `ignore_index` does
not count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, Entry, Registry, registered_in

MAP_LOSSES = Registry(
    "loss of maps",
    lambda: [
        Entry("huber", "torch.nn.functional:huber_loss", "regression"),
        Entry("l1", "torch.nn.functional:l1_loss", "regression"),
        Entry("l2", "torch.nn.functional:mse_loss", "regression"),
        *registered_in("MAP_LOSSES", "components/losses"),
    ],
)
"""Losses by short names, as `DenseModule` takes them; the kind of each is the task that it is for."""


def one_hot_map(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels (N, H, W) as ones and zeros (N, C, H, W) of a type; zeros alone where a label is none of 0 to C - 1."""
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1, 1)
    return (labels.unsqueeze(1) == classes).to(dtype)


class DenseLoss(nn.Module):
    """A loss of logits and labels; a subclass writes `forward`.

    Args:
        ignore_index: The label of positions that do not count; it is none of the classes.
        class_weights: A factor for each class; None means 1.
    """

    component_kind = "loss"
    weights: Tensor | None

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float64)
        if weights is not None and not bool((weights.isfinite() & (weights >= 0)).all() and weights.any()):
            raise WrongArgumentError(f"class_weights={class_weights} must be finite, none negative, and not all 0")
        self.register_buffer("weights", weights, persistent=False)

    def weights_for(self, logits: Tensor) -> Tensor | None:
        """Return the class weights in the type of logits (N, C, H, W).

        Raises:
            WrongArgumentError: They are not C.
        """
        if self.weights is None:
            return None
        if len(self.weights) != logits.shape[1]:
            raise WrongArgumentError(
                f"there are {len(self.weights)} class weights, and logits of {logits.shape[1]} classes; give one for each"
            )
        return self.weights.to(logits.dtype)

    def mean_of(self, losses: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the sum of losses (N, H, W) over the sum of the weights of their labels, 0 where none counts."""
        ones, weights = one_hot_map(labels, logits.shape[1], losses.dtype), self.weights_for(logits)
        counts = ones.sum((0, 2, 3)) if weights is None else ones.sum((0, 2, 3)) * weights
        return losses.sum() / counts.sum().clamp(min=torch.finfo(losses.dtype).tiny)


@MODELS.register_module()
@MAP_LOSSES.register_module("cross_entropy", kind="segmentation")
class DenseCrossEntropyLoss(DenseLoss):
    """Cross-entropy at each position, averaged as `torch.nn.CrossEntropyLoss` does: over positions, weighted by their class.

    0, and not NaN, where all positions are ignored. Arguments are those of `DenseLoss`.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (N, C, H, W) for labels (N, H, W)."""
        weights = self.weights_for(logits)
        losses = functional.cross_entropy(
            logits, labels.long(), weights, ignore_index=self.ignore_index, reduction="none"
        )
        return self.mean_of(losses, labels, logits)


@MODELS.register_module()
@MAP_LOSSES.register_module("focal", kind="segmentation")
class DenseFocalLoss(DenseLoss):
    """Cross-entropy in which positions that are right already count little: -(1 - p)^gamma log p.

    p is the probability, by softmax, of the true class (Lin et al., 2017, https://arxiv.org/abs/1708.02002, equation 4). The mean
    is that of `DenseCrossEntropyLoss`, which gamma=0 gives.

    Args:
        gamma: How little.
        ignore_index, class_weights: See `DenseLoss`.
    """

    def __init__(
        self, gamma: float = 2.0, ignore_index: int = 255, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(ignore_index, class_weights)
        if gamma < 0:
            raise WrongArgumentError(f"gamma={gamma} must not be negative")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (N, C, H, W) for labels (N, H, W)."""
        labels, weights = labels.long(), self.weights_for(logits)
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "reduction": "none"}
        losses = functional.cross_entropy(logits, labels, **options)
        weighted = losses if weights is None else functional.cross_entropy(logits, labels, weights, **options)
        wrong = -torch.expm1(-losses)
        wrong = wrong.clamp(min=torch.finfo(wrong.dtype).tiny)  # at 0 the slope of a root would be infinite
        return self.mean_of(wrong**self.gamma * weighted, labels, logits)


class _OverlapLoss(DenseLoss):
    """One minus the overlap of softmax probabilities with labels, per image and class, averaged over both.

    Args:
        smooth: Added to numerator and denominator; a class that neither is nor is predicted has the loss 0 by it.
        whole_batch: Sum over the images of a batch before the division, so that an image without a class does not count for it.
        ignore_index, class_weights: See `DenseLoss`; weights are those of the mean over classes.
    """

    def __init__(
        self,
        smooth: float = 1e-5,
        whole_batch: bool = False,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(ignore_index, class_weights)
        if smooth <= 0:
            raise WrongArgumentError(f"smooth={smooth} must be above 0")
        self.smooth = smooth
        self.whole_batch = whole_batch

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (N, C, H, W) for labels (N, H, W)."""
        true = one_hot_map(labels, logits.shape[1], logits.dtype)
        shares = logits.softmax(1) * (labels != self.ignore_index).unsqueeze(1)
        both, either = (shares * true).sum((2, 3)), (shares + true).sum((2, 3))
        if self.whole_batch:
            both, either = both.sum(0, keepdim=True), either.sum(0, keepdim=True)
        losses = 1 - (2 * both + self.smooth) / (self.denominator(both, either) + self.smooth)
        weights = self.weights_for(logits)
        return losses.mean() if weights is None else (losses * weights).sum(1).mean() / weights.sum()

    def denominator(self, both: Tensor, either: Tensor) -> Tensor:
        """Return what twice the intersection `both` is divided by, given the sum `either` of the two areas."""
        raise NotImplementedError


@MODELS.register_module()
@MAP_LOSSES.register_module("dice", kind="segmentation")
class DiceLoss(_OverlapLoss):
    """1 - 2 |A B| / (|A| + |B|) over whole images (Milletari et al., 2016, https://arxiv.org/abs/1606.04797, without squares).

    As `monai.losses.DiceLoss(softmax=True, to_onehot_y=True)` computes it. Arguments are those of `_OverlapLoss`: `smooth`,
    `whole_batch`, `ignore_index`, `class_weights`.
    """

    def denominator(self, both: Tensor, either: Tensor) -> Tensor:
        return either


@MODELS.register_module()
@MAP_LOSSES.register_module("jaccard", kind="segmentation")
class JaccardLoss(_OverlapLoss):
    """1 - |A and B| / |A or B| over whole images (Rahman and Wang, 2016, https://doi.org/10.1007/978-3-319-50835-1_22).

    As MONAI's `DiceLoss` with `jaccard=True` computes it. Arguments are those of `DiceLoss`.
    """

    def denominator(self, both: Tensor, either: Tensor) -> Tensor:
        return 2 * (either - both)


@MODELS.register_module()
@MAP_LOSSES.register_module("ssim", kind="regression")
class SSIMLoss(nn.Module):
    """1 - the mean structural similarity of two maps, in square windows whose positions all count alike.

    Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861, equation 13, with the variances of samples and windows that lie
    inside the map, as `skimage.metrics.structural_similarity` has it by default.

    Args:
        window: Side of a window, in pixels.
        data_range: The largest value minus the smallest one that a map may have.
    """

    component_kind = "loss"

    def __init__(self, window: int = 7, data_range: float = 1.0) -> None:
        super().__init__()
        if window < 2 or data_range <= 0:
            raise WrongArgumentError(f"window={window} must be at least 2, and data_range={data_range} above 0")
        self.window = window
        self.data_range = data_range

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss of maps (N, C, H, W), a number."""

        def mean(x: Tensor) -> Tensor:
            return functional.avg_pool2d(x, self.window, stride=1)

        count = self.window**2
        unbiased = count / (count - 1)
        one, two = (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2
        x, y = mean(prediction), mean(target)
        xx, yy, xy = (
            unbiased * (mean(a * b) - c)
            for a, b, c in ((prediction, prediction, x * x), (target, target, y * y), (prediction, target, x * y))
        )
        similarity = (2 * x * y + one) * (2 * xy + two) / ((x * x + y * y + one) * (xx + yy + two))
        return 1 - similarity.mean()
