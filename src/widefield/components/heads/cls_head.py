"""Heads for classification."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from widefield.components.annotations import InitConfig, LossConfig
from widefield.components.base_module import BaseModule
from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.heads.accuracy import top_k_accuracy
from widefield.registry import MODELS

Features = Tensor | Sequence[Tensor]


@MODELS.register_module()
class ClsHead(BaseModule):
    """Classification head without parameters: its input are scores.

    A head of your own overrides `pre_logits`, what happens before the last layer, and `forward`, which gives the scores.

    Args:
        loss: Called as `loss(score, target, avg_factor=N)` with the number N of images; without it if it does not take it, as
            the losses of torch do not.
        topk: For which k the accuracy is computed.
        cal_acc: Whether it is computed in training.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"

    def __init__(
        self,
        loss: LossConfig = {"type": "CrossEntropyLoss", "loss_weight": 1.0},  # noqa: B006  # read, never written
        topk: int | Sequence[int] = (1,),
        cal_acc: bool = False,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise WrongArgumentError(f"topk={topk} must be positive")
        self.cal_acc = cal_acc
        self.loss_module = MODELS.build(loss)

    def pre_logits(self, feats: Features) -> Tensor:
        """The features that the last layer gets: those of the last stage."""
        return feats if isinstance(feats, Tensor) else feats[-1]

    def forward(self, feats: Features) -> Tensor:
        """Scores (N, C)."""
        return self.pre_logits(feats)

    def loss(self, feats: Features, data_samples: Sequence[DataSample], **kwargs: Any) -> dict[str, Tensor | float]:
        """The loss of a batch, and its accuracies as `accuracy_top-k`, in percent, if they are computed.

        Args:
            feats: What the neck or the backbone gives.
            data_samples: One per image, each with `gt_score` or each with one `gt_label`.
            kwargs: Passed to the loss.
        """
        score = self(feats)
        has_scores = "gt_score" in data_samples[0]
        if has_scores:
            target = torch.stack([sample.gt_score for sample in data_samples]).to(score.device)
        else:
            target = torch.cat([sample.gt_label for sample in data_samples]).to(score.device)
        if _takes(self.loss_module.forward, "avg_factor"):
            kwargs["avg_factor"] = len(score)
        try:
            losses = {"loss": self.loss_module(score, target, **kwargs)}
        except IndexError as error:  # what torch raises for a label that there is no score of
            if has_scores or score.ndim != 2 or int(target.max()) < score.shape[1]:
                raise
            raise WrongArgumentError(
                f"there is the label {int(target.max())}, and the head has scores of {score.shape[1]} classes; labels begin at 0"
            ) from error
        if self.cal_acc:
            if has_scores:
                raise WrongArgumentError(
                    "cal_acc compares with one class per image, and there are scores, as batch augmentation makes them; "
                    "set cal_acc=False"
                )
            accuracies = top_k_accuracy(score.detach(), target, self.topk)
            losses |= {f"accuracy_top-{k}": accuracy for k, accuracy in zip(self.topk, accuracies, strict=True)}
        return losses

    def predict(self, feats: Features, data_samples: Sequence[DataSample | None] | None = None) -> list[DataSample]:
        """The samples, new ones where there are none, with `pred_score`, the softmax, and `pred_label`, its maximum."""
        scores = functional.softmax(self(feats), dim=1)
        samples = [None] * len(scores) if data_samples is None else data_samples
        return [
            (sample or DataSample()).set_pred_score(score).set_pred_label(score.argmax())
            for sample, score in zip(samples, scores.detach(), strict=True)
        ]


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
