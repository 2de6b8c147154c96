"""BEiT, versions 1 and 2."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widefield.components.heads.self_supervised_heads import BEiTV1Head
from widefield.components.layers.transformer_layers import Resolution
from widefield.components.necks.masked_necks import BEiTV2Neck
from widefield.components.target_generators.target_generators import VQKD, DALLEEncoder
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Run, Share
from widefield.pretraining.methods.transformers import MaskedMethod, mask_token, opened
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import ColorJitter
from widefield.registry import MODELS

DALLE_STRIDE = 8
"""Pixels of a visual token of DALL-E's encoder."""


@METHODS.register_module("beit")
class BEiT(MaskedMethod):
    """Predicts the visual tokens of hidden patches, which a target generator makes that was trained before.

    Cross-entropy over the hidden patches. With DALLEEncoder it is version 1 (Bao et al., https://arxiv.org/abs/2106.08254), with
    VQKD version 2 (Peng et al., https://arxiv.org/abs/2208.06366), which predicts them a second time from the class token and an
    early layer. The model must be a vision transformer, of timm or of `widefield.components`; its own mask token is used if it has
    one.

    Args:
        embedding, run: See `Method`.
        target_generator: `{"type": "DALLEEncoder", "init_cfg": {"type": "Pretrained", "checkpoint": FILE}}`, the same for VQKD with
            its `encoder_config`, or one that is made. Random weights are refused unless it has `allow_random_weights`.
        mask_ratio: Share of the patches that are hidden, in blocks.
        early_layers: Layers before the early features of version 2; None: 3 quarters of all.

    Raises:
        ValueError: The model is something else, or the target generator is unknown or has no weights.
    """

    transforms = replace(MaskedMethod.transforms, color_jitter=ColorJitter(1.0, 1.0, 0.4, 0.4, 0.4, 0.0))
    optim = Optim(
        (AdamW(1.5e-3, (0.9, 0.98), weight_decay=0.05), SGD(0.1, 0.9, 1e-4), LARS(0.3, 0.9, 1e-6)),
        2048,
        gradient_clip_val=3.0,
    )

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        target_generator: Any,
        mask_ratio: Share = 0.4,
        early_layers: int | None = None,
    ) -> None:
        super().__init__(embedding, run, "beit", mask_ratio)
        model = self.transformer
        generator = _made(target_generator)
        self.companions = (generator,)
        self.mask_token = mask_token(model)
        self.head = BEiTV1Head(model.width, _vocabulary(generator), {"type": "CrossEntropyLoss"})
        self.head.init_weights()
        self.neck: BEiTV2Neck | None = None
        self.early = (model.depth * 3 // 4 if early_layers is None else early_layers) - 1
        if isinstance(generator, VQKD):
            opened(embedding, "beit", class_token=True)
            if not 0 <= self.early < model.depth:
                raise ValueError(f"method_args.early_layers={self.early + 1} must be from 1 to {model.depth}")
            arch = {"embed_dims": model.width, "num_layers": model.depth, "num_heads": model.heads}
            self.neck = BEiTV2Neck(
                early_layers=self.early + 1, backbone_arch={**arch, "feedforward_channels": 4 * model.width}
            )
            self.neck.init_weights()
        normalize = run.normalize  # the target generator has one of its own
        for name, values in (("mean", normalize.mean), ("std", normalize.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        losses = torch.stack([self.of_view(view) for view in views]).mean(0)
        if self.neck is None:
            return {"loss": losses[0]}
        return {
            "loss": losses.sum(),
            "train_loss/final": losses[0].detach(),
            "train_loss/class_token": losses[1].detach(),
        }

    def of_view(self, images: Tensor) -> Tensor:
        """The loss of version 1, or both of version 2, (1,) or (2,)."""
        grid, prefix = self.transformer.grid(images), self.transformer.prefix
        mask = self.masks(images, grid)
        layers = self.transformer.layers(self.transformer.tokens(images, mask, self.mask_token), grid)
        targets, mask = self.targets(images, grid), mask.flatten(1)
        if self.neck is None:
            return self.head.token_loss(layers[-1][:, prefix:], targets, mask)[None]
        early, final = (torch.cat([x[:, :1], x[:, prefix:]], dim=1) for x in (layers[self.early], layers[-1]))
        features = self.neck((early, final), self.transformer.shared_bias(grid))
        return torch.stack([self.head.token_loss(patches, targets, mask) for patches in features])

    def targets(self, images: Tensor, grid: Resolution) -> Tensor:
        """Visual tokens (B, L), int64, of normalised images (B, C, H, W)."""
        unit = images * self.std + self.mean
        generator = self.companions[0]
        if isinstance(generator, VQKD):
            tokens: Tensor = generator(2 * unit - 1)
            return tokens
        size = grid[0] * DALLE_STRIDE, grid[1] * DALLE_STRIDE
        small = F.interpolate(unit, size, mode="bilinear", antialias=True)
        return generator(0.1 + 0.8 * small).argmax(dim=1).flatten(1)  # type: ignore[no-any-return]


def _made(described: Any) -> nn.Module:
    generator = MODELS.build(described)
    if not isinstance(generator, (DALLEEncoder, VQKD)):
        raise ValueError(
            f"method_args.target_generator is a {type(generator).__name__}; give a DALLEEncoder (version 1) or VQKD (version 2)"
        )
    if generator is not described:
        generator.init_weights()  # loads the checkpoint
    return generator


def _vocabulary(generator: Any) -> int:
    """Different visual tokens."""
    if isinstance(generator, VQKD):
        return generator.quantize.embedding.num_embeddings
    return len(generator.get_submodule("blocks.output.conv").w)  # type: ignore[arg-type]
