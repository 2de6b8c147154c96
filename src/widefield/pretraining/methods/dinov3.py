"""DINOv3."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from widefield.components.models.contrastive_models import momentum_copy
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Auto, Count, Run, Share, Steps, Weight, for_run
from widefield.pretraining.methods.dinov2 import DINOv2
from widefield.pretraining.methods.transformers import opened
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import LocalViews, RandomResize

MOMENTUM = 0.994
"""Momentum of the teacher, in long runs."""


@METHODS.register_module("dinov3")
class DINOv3(DINOv2):
    """DINOv2 with constant schedules and, late in the run, Gram anchoring: patches stay as alike as an early teacher saw them.

    Siméoni et al., DINOv3, https://arxiv.org/abs/2508.10104: the loss of DINOv2, plus `gram_weight` times that of Gram anchoring,
    see `gram_loss`, between the patches of the student, of which some are hidden from it, and those of the Gram teacher, an early
    copy of the teacher. It counts from `gram_start_step` on; then the Gram teacher is copied anew a few times. Learning rate,
    weight decay and momentum are constant after the warm-up, and the student normalises what it makes of local views by a layer
    of its own, which is not exported. Steps are those of the paper's run of 1.2 million, or the same share of a shorter one.

    Not as in the paper's run: teachers are centred by a moving mean, as those of `dinov2`, and not by Sinkhorn-Knopp; the learning
    rate is half the peak of `dinov2`, the mean of its cosine, where 7 billion weights have a tenth of that, 4e-4 for batches of
    4096; the weight of local views and the momentum stay as they are when Gram anchoring begins; and the Gram teacher sees the
    colours that the student sees.

    The model must be a vision transformer with a class token, of timm or of `widefield.components`. Rotary positions, how they are
    changed at random and registers are the model's: model="timm/vit_small_patch16_dinov3", model_args={"rope_rescale_coords": 2}
    as in the paper. It may have other positions.

    Args:
        embedding, run: See `Method`.
        momentum_start, momentum_end: Of the teacher, see `DINOv2`; "auto" is `MOMENTUM`, less in a run of few steps, and as at the
            start.
        layer_decay, weight_decay_end: See `DINOv2`.
        gram_weight: Of Gram anchoring.
        gram_copy_step: Step at which the Gram teacher is copied from the teacher; at most a sixth of the run, and no later than the
            next. 0 keeps the weights that the run begins with.
        gram_start_step: Step from which Gram anchoring counts; at most 5 sixths of the run.
        gram_update_steps: Steps from there, and from each other, after which it is copied anew; at most a 120th of the run.
        gram_updates: How often it is.
        gram_scale: How many times larger a global view is than what student and teacher see of it. The Gram teacher sees it in
            full, and its map is resized to theirs. The paper ends with 2, and an `image_size` of 512.
        kwargs: Those of `DINOv2`.

    Raises:
        ValueError: The model is something else.
    """

    name: ClassVar[str] = "dinov3"
    transforms = replace(DINOv2.transforms, image_size=256, local_view=LocalViews(8, 112, RandomResize(0.05, 0.32)))
    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        **DINOv2.fixed,
        "min_lr": (None, "the learning rate is constant after the warm-up"),
    }
    optim = Optim(
        (AdamW(2e-3, (0.9, 0.99), weight_decay=0.04), SGD(0.015, 0.9, 1e-4), LARS(0.15, 0.9, 1e-6)),
        1024,
        lr_scale_method="sqrt",
        gradient_clip_val=3.0,
        end=1.0,
    )

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        momentum_start: Share | Auto = "auto",
        momentum_end: Share | Auto = "auto",
        layer_decay: Share = 0.98,
        weight_decay_end: Weight | Auto = "auto",
        gram_weight: Weight = 2.0,
        gram_copy_step: Steps = 200_000,
        gram_start_step: Steps = 1_000_000,
        gram_update_steps: Count = 10_000,
        gram_updates: Steps = 3,
        gram_scale: Count = 1,
        **kwargs: Any,
    ) -> None:
        first_momentum = for_run(MOMENTUM, run.steps) if momentum_start == "auto" else momentum_start
        super().__init__(
            embedding,
            run,
            momentum_start=first_momentum,
            momentum_end=first_momentum if momentum_end == "auto" else momentum_end,
            layer_decay=layer_decay,
            weight_decay_end=weight_decay_end,
            **kwargs,
        )
        self.local_norm = copy.deepcopy(self.transformer.norm)
        self.gram_embedding = momentum_copy(self.teacher_embedding).eval()
        self.gram_teacher = opened(self.gram_embedding, self.name)
        self.gram_weight, self.gram_scale = gram_weight, gram_scale
        self.gram_start = min(gram_start_step, run.steps * 5 // 6)
        period = max(1, min(gram_update_steps, run.steps // 120))
        first = min(gram_copy_step, run.steps // 6, self.gram_start)
        self.gram_copies = (first, *(self.gram_start + period * (k + 1) for k in range(gram_updates)))
        """Steps ahead of which the Gram teacher becomes the teacher."""

    def before_step(self, step: int) -> None:
        super().before_step(step)
        if step in self.gram_copies:
            self.gram_embedding.load_state_dict(self.teacher_embedding.state_dict())

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        whole = torch.cat(list(views[:2]))
        losses, patches = self.loss_and_patches([*map(self._smaller, views[:2]), *views[2:]], step)
        if self.gram_weight and step >= self.gram_start:
            gram = gram_loss(patches, self._gram_patches(whole))
            losses["loss"] = losses["loss"] + self.gram_weight * gram
            losses["train_loss/gram"] = gram.detach()
        return losses

    def _smaller(self, images: Tensor) -> Tensor:
        """Return a global view (B, C, H, W) as student and teacher see it.

        Raises:
            ValueError: Patches would not fill it.
        """
        scale, (height, width) = self.gram_scale, images.shape[-2:]
        if scale == 1:
            return images
        unit = scale * self.transformer.patch_size
        if height % unit or width % unit:
            raise ValueError(
                f"global views have {height} x {width} pixels, which are made {scale} times smaller (gram_scale) and cut into "
                f"patches of {self.transformer.patch_size}; give multiples of {unit} as transform_args={{'image_size': ...}}"
            )
        return _resized(images, (height // scale, width // scale))

    @torch.no_grad()
    def _gram_patches(self, images: Tensor) -> Tensor:
        """Return what the Gram teacher makes of images (B, C, H, W), as many patches (B, L, width) as the student has."""
        model = self.gram_teacher
        grid = model.grid(images)
        patches = model.layers(model.tokens(images), grid)[-1][:, model.prefix :]
        if self.gram_scale == 1:
            return patches
        maps = patches.transpose(1, 2).unflatten(2, grid)
        return _resized(maps, (grid[0] // self.gram_scale, grid[1] // self.gram_scale)).flatten(2).transpose(1, 2)


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean square of the entries of X X^T - Y Y^T, of patches (B, L, D) whose rows are scaled to length 1 as X and Y.

    The loss of Gram anchoring of Siméoni et al., https://arxiv.org/abs/2508.10104, who write the squared Frobenius norm of that
    difference; the published code takes the mean, to which the weight 2 belongs, and a Gram matrix for each view. It is computed
    in the precision of the patches also where autocast would take less.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (unit @ unit.transpose(1, 2) for unit in (F.normalize(x, dim=-1) for x in (student, teacher)))
        return F.mse_loss(ours, theirs)


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    exact = maps.to(torch.promote_types(maps.dtype, torch.float32))  # the CPU resizes no bfloat16
    return F.interpolate(exact, size, mode="bicubic", antialias=True).to(maps.dtype)
