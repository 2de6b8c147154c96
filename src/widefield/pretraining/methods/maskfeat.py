"""MaskFeat."""

from dataclasses import replace

from torch import Tensor, nn

from widefield.components.losses.reconstruction_losses import PixelReconstructionLoss
from widefield.components.target_generators.target_generators import HOGGenerator
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Run
from widefield.pretraining.methods.transformers import MaskedMethod, mask_token
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim
from widefield.pretraining.transform_args import RandomResize


@METHODS.register_module("maskfeat")
class MaskFeat(MaskedMethod):
    """Predicts histograms of oriented gradients of hidden patches.

    Wei et al., Masked feature prediction for self-supervised visual pre-training, https://arxiv.org/abs/2112.09133: the mean
    squared difference over the hidden patches. Histograms are those of the normalised view. The model must be a vision
    transformer, of timm or of `widefield.components`; its own mask token is used if it has one.

    Args:
        embedding, run: See `Method`.
        mask_ratio: Share of the patches that are hidden, in blocks.
        nbins: Angles of a histogram.
        cell: Side of the part of a patch that has a histogram of its own, in pixels; None: half a patch.

    Raises:
        ValueError: The model is something else.
    """

    transforms = replace(MaskedMethod.transforms, random_resize=RandomResize(0.5, 1.0))
    optim = Optim((AdamW(2e-4, weight_decay=0.05), SGD(0.1, 0.9, 1e-4), LARS(0.3, 0.9, 1e-6)), gradient_clip_val=0.02)

    def __init__(
        self, embedding: EmbeddingModel, run: Run, mask_ratio: float = 0.4, nbins: int = 9, cell: int | None = None
    ) -> None:
        super().__init__(embedding, run, "maskfeat", mask_ratio)
        model = self.transformer
        side = model.patch_size
        pool = max(1, side // 2) if cell is None else cell
        self.companions = (HOGGenerator(nbins, pool, gaussian_window=side, patch_size=side),)
        self.mask_token = mask_token(model)
        self.head = nn.Linear(model.width, model.channels * nbins * (side // pool) ** 2)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.criterion = PixelReconstructionLoss("L2")

    def of_view(self, images: Tensor) -> Tensor:
        grid = self.transformer.grid(images)
        mask = self.masks(images, grid)
        tokens = self.transformer.tokens(images, mask, self.mask_token)
        predicted = self.head(self.transformer.layers(tokens, grid)[-1][:, self.transformer.prefix :])
        targets = self.companions[0](images).to(predicted.dtype)
        loss: Tensor = self.criterion(predicted, targets, mask.flatten(1).to(predicted.dtype))
        return loss
