"""Classification of images that belong to several classes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widefield.components.annotations import InitConfig, LossConfig
from widefield.components.base_module import BaseModule
from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.heads.cls_head import Features
from widefield.registry import MODELS

_DEFAULT_THRESHOLD = 0.5


@MODELS.register_module()
class MultiLabelClsHead(BaseModule):
    """Multi-label classification head without parameters: its input are scores.

    Args:
        loss: Called as `loss(score, target, avg_factor=N)` with targets (N, C) of 0 and 1 and the number N of images.
        thr: Classes of at least this probability are predicted; by default 0.5 if there is no `topk`.
        topk: So many classes are predicted, where there is no `thr`.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"

    def __init__(
        self,
        loss: LossConfig = {"type": "CrossEntropyLoss", "use_sigmoid": True},  # noqa: B006  # read, never written
        thr: float | None = None,
        topk: int | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        if topk is not None and topk < 1:
            raise WrongArgumentError(f"topk={topk} must be positive")
        self.thr = _DEFAULT_THRESHOLD if thr is None and topk is None else thr
        self.topk = topk
        self.loss_module = MODELS.build(loss)

    def pre_logits(self, feats: Features) -> Tensor:
        """The features that the last layer gets: those of the last stage."""
        return feats if isinstance(feats, Tensor) else feats[-1]

    def forward(self, feats: Features) -> Tensor:
        """Scores (N, C)."""
        return self.pre_logits(feats)

    def loss(self, feats: Features, data_samples: Sequence[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            feats: What the neck or the backbone gives.
            data_samples: One per image, each with `gt_score` or with `gt_label`, any number of class indices.
            kwargs: Passed to the loss.
        """
        score = self(feats)
        target = torch.stack([_gt_score(sample, score.shape[1]) for sample in data_samples]).to(score.device)
        return {"loss": self.loss_module(score, target, avg_factor=len(score), **kwargs)}

    def predict(self, feats: Features, data_samples: Sequence[DataSample | None] | None = None) -> list[DataSample]:
        """The samples, new ones where there are none, with `pred_score`, a probability per class, and `pred_label`, the classes."""
        scores = self(feats).detach().sigmoid()
        samples = [None] * len(scores) if data_samples is None else data_samples
        return [
            (sample or DataSample()).set_pred_score(score).set_pred_label(self._labels(score))
            for sample, score in zip(samples, scores, strict=True)
        ]

    def _labels(self, score: Tensor) -> Tensor:
        if self.thr is not None:
            return (score >= self.thr).nonzero()[:, 0]
        assert self.topk is not None
        return score.topk(min(self.topk, len(score))).indices


def _gt_score(sample: DataSample, num_classes: int) -> Tensor:
    if "gt_score" in sample:
        return sample.gt_score.float()
    label: Tensor = sample.gt_label
    return torch.zeros(num_classes, device=label.device).index_fill(0, label, 1.0)
