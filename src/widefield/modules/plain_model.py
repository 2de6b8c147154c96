"""The model of a Lightning module without streaming and without Lightning, to deploy it."""

import torch
from torch import Tensor, nn

from widefield.streaming import StreamingCNN


class PlainModel(nn.Module):
    """Normalisation, trunk and head as one ordinary module that runs whole images: for `torch.export`, ONNX or other code.

    The image (N, C, H, W) is what the streamed model takes; that a float image is not scaled to 0..1 is not noticed here.

    Args:
        network: The streamed trunk, whose module is used as it is.
        head: Applied to its map; None returns the map.
    """

    def __init__(self, network: StreamingCNN, head: nn.Module | None) -> None:
        super().__init__()
        self.trunk = network.module
        self.head = nn.Identity() if head is None else head
        self.normalisation = network.normalisation

    def forward(self, image: Tensor) -> Tensor:
        """The output for an image (N, C, H, W)."""
        dtype = next((parameter.dtype for parameter in self.parameters()), torch.get_default_dtype())
        return self.head(self.trunk(self.normalisation.unchecked(image, dtype)))
