"""DINO."""

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.utils.scheduler import linear_warmup_schedule
from torch import Tensor, nn

from widefield.components.models.contrastive_models import follow, momentum_copy, rising
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import (
    Auto,
    Count,
    Method,
    Run,
    Share,
    Steps,
    Temperature,
    Weight,
    for_each,
    for_run,
)
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import (
    ColorJitter,
    GaussianBlur,
    LocalViews,
    RandomResize,
    SecondView,
    Solarize,
    TransformArgs,
)

OUTPUT_DIMS = ((20_000, 1024), (50_000, 2048), (100_000, 4096), (200_000, 16384), (500_000, 32768))
"""Outputs of the head for fewer images than the first number; 65536 for more."""

SMALL, LARGE = 20_000, 1_000_000
"""Numbers of images between which momentum and temperature of the teacher go from one value to another."""


@METHODS.register_module("dino")
class DINO(Method):
    """All views predict what a slowly moving copy, the teacher, says of the global ones; the teacher is what is exported.

    Caron et al., Emerging properties in self-supervised vision transformers, https://arxiv.org/abs/2104.14294. What is "auto"
    depends on the number of images (few need fewer outputs and a teacher that moves faster) or on the steps of the run.

    Args:
        embedding, run: See `Method`.
        hidden_dim, bottleneck_dim, output_dim: Widths of the head.
        batch_norm: Batch norm in the head.
        norm_last_layer: Keep the rows of the last layer at length 1; without, their lengths train.
        student_temp, teacher_temp: Temperatures; that of the teacher begins with `warmup_teacher_temp`.
        warmup_teacher_temp: At most `teacher_temp`; "auto" is 0.04.
        warmup_teacher_temp_steps: Steps in which it rises; "auto" is 37500.
        warmup_teacher_temp_max_steps_fraction: Share of the run in which it has risen at the latest.
        momentum_start, momentum_end: Of the teacher, from the first step to the last; "auto" is less in a run of few steps, too.
        center_momentum: Of the mean that is taken from the teacher's outputs.
        student_freeze_last_layer_steps: Steps in which the last layer does not train; "auto" is 1250, at most a tenth of the run.
        weight_decay_start, weight_decay_end: From the first step to the last; "auto" is that of the optimizer.
        warmup_steps: Steps in which the learning rate rises.
        warmup_max_steps_fraction: Share of the run in which it has risen at the latest.
    """

    transforms = TransformArgs(
        random_resize=RandomResize(0.14, 1.0),
        color_jitter=ColorJitter(0.8, 0.5, 0.8, 0.8, 0.4, 0.2),
        gaussian_blur=GaussianBlur(1.0),
        global_view_1=SecondView(GaussianBlur(0.1), Solarize(0.2)),
        local_view=LocalViews(),
    )
    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "student_freeze_last_layer_epochs": (None, "give student_freeze_last_layer_steps"),
        "warmup_teacher_temp_epochs": (None, "give warmup_teacher_temp_steps"),
    }
    optim = Optim((SGD(0.03, 0.9, 1e-4), AdamW(5e-4, weight_decay=0.04), LARS(0.3, 0.9, 1e-6)), gradient_clip_val=3.0)

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        bottleneck_dim: Count = 256,
        output_dim: Count | Auto = "auto",
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        student_temp: Temperature = 0.1,
        teacher_temp: Temperature | Auto = "auto",
        warmup_teacher_temp: Temperature | Auto = "auto",
        warmup_teacher_temp_steps: Steps | Auto = "auto",
        warmup_teacher_temp_max_steps_fraction: Share = 0.3,
        momentum_start: Share | Auto = "auto",
        momentum_end: Share = 1.0,
        center_momentum: Share = 0.9,
        student_freeze_last_layer_steps: Steps | Auto = "auto",
        weight_decay_start: Weight | Auto = "auto",
        weight_decay_end: Weight | Auto = "auto",
        warmup_steps: Steps = 12_500,
        warmup_max_steps_fraction: Share = 0.1,
    ) -> None:
        super().__init__(embedding, run)
        size = run.dataset_size
        auto_dim = next((dim for images, dim in OUTPUT_DIMS if size < images), 65536)
        outputs = auto_dim if output_dim == "auto" else output_dim
        self.teacher_temp = between(size, 0.02, 0.07) if teacher_temp == "auto" else teacher_temp
        self.momentum = for_run(between(size, 0.99, 0.996), run.steps) if momentum_start == "auto" else momentum_start
        self.momentum_end = momentum_end
        self.warmup_temp = min(self.teacher_temp, 0.04 if warmup_teacher_temp == "auto" else warmup_teacher_temp)
        self.temp_steps = min(
            37_500 if warmup_teacher_temp_steps == "auto" else warmup_teacher_temp_steps,
            _part(run.steps, warmup_teacher_temp_max_steps_fraction),
        )
        self.lr_steps = min(warmup_steps, _part(run.steps, warmup_max_steps_fraction))
        self.decays = weight_decay_start, weight_decay_end
        freeze = student_freeze_last_layer_steps
        self.make_head = partial(
            projection_head,
            (run.embedding_dim, hidden_dim, bottleneck_dim, outputs),
            batch_norm,
            min(1_250, run.steps // 10) if freeze == "auto" else freeze,
            norm_last_layer,
        )
        self.head = self.make_head()
        self.teacher_embedding, self.teacher_head = momentum_copy(embedding), momentum_copy(self.head)
        self.criterion = DINOLoss(outputs, student_temp=student_temp, center_momentum=center_momentum)

    def heads(self) -> list[tuple[DINOProjectionHead, nn.Module]]:
        """Return each head of the student with that of the teacher."""
        return [(self.head, self.teacher_head)]

    def before_step(self, step: int) -> None:
        pairs = [(self.embedding, self.teacher_embedding), *self.heads()]
        follow(pairs, self.momentum_at(step))

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        students = for_each(views, lambda images: self.head(self.embedding.vectors(images)))
        with torch.no_grad():
            teachers = self.teacher_head(self.teacher_embedding.vectors(torch.cat(list(views[:2])))).chunk(2)
        loss = self.criterion(list(teachers), students, teacher_temp=self.temperature(step))
        return {"loss": loss, **self.schedules(step)}

    def momentum_at(self, step: int) -> float:
        """Return the momentum of the teacher."""
        return rising(step, self.run.steps, self.momentum, self.momentum_end)

    def temperature(self, step: int) -> float:
        """Return the temperature of the teacher."""
        return linear_warmup_schedule(step, self.temp_steps, self.warmup_temp, self.teacher_temp)  # type: ignore[no-any-return]

    def schedules(self, step: int) -> dict[str, Tensor | float]:
        """Return what the losses are logged with."""
        return {"schedule/momentum": self.momentum_at(step), "schedule/teacher_temp": self.temperature(step)}

    def after_backward(self, step: int) -> None:
        for head, _ in self.heads():
            head.cancel_last_layer_gradients(step)

    def weight_decay(self, start: float, step: int) -> float:
        first, last = (start if value == "auto" else value for value in self.decays)
        return rising(step, self.run.steps, first, last) if start else 0.0  # of biases and norm layers

    def warmup_steps(self, usual: int) -> int:
        return self.lr_steps

    def exported(self) -> EmbeddingModel:
        teacher: EmbeddingModel = self.teacher_embedding
        return teacher


def between(size: int, small: float, large: float) -> float:
    """From `small` for at most 20 thousand images to `large` for a million, in proportion to the logarithm."""
    share = math.log(max(size, 1) / SMALL) / math.log(LARGE / SMALL)
    return small + (large - small) * min(max(share, 0.0), 1.0)


def _part(steps: int, share: float) -> int:
    return int(steps * share + 1e-9)  # 0.3 is less than 3 / 10


class UnitRows(nn.Linear):
    """A linear layer without bias whose rows are scaled to length 1: weight normalisation with a fixed gain of 1."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, nn.functional.normalize(self.weight, dim=1))


class ScaledRows(UnitRows):
    """The same with a length of each row, `gain`, that trains."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.gain = nn.Parameter(torch.ones(out_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain


def projection_head(
    sizes: tuple[int, int, int, int], batch_norm: bool, freeze_last_layer: int, norm_last_layer: bool
) -> DINOProjectionHead:
    """DINO's head of the widths input, hidden, bottleneck and output, whose last layer does not train in the first steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates weight_norm, which is replaced below
        head = DINOProjectionHead(*sizes, batch_norm, freeze_last_layer)
    # weight_norm's can neither be copied nor pickled
    head.last_layer = UnitRows(*sizes[2:], bias=False) if norm_last_layer else ScaledRows(*sizes[2:])
    return head
