"""Masked autoencoders."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from widefield.components.heads.self_supervised_heads import MAEPretrainHead
from widefield.components.layers.transformer_layers import Resolution, leave_out, sincos_position_embedding
from widefield.components.losses.reconstruction_losses import PixelReconstructionLoss
from widefield.components.necks.masked_necks import MAEPretrainDecoder
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Count, Run, Share
from widefield.pretraining.methods.transformers import MaskedMethod
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import RandomResize


@METHODS.register_module("mae")
class MAE(MaskedMethod):
    """Predicts the pixels of patches that the model did not see from those that it saw.

    He et al., Masked autoencoders are scalable vision learners, https://arxiv.org/abs/2111.06377: the mean squared difference over
    the hidden patches. The model must be a vision transformer, of timm or of `widefield.components`, and views square.

    Args:
        embedding, run: See `Method`.
        mask_ratio: Share of the patches that are hidden, above 0 and below 1; one is seen at least.
        norm_pix: Each patch is standardised before it is compared.
        decoder_dim, decoder_depth, decoder_heads: Width, layers and attention heads of the decoder.

    Raises:
        ValueError: The model is something else.
    """

    transforms = replace(MaskedMethod.transforms, random_resize=RandomResize(0.2, 1.0))
    optim = Optim((AdamW(1.5e-4, (0.9, 0.95), weight_decay=0.05), SGD(0.1, 0.9, 1e-4), LARS(0.3, 0.9, 1e-6)))

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        mask_ratio: Share = 0.75,
        norm_pix: bool = True,
        decoder_dim: Count = 512,
        decoder_depth: Count = 8,
        decoder_heads: Count = 16,
    ) -> None:
        super().__init__(embedding, run, "mae", mask_ratio)
        model = self.transformer
        if model.needs_all_patches:
            raise ValueError(
                f"{type(model.model).__name__} has relative or rotary positions, so no patch can be left out; use a "
                "VisionTransformer without, or method='beit'"
            )
        self.decoder = Decoder(model.patch_size, model.channels, model.width, decoder_dim, decoder_depth, decoder_heads)
        self.head = MAEPretrainHead(PixelReconstructionLoss("L2"), norm_pix, model.patch_size, model.channels)

    def of_view(self, images: Tensor) -> Tensor:
        grid, prefix = self.transformer.grid(images), self.transformer.prefix
        tokens = self.transformer.tokens(images)
        kept = max(1, round(grid[0] * grid[1] * (1 - self.mask_ratio)))
        seen, mask, place = leave_out(tokens[:, prefix:], kept)
        latent = self.transformer.layers(torch.cat([tokens[:, :prefix], seen], dim=1), None)[-1]
        visible = latent[:, prefix:]
        first = latent[:, :1] if self.transformer.has_class_token else visible.mean(1, keepdim=True)
        predicted = self.decoder.on(grid)(torch.cat([first, visible], dim=1), place)  # without registers
        return self.head.loss(predicted, images, mask)


class Decoder(MAEPretrainDecoder):
    """The decoder for grids of any size: its positions are computed for that of the views, and stand in no checkpoint."""

    def __init__(self, patch_size: int, channels: int, width: int, dim: int, depth: int, heads: int) -> None:
        init = {"type": "Xavier", "distribution": "uniform", "layer": "Linear"}
        super().__init__(1, patch_size, channels, width, dim, depth, heads, init_cfg=init)
        del self.decoder_pos_embed
        self._grid: Resolution = (0, 0)
        self.init_weights()

    def on(self, grid: Resolution) -> Any:
        """This decoder, for `grid` patches."""
        if grid != self._grid:
            self._grid, self.num_patches = grid, grid[0] * grid[1]
            positions = sincos_position_embedding(grid, self.mask_token.shape[-1], cls_token=True)
            self.register_buffer("decoder_pos_embed", positions.to(self.mask_token), persistent=False)
        return self
