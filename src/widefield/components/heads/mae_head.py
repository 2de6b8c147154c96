"""Reconstruction of pixels."""

import math

from torch import Tensor

from widefield.components.annotations import InitConfig, LossConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.registry import MODELS

_EPS = 1e-6


@MODELS.register_module(replaceable=True)
class MAEPretrainHead(BaseModule):
    """Compares predicted patches with those of the image, for masked autoencoders.

    He et al., 2021, https://arxiv.org/abs/2111.06377.

    Args:
        loss: Called with predictions and targets (B, L, D) and the mask (B, L).
        norm_pix: Targets are standardised, patch by patch: (x - mean) / sqrt(variance + 1e-6), with the unbiased variance.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        init_cfg: See `BaseModule`.
    """

    component_kind = "head"

    def __init__(
        self,
        loss: LossConfig,
        norm_pix: bool = False,
        patch_size: int = 16,
        in_channels: int = 3,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss)
        self.norm_pix = norm_pix
        self.patch_size = patch_size
        self.in_channels = in_channels

    def patchify(self, imgs: Tensor) -> Tensor:
        """Patches (B, L, p * p * C), row by row, of images (B, C, H, H); in a patch, channels change fastest.

        Raises:
            WrongArgumentError: Images that are not square, not a multiple of the patch, or of another number of channels.
        """
        p = self.patch_size
        batch, channels, height, width = imgs.shape
        if height != width or height % p or channels != self.in_channels:
            raise WrongArgumentError(
                f"images have the shape {tuple(imgs.shape)}; give square ones of {self.in_channels} channels, "
                f"with a side that patch_size={p} divides"
            )
        n = height // p
        cells = imgs.reshape(batch, channels, n, p, n, p)
        return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, n * n, p * p * channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The images (B, C, H, H) of patches (B, L, p * p * C), the inverse of `patchify`.

        Raises:
            WrongArgumentError: Patches that make no square, or of another number of values.
        """
        p, channels = self.patch_size, self.in_channels
        batch, patches, values = x.shape
        n = math.isqrt(patches)
        if n * n != patches or values != p * p * channels:
            raise WrongArgumentError(
                f"patches have the shape {tuple(x.shape)}; give a square number of them, of {p * p * channels} values each"
            )
        cells = x.reshape(batch, n, n, p, p, channels)
        return cells.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, n * p, n * p)

    def construct_target(self, target: Tensor) -> Tensor:
        """What is to be predicted for images (B, C, H, H): their patches, standardised with `norm_pix`."""
        target = self.patchify(target)
        if not self.norm_pix:
            return target
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        return (target - mean) / (variance + _EPS).sqrt()

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The loss.

        Args:
            pred: Predicted patches (B, L, p * p * C).
            target: Images (B, C, H, H).
            mask: (B, L), 1 for patches that were removed.
        """
        loss: Tensor = self.loss_module(pred, self.construct_target(target), mask)
        return loss
