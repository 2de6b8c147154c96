"""DINOv2."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightly.loss import IBOTPatchLoss, KoLeoLoss
from lightly.models.modules.heads import DINOProjectionHead
from torch import Tensor, nn

from widefield.components.losses.embedding_losses import joint
from widefield.components.models.contrastive_models import momentum_copy
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Auto, Run, Share, Temperature, Weight, for_each, for_run
from widefield.pretraining.methods.dino import DINO
from widefield.pretraining.methods.transformers import block_masks, mask_token, opened
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim, parameter_groups
from widefield.pretraining.transform_args import LocalViews, RandomResize

MOMENTUM = 0.992
"""Momentum of the teacher at the start, in long runs."""


@METHODS.register_module("dinov2")
class DINOv2(DINO):
    """DINO on class tokens, iBOT on hidden patches, and class tokens kept apart; the teacher is what is exported.

    Oquab et al., DINOv2: learning robust visual features without supervision, https://arxiv.org/abs/2304.07193: the loss of DINO,
    plus `patch_weight` times the same loss between a hidden patch of the student and that patch as the teacher sees it (Zhou et
    al., https://arxiv.org/abs/2111.07832), plus `koleo_weight` times -log of the distance of class tokens to their nearest
    neighbours (Sablayrolles et al., https://arxiv.org/abs/1806.03198), summed over the two global views. Teachers are centred by a
    moving mean. Weight decay rises, and layers near the pixels learn more slowly.

    The model must be a vision transformer with a class token, of timm or of `widefield.components`.

    Args:
        embedding, run: See `Method`.
        student_temp, teacher_temp: Temperatures; that of the teacher begins with `warmup_teacher_temp`.
        momentum_start: Of the teacher at the start; "auto" is `MOMENTUM`, less in a run of few steps.
        center_momentum: Of the means that are taken from the teacher's outputs.
        patch_weight, koleo_weight: Of these parts of the loss.
        ibot_separate_head: Patches have a head of their own; False: that of the class tokens.
        mask_ratio_min, mask_ratio_max: Smallest and largest share of hidden patches in a view that has any.
        mask_probability: Share of the global views that have some, rounded up to whole views.
        layer_decay: Factor of the learning rate from each layer of the transformer to the one before it.
        weight_decay_end: At the last step; it rises as half a cosine.
        kwargs: Those of `DINO`, for both heads.

    Raises:
        ValueError: The model is something else, or no patch would be hidden.
    """

    name: ClassVar[str] = "dinov2"
    needs_transformer = True
    transforms = replace(
        DINO.transforms, random_resize=RandomResize(0.32, 1.0), local_view=LocalViews(8, 96, RandomResize(0.05, 0.32))
    )
    auto_steps = 125_000
    also_called: ClassVar[Mapping[str, str]] = {
        "dino_bottleneck_dim": "bottleneck_dim",
        "ibot_loss_weight": "patch_weight",
        "koleo_loss_weight": "koleo_weight",
        "layerwise_decay": "layer_decay",
        "teacher_temp_start": "warmup_teacher_temp",
        "teacher_temp_end": "teacher_temp",
        "teacher_temp_warmup_steps": "warmup_teacher_temp_steps",
    }
    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "ibot_bottleneck_dim": (256, "bottleneck_dim is that of both heads"),
        "student_freeze_backbone_steps": (0, "all of the model trains from the first step on"),
        "dino_loss_weight": (1.0, "it is 1; scale ibot_loss_weight, koleo_loss_weight and optim_args.lr instead"),
        "center_method": ("softmax", "the teacher is centred by a moving mean, as 'softmax' does"),
        "min_lr": (1e-6, "the learning rate ends at a thousandth of optim_args.lr"),
        "patch_embed_lr_multiplier": (0.2, "patches are embedded at the learning rate of layer_decay"),
    }
    optim = Optim(
        (AdamW(4e-3, weight_decay=0.04), SGD(0.03, 0.9, 1e-4), LARS(0.3, 0.9, 1e-6)),
        1024,
        lr_scale_method="sqrt",
        gradient_clip_val=3.0,
    )

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        student_temp: Temperature = 0.1,
        teacher_temp: Temperature = 0.07,
        momentum_start: Share | Auto = "auto",
        center_momentum: Share = 0.9,
        patch_weight: Weight = 1.0,
        koleo_weight: Weight = 0.1,
        ibot_separate_head: bool = True,
        mask_ratio_min: Share = 0.1,
        mask_ratio_max: Share = 0.5,
        mask_probability: Share = 0.5,
        layer_decay: Share = 0.9,
        weight_decay_end: Weight | Auto = 0.4,
        **kwargs: Any,
    ) -> None:
        if not 0 < mask_ratio_min <= mask_ratio_max or not mask_probability:
            raise ValueError(
                f"method_args: mask_ratio_min={mask_ratio_min}, mask_ratio_max={mask_ratio_max} and "
                f"mask_probability={mask_probability} must be above 0, and the first at most the second; patch_weight=0 leaves the "
                "loss of hidden patches out"
            )
        transformer = opened(embedding, self.name, class_token=True)
        super().__init__(
            embedding,
            replace(run, embedding_dim=transformer.width),
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            momentum_start=for_run(MOMENTUM, run.steps) if momentum_start == "auto" else momentum_start,
            center_momentum=center_momentum,
            weight_decay_end=weight_decay_end,
            **kwargs,
        )
        self.transformer = transformer
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.layer_decay = layer_decay
        self.mask_ratios, self.mask_probability = (mask_ratio_min, mask_ratio_max), mask_probability
        self.separate = ibot_separate_head
        self.patch_head = self.make_head() if self.separate else self.head
        self.mask_token = mask_token(self.transformer)
        self.teacher_patch_head = momentum_copy(self.patch_head) if self.separate else self.teacher_head
        self.teacher = opened(self.teacher_embedding, self.name)
        outputs = self.head.last_layer.out_features
        self.ibot = IBOTPatchLoss(outputs, student_temp=student_temp, center_momentum=center_momentum)
        self.koleo = KoLeoLoss()
        self.local_norm: nn.Module | None = None  # normalises what the student makes of local views; None: the model's

    def heads(self) -> list[tuple[DINOProjectionHead, nn.Module]]:
        return [*super().heads(), *([(self.patch_head, self.teacher_patch_head)] if self.separate else [])]

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        return self.loss_and_patches(views, step)[0]

    def loss_and_patches(self, views: Sequence[Tensor], step: int) -> tuple[dict[str, Tensor | float], Tensor]:
        """Return the loss, and the student's patches (2 B, L, width) of the two global views, some of them hidden from it."""
        whole, prefix = torch.cat(list(views[:2])), self.transformer.prefix
        grid = self.transformer.grid(whole)
        mask = random_masks(len(whole), grid, self.mask_ratios, self.mask_probability).to(whole.device)
        hidden = mask.flatten(1)
        with torch.no_grad():
            seen = self.teacher.layers(self.teacher.tokens(whole), grid)[-1]
            teachers = self.teacher_head(seen[:, 0]).chunk(2)
            patch_targets = self.teacher_patch_head(seen[:, prefix:][hidden])
        tokens = self.transformer.layers(self.transformer.tokens(whole, mask, self.mask_token), grid)[-1]
        students = list(self.head(tokens[:, 0]).chunk(2))
        students += for_each(views[2:], self._of_local_views)
        temperature = self.temperature(step)
        dino = self.criterion(list(teachers), students, teacher_temp=temperature)
        ibot = self.ibot(patch_targets, self.patch_head(tokens[:, prefix:][hidden]), mask, teacher_temp=temperature)
        koleo = torch.stack([self.koleo(joint(view)) for view in tokens[:, 0].chunk(2)]).sum()
        losses: dict[str, Tensor | float] = {
            "loss": dino + self.patch_weight * ibot + self.koleo_weight * koleo,
            "train_loss/dino": dino.detach(),
            "train_loss/ibot": ibot.detach(),
            "train_loss/koleo": koleo.detach(),
            **self.schedules(step),
        }
        return losses, tokens[:, prefix:]

    def _of_local_views(self, images: Tensor) -> Tensor:
        grid = self.transformer.grid(images)
        tokens = self.transformer.layers(self.transformer.tokens(images), grid, self.local_norm)[-1]
        return self.head(tokens[:, 0])  # type: ignore[no-any-return]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        model = self.transformer
        depths = {parameter: model.depth_of(name) for name, parameter in model.model.named_parameters()}

        def scale(parameter: nn.Parameter) -> float:
            return self.layer_decay ** (model.depth + 1 - depths.get(parameter, model.depth + 1))  # type: ignore[no-any-return]

        return parameter_groups(self, weight_decay, scale, list(self.embedding.parameters()))


def random_masks(count: int, grid: tuple[int, int], ratios: tuple[float, float], probability: float) -> Tensor:
    """Return masks (count, rows, columns): a share `probability` of them, rounded up, hides shares spread over `ratios`."""
    masked, (low, high) = math.ceil(count * probability), ratios
    shares = low + (high - low) * (torch.arange(masked) + torch.rand(masked)) / masked
    masks = block_masks(grid, shares.tolist())
    masks += [torch.zeros(grid, dtype=torch.bool)] * (count - masked)
    return torch.stack(masks)[torch.randperm(count)]
