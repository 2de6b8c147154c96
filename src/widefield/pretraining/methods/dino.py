"""DINO."""

import math
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead
from lightly.utils.scheduler import linear_warmup_schedule
from torch import Tensor, nn

from widefield.components.models.contrastive_models import follow, momentum_copy, rising
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, Method, Run, Share, Steps, Temperature, for_each, for_run
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

    Caron et al., Emerging properties in self-supervised vision transformers, https://arxiv.org/abs/2104.14294. What is None depends
    on the number of images: few need fewer outputs and a teacher that moves faster.

    Args:
        embedding, run: See `Method`.
        hidden_dim, bottleneck_dim, output_dim: Widths of the head.
        batch_norm: Batch norm in the head.
        student_temp, teacher_temp: Temperatures; that of the teacher begins with `warmup_teacher_temp`.
        warmup_teacher_temp: At most `teacher_temp`. None: 0.04.
        warmup_teacher_temp_steps: Steps in which it rises; at most 3 tenths of the run.
        momentum: Of the teacher at the start; it rises to 1. None: less in a run of few steps, too.
        center_momentum: Of the mean that is taken from the teacher's outputs.
        freeze_last_layer_steps: Steps in which the last layer does not train; at most a tenth of the run.
    """

    transforms = TransformArgs(
        random_resize=RandomResize(0.14, 1.0),
        color_jitter=ColorJitter(0.8, 0.5, 0.8, 0.8, 0.4, 0.2),
        gaussian_blur=GaussianBlur(1.0),
        global_view_1=SecondView(GaussianBlur(0.1), Solarize(0.2)),
        local_view=LocalViews(),
    )
    optim = Optim((SGD(0.03, 0.9, 1e-4), AdamW(5e-4, weight_decay=0.04), LARS(0.3, 0.9, 1e-6)), clip=3.0)

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        hidden_dim: Count = 2048,
        bottleneck_dim: Count = 256,
        output_dim: Count | None = None,
        batch_norm: bool = False,
        student_temp: Temperature = 0.1,
        teacher_temp: Temperature | None = None,
        warmup_teacher_temp: Temperature | None = None,
        warmup_teacher_temp_steps: Steps = 37_500,
        momentum: Share | None = None,
        center_momentum: Share = 0.9,
        freeze_last_layer_steps: Steps = 1_250,
    ) -> None:
        super().__init__(embedding, run)
        size = run.dataset_size
        if output_dim is None:
            output_dim = next((dim for images, dim in OUTPUT_DIMS if size < images), 65536)
        self.teacher_temp = between(size, 0.02, 0.07) if teacher_temp is None else teacher_temp
        self.momentum = for_run(between(size, 0.99, 0.996), run.steps) if momentum is None else momentum
        self.warmup_temp = min(self.teacher_temp, 0.04 if warmup_teacher_temp is None else warmup_teacher_temp)
        self.warmup_steps = min(warmup_teacher_temp_steps, run.steps * 3 // 10)
        self.make_head = partial(
            projection_head,
            (run.embedding_dim, hidden_dim, bottleneck_dim, output_dim),
            batch_norm,
            min(freeze_last_layer_steps, run.steps // 10),
        )
        self.head = self.make_head()
        self.teacher_embedding, self.teacher_head = momentum_copy(embedding), momentum_copy(self.head)
        self.criterion = DINOLoss(output_dim, student_temp=student_temp, center_momentum=center_momentum)

    def heads(self) -> list[tuple[DINOProjectionHead, nn.Module]]:
        """Return each head of the student with that of the teacher."""
        return [(self.head, self.teacher_head)]

    def before_step(self, step: int) -> None:
        pairs = [(self.embedding, self.teacher_embedding), *self.heads()]
        follow(pairs, rising(step, self.run.steps, self.momentum))

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        students = for_each(views, lambda images: self.head(self.embedding.vectors(images)))
        with torch.no_grad():
            teachers = self.teacher_head(self.teacher_embedding.vectors(torch.cat(list(views[:2])))).chunk(2)
        loss = self.criterion(list(teachers), students, teacher_temp=self.temperature(step))
        return {"loss": loss, **self.schedules(step)}

    def temperature(self, step: int) -> float:
        """Return the temperature of the teacher."""
        return linear_warmup_schedule(step, self.warmup_steps, self.warmup_temp, self.teacher_temp)  # type: ignore[no-any-return]

    def schedules(self, step: int) -> dict[str, Tensor | float]:
        """Return what the losses are logged with."""
        return {
            "schedule/momentum": rising(step, self.run.steps, self.momentum),
            "schedule/teacher_temp": self.temperature(step),
        }

    def after_backward(self, step: int) -> None:
        for head, _ in self.heads():
            head.cancel_last_layer_gradients(step)

    def exported(self) -> EmbeddingModel:
        teacher: EmbeddingModel = self.teacher_embedding
        return teacher


def between(size: int, small: float, large: float) -> float:
    """From `small` for at most 20 thousand images to `large` for a million, in proportion to the logarithm."""
    share = math.log(max(size, 1) / SMALL) / math.log(LARGE / SMALL)
    return small + (large - small) * min(max(share, 0.0), 1.0)


class UnitRows(nn.Linear):
    """A linear layer without bias whose rows are scaled to length 1: weight normalisation with a fixed gain of 1."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, nn.functional.normalize(self.weight, dim=1))


def projection_head(sizes: tuple[int, int, int, int], batch_norm: bool, freeze_last_layer: int) -> DINOProjectionHead:
    """DINO's head of the widths input, hidden, bottleneck and output, whose last layer does not train in the first steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates weight_norm, which is replaced below
        head = DINOProjectionHead(*sizes, batch_norm, freeze_last_layer)
    head.last_layer = UnitRows(sizes[2], sizes[3], bias=False)  # the other can neither be copied nor pickled
    return head
