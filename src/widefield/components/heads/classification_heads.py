"""Heads of classification: from features to scores, a loss and predictions."""

import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.component import (
    ActivationConfig,
    InitConfig,
    LossConfig,
    LossHead,
    NormConfig,
    build_activation_layer,
    build_norm_layer,
)
from widefield.components.data_sample import DataSample
from widefield.components.losses.label_losses import label_scores
from widefield.components.metrics.classification_metrics import Accuracy, as_topk
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, Range

Features = Tensor | Sequence[Tensor]
_DEFAULT_THRESHOLD = 0.5


class ScoreHead(LossHead):
    """A head that gives a score per class; a subclass writes `loss`, `_probabilities` and `_labels`."""

    def pre_logits(self, feats: Features) -> Tensor:
        """Return the features that the last layer gets: those of the last stage."""
        return feats if isinstance(feats, Tensor) else feats[-1]

    def forward(self, feats: Features) -> Tensor:
        """Return scores (N, C)."""
        return self.pre_logits(feats)

    def _probabilities(self, scores: Tensor) -> Tensor:
        """Return probabilities (N, C) of scores (N, C)."""
        raise NotImplementedError

    def _labels(self, probabilities: Tensor) -> Tensor:
        """Return the classes that are predicted for one image of these probabilities (C,)."""
        raise NotImplementedError

    def predict(self, feats: Features, data_samples: Sequence[DataSample | None] | None = None) -> list[DataSample]:
        """Return the samples, new ones where there are none, with `pred_score`, a probability per class, and `pred_label`."""
        scores = self._probabilities(self(feats)).detach()
        samples = [None] * len(scores) if data_samples is None else data_samples
        return [
            (sample or DataSample()).set_pred_score(score).set_pred_label(self._labels(score))
            for sample, score in zip(samples, scores, strict=True)
        ]


class LinearScoreHead(ScoreHead):
    """A head of one linear layer.

    Args:
        num_classes: Classes.
        in_channels: Channels of the features.
        kwargs: Those of the head without parameters.
    """

    default_init_cfg = ({"type": "Normal", "layer": "Linear", "std": 0.01},)

    def __init__(self, num_classes: int, in_channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_classes(num_classes)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, feats: Features) -> Tensor:
        """Return scores (N, num_classes)."""
        return self.fc(_vectors(self.pre_logits(feats), self.in_channels))


@MODELS.register_module()
class ClsHead(ScoreHead):
    """Classification head without parameters: its input are scores.

    A head of your own overrides `pre_logits`, what happens before the last layer, and `forward`, which gives the scores.

    Args:
        loss: Called as `loss(score, target, avg_factor=N)` with the number N of images; without it if it does not take it, as
            the losses of torch do not.
        topk: For which k the accuracy is computed.
        cal_acc: Whether it is computed in training.
        init_cfg: See `Component`.
    """

    def __init__(
        self,
        loss: LossConfig = {"type": "CrossEntropyLoss", "loss_weight": 1.0},  # noqa: B006  # read, never written
        topk: int | Sequence[int] = (1,),
        cal_acc: bool = False,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(loss, init_cfg)
        self.topk = as_topk(topk)
        self.cal_acc = cal_acc

    def loss(self, feats: Features, data_samples: Sequence[DataSample], **kwargs: Any) -> dict[str, Tensor | float]:
        """Return the loss of a batch, and its accuracies as `accuracy_top-k`, in percent, if they are computed.

        Args:
            feats: What the neck or the backbone gives.
            data_samples: One per image, each with `gt_score` or each with one `gt_label`.
            kwargs: Passed to the loss.
        """
        score = self._scores(feats, data_samples)
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
            found = Accuracy(self.topk, thrs=None).to(score.device)(score.detach(), target)
            losses |= {f"accuracy_top-{k}": found[f"accuracy/top{k}"].item() for k in self.topk}
        return losses

    def _scores(self, feats: Features, data_samples: Sequence[DataSample]) -> Tensor:
        """Return the scores (N, C) that the loss gets."""
        scores: Tensor = self(feats)
        return scores

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=1)

    def _labels(self, probabilities: Tensor) -> Tensor:
        return probabilities.argmax()


@MODELS.register_module()
class LinearClsHead(LinearScoreHead, ClsHead):
    """Classification by one linear layer."""


@MODELS.register_module()
class StackedLinearClsHead(ClsHead):
    """Classification by several linear layers, each but the last with a norm, an activation and dropout.

    Args:
        num_classes: Classes.
        in_channels: Channels of the features.
        mid_channels: Channels behind each layer but the last; one at least.
        dropout_rate: Of the dropout.
        norm_cfg: Type and options of the norm layers, such as `{type: BN1d}`; None for none.
        act_cfg: Type and options of the activations; None for none.
        kwargs: Those of `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        mid_channels: Sequence[int],
        dropout_rate: Annotated[float, Range(0, 1)] = 0.0,
        norm_cfg: NormConfig | None = None,
        act_cfg: ActivationConfig = {"type": "ReLU"},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_classes(num_classes)
        if not mid_channels:
            raise WrongArgumentError("mid_channels is empty; for one layer there is LinearClsHead")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.layers = nn.ModuleList()
        for before, after in itertools.pairwise([in_channels, *mid_channels]):
            layers: dict[str, nn.Module] = {"fc": nn.Linear(before, after)}
            if norm_cfg is not None:
                layers["norm"] = build_norm_layer(norm_cfg, after)[1]
            layers |= {"act": build_activation_layer(act_cfg), "dropout": nn.Dropout(dropout_rate)}
            self.layers.append(nn.Sequential(OrderedDict(layers)))
        self.layers.append(nn.Sequential(OrderedDict(fc=nn.Linear(mid_channels[-1], num_classes))))

    def pre_logits(self, feats: Features) -> Tensor:
        """Return what the last layer gets, (N, last of mid_channels)."""
        x = _vectors(super().pre_logits(feats), self.in_channels)
        for layer in self.layers[:-1]:
            x = layer(x)
        return x

    def forward(self, feats: Features) -> Tensor:
        """Return scores (N, num_classes)."""
        scores: Tensor = self.layers[-1](self.pre_logits(feats))
        return scores


@MODELS.register_module()
class ArcFaceClsHead(ClsHead):
    """Classification by the angles between features and one vector per class, with an additive angular margin in training.

    Scores are scale * cos(angle), and in the loss scale * cos(angle + margin) for the true class (Deng et al., 2018,
    https://arxiv.org/abs/1801.07698). Where angle + margin is above pi, cos(angle) - margin * sin(margin) takes its place, which
    goes on falling. With several centres per class the nearest counts (Deng et al., 2020, Sub-center ArcFace).

    Args:
        num_classes: Classes.
        in_channels: Channels of the features.
        num_subcenters: Centres per class.
        scale: Scores are multiplied by it.
        margins: Of all classes, in radians, of each class, or a text file with a line for each.
        easy_margin: Add the margin only to angles below pi / 2, and leave others as they are.
        kwargs: Those of `ClsHead`. Mixed images keep the margin of their own label.
    """

    margins: Tensor

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        num_subcenters: Annotated[int, Range(1)] = 1,
        scale: float = 64.0,
        margins: float | Sequence[float] | str = 0.5,
        easy_margin: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_classes(num_classes)
        if num_subcenters < 1:
            raise WrongArgumentError(f"num_subcenters={num_subcenters} must be positive")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.num_subcenters = num_subcenters
        self.scale = scale
        self.easy_margin = easy_margin
        self.norm_product = nn.Linear(in_channels, num_classes * num_subcenters, bias=False)
        if isinstance(margins, str):
            margins = [float(line) for line in Path(margins).read_text(encoding="utf-8").split()]
        self.register_buffer("margins", torch.empty(num_classes), persistent=False)
        self.set_margins(margins)

    def set_margins(self, margins: float | Sequence[float]) -> None:
        """Set the margin of all classes, or of each.

        Raises:
            WrongArgumentError: There is not one for each class.
        """
        given = [margins] * self.num_classes if isinstance(margins, (int, float)) else list(margins)
        if len(given) != self.num_classes:
            raise WrongArgumentError(
                f"there are {len(given)} margins for {self.num_classes} classes; give one for each"
            )
        self.margins = torch.as_tensor(given, dtype=torch.float32, device=self.margins.device)

    @torch.autocast("cuda", enabled=False)
    def forward(self, feats: Features, target: Tensor | None = None) -> Tensor:
        """Return scores (N, num_classes); with class indices `target` (N,) those that have the margin.

        Computed in the precision of the weights, whatever autocast says: a difference of angles is lost in 16 bits.
        """
        weight = self.norm_product.weight
        x = _vectors(self.pre_logits(feats), self.in_channels).to(weight.dtype)
        cosine = functional.linear(functional.normalize(x), functional.normalize(weight))
        cosine = cosine.unflatten(1, (self.num_classes, self.num_subcenters)).amax(2)
        if target is None:
            return self.scale * cosine
        # cos(angle + margin), for of an angle the slope at 0 and at pi is infinite
        margins = self.margins.to(cosine.dtype)
        sine = (1 - cosine**2).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
        moved = cosine * margins.cos() - sine * margins.sin()
        if self.easy_margin:
            moved = torch.where(cosine > 0, moved, cosine)
        else:
            falling = cosine - margins * (math.pi - margins).sin()
            moved = torch.where(cosine > (math.pi - margins).cos(), moved, falling)
        return self.scale * torch.where(label_scores(target, self.num_classes) > 0, moved, cosine)

    def _scores(self, feats: Features, data_samples: Sequence[DataSample]) -> Tensor:
        label = torch.cat([sample.gt_label for sample in data_samples])
        return self(feats, label.to(self.margins.device))


@MODELS.register_module(replaceable=True)
class VisionTransformerClsHead(ClsHead):
    """Classification of the class token by one linear layer, or by two with an activation between them.

    Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929. The last layer is initialised with zeros, so the first loss is
    ln(num_classes).

    Args:
        num_classes: Classes.
        in_channels: Width of the class token.
        hidden_dim: Width between two layers; None for one layer.
        act_cfg: Type and options of the activation between them.
        kwargs: Those of `ClsHead`.
    """

    default_init_cfg = ({"type": "Constant", "layer": "Linear", "val": 0},)

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        hidden_dim: int | None = None,
        act_cfg: ActivationConfig = {"type": "Tanh"},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_classes(num_classes)
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.hidden_dim = hidden_dim
        layers: list[tuple[str, nn.Module]] = []
        if hidden_dim is not None:
            layers = [("pre_logits", nn.Linear(in_channels, hidden_dim)), ("act", build_activation_layer(act_cfg))]
        layers += [("head", nn.Linear(in_channels if hidden_dim is None else hidden_dim, num_classes))]
        self.layers = nn.Sequential(OrderedDict(layers))

    def init_weights(self) -> None:
        """Initialise the weights; those of the hidden layer with the variance 1 / in_channels."""
        super().init_weights()
        if self.hidden_dim is not None and not self.is_pretrained:
            hidden = self.layers.get_submodule("pre_logits")
            nn.init.trunc_normal_(hidden.weight, std=self.in_channels**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(hidden.bias)  # type: ignore[arg-type]

    def pre_logits(self, feats: Features) -> Tensor:
        """Return the class token (N, in_channels) of the last stage, or with `hidden_dim` what the last layer gets.

        A stage may also be a pair of patch tokens and class token.
        """
        token = super().pre_logits(feats)
        token = _vectors(token if isinstance(token, Tensor) else token[-1], self.in_channels)
        for layer in self.layers[:-1]:
            token = layer(token)
        return token

    def forward(self, feats: Features) -> Tensor:
        """Return scores (N, num_classes)."""
        return self.layers[-1](self.pre_logits(feats))


@MODELS.register_module()
class MultiLabelClsHead(ScoreHead):
    """Multi-label classification head without parameters: its input are scores.

    Args:
        loss: Called as `loss(score, target, avg_factor=N)` with targets (N, C) of 0 and 1 and the number N of images.
        thr: Classes of at least this probability are predicted; by default 0.5 if there is no `topk`.
        topk: So many classes are predicted, where there is no `thr`.
        init_cfg: See `Component`.
    """

    def __init__(
        self,
        loss: LossConfig = {"type": "CrossEntropyLoss", "use_sigmoid": True},  # noqa: B006  # read, never written
        thr: float | None = None,
        topk: int | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(loss, init_cfg)
        self.thr = _DEFAULT_THRESHOLD if thr is None and topk is None else thr
        self.topk = None if topk is None else as_topk(topk)[0]

    def loss(self, feats: Features, data_samples: Sequence[DataSample], **kwargs: Any) -> dict[str, Tensor]:
        """Return the loss of a batch.

        Args:
            feats: What the neck or the backbone gives.
            data_samples: One per image, each with `gt_score` or with `gt_label`, any number of class indices.
            kwargs: Passed to the loss.
        """
        score = self(feats)
        target = torch.stack([scores_of_labels(sample, score.shape[1]) for sample in data_samples]).to(score.device)
        return {"loss": self.loss_module(score, target, avg_factor=len(score), **kwargs)}

    def _probabilities(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def _labels(self, probabilities: Tensor) -> Tensor:
        if self.thr is not None:
            return (probabilities >= self.thr).nonzero()[:, 0]
        assert self.topk is not None
        return probabilities.topk(min(self.topk, len(probabilities))).indices


@MODELS.register_module()
class MultiLabelLinearClsHead(LinearScoreHead, MultiLabelClsHead):
    """Multi-label classification by one linear layer."""


def _vectors(features: Tensor, in_channels: int) -> Tensor:
    """Return `features` themselves, of shape (N, in_channels).

    Raises:
        WrongArgumentError: They have another shape; a linear layer would take maps whose width happens to fit.
    """
    if features.ndim != 2:
        raise WrongArgumentError(
            f"the head gets features of shape {tuple(features.shape)}, expected (N, {in_channels}); "
            "put a neck before it that pools maps, such as {type: GlobalAveragePooling}"
        )
    if features.shape[1] != in_channels:
        raise WrongArgumentError(
            f"in_channels={in_channels} of the head, and it gets features of {features.shape[1]} channels; "
            f"give in_channels={features.shape[1]}"
        )
    return features


def _check_classes(num_classes: int) -> None:
    if num_classes <= 0:
        raise WrongArgumentError(f"num_classes={num_classes} must be a positive integer")


def scores_of_labels(sample: DataSample, num_classes: int) -> Tensor:
    """Return the true score of each class (C,), 1 for those that a sample names."""
    if "gt_score" in sample:
        return sample.gt_score.float()
    label: Tensor = sample.gt_label
    return torch.zeros(num_classes, device=label.device).index_fill(0, label, 1.0)


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
