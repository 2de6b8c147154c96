"""Images as tokens."""

import math

from torch import Tensor, nn
from torch.nn import functional

from widefield.components.layers.position import Resolution


class PatchEmbed(nn.Module):
    """A token per patch: a convolution whose kernel size is its stride. The image is padded with zeros at its end to whole patches.

    Args:
        img_size: Height and width for which `resolution` holds.
        patch_size: Of a patch, in pixels.
        in_channels: Channels of the image.
        embed_dims: Channels of a token.
        bias: Whether the convolution has one.

    Attributes:
        resolution: Rows and columns of patches of an image of `img_size`.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_channels: int, embed_dims: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size, bias=bias)
        self.resolution = (math.ceil(img_size[0] / patch_size), math.ceil(img_size[1] / patch_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Resolution]:
        """Tokens (N, L, C) of an image (N, channels, H, W), row by row, and their rows and columns."""
        height, width = x.shape[-2:]
        x = functional.pad(x, (0, -width % self.patch_size, 0, -height % self.patch_size))
        x = self.projection(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])
