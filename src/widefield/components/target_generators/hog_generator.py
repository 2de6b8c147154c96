"""Histograms of oriented gradients."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from widefield.components.target_generators.base_target_generator import BaseTargetGenerator
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module()
class HOGGenerator(BaseTargetGenerator):
    """Histograms of oriented gradients of every patch, the targets of MaskFeat.

    Gradients are Sobel's, angles do not know forwards from backwards, and magnitudes are weighted by Gaussian windows that tile the
    image. Histograms have the L2 norm 1 in each cell and channel, or 0 where nothing changes (Dalal and Triggs, 2005; Wei et al.,
    2021, https://arxiv.org/abs/2112.09133, section 3.2).

    Attributes:
        out: The histograms of the last images, (B, C, nbins, H / pool, W / pool), for pictures of them.

    Args:
        nbins: Angles, of 180 / nbins degrees each.
        pool: Side of a cell, in pixels.
        gaussian_window: Side of a window, in pixels; its standard deviation is half of that.
        patch_size: Side of a patch, in pixels, a multiple of `pool`.
    """

    gaussian: Tensor

    def __init__(self, nbins: int = 9, pool: int = 8, gaussian_window: int = 16, patch_size: int = 16) -> None:
        super().__init__()
        if min(nbins, pool, gaussian_window, patch_size) < 1 or patch_size % pool:
            raise WrongArgumentError(
                f"nbins={nbins}, pool={pool}, gaussian_window={gaussian_window} and patch_size={patch_size} must be positive, "
                f"and patch_size a multiple of pool"
            )
        self.nbins = nbins
        self.pool = pool
        self.gaussian_window = gaussian_window
        self.patch_size = patch_size
        self.register_buffer("gaussian", _gaussian(gaussian_window), persistent=False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Histograms (B, L, C * nbins * u * u) of the L patches, row by row, with u * u cells each.

        A patch has its channels one after the other, of each channel its angles, and of each angle the cells row by row.

        Args:
            x: Images (B, C, H, W); patches and windows fill them.
        """
        height, width = x.shape[-2:]
        side = math.lcm(self.patch_size, self.gaussian_window)
        if height % side or width % side:
            raise WrongArgumentError(
                f"images have {height} x {width} pixels; patch_size={self.patch_size} and "
                f"gaussian_window={self.gaussian_window} need multiples of {side}"
            )
        self.out = self._histograms(x.to(torch.promote_types(x.dtype, torch.float32)))
        cells = self.patch_size // self.pool
        patches = self.out.unflatten(4, (-1, cells)).unflatten(3, (-1, cells))
        return patches.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)

    def _histograms(self, x: Tensor) -> Tensor:
        right, down = _sobel(x)
        angle = torch.atan2(right, down) / math.pi * self.nbins
        bins = angle.floor().remainder(self.nbins)
        tiles = (x.shape[-2] // self.gaussian_window, x.shape[-1] // self.gaussian_window)
        magnitude = torch.hypot(right, down) * self.gaussian.to(x).tile(tiles)
        # One angle at a time: an axis of angles in front of the sums would take nbins times the memory of the images.
        sums = [self._sum_cells(magnitude * (bins == k)) for k in range(self.nbins)]
        return functional.normalize(torch.stack(sums, dim=2), dim=2)

    def _sum_cells(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (-1, self.pool)).unflatten(2, (-1, self.pool)).sum((3, 5))


def _sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and downwards, of (B, C, H, W) with reflected borders.

    They are sums of slices, for convolutions round to fewer bits on GPUs, and angles at the border of two bins would move.
    """
    x = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    along_y = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    along_x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return along_y[..., :-2] - along_y[..., 2:], along_x[..., :-2, :] - along_x[..., 2:, :]


def _gaussian(window: int) -> Tensor:
    position = torch.arange(window) - (window - 1) / 2
    weight = torch.exp(-0.5 * (position / (window / 2)) ** 2)
    gaussian = torch.outer(weight, weight)
    return gaussian / gaussian.sum()
