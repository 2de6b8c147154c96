"""A lazily read image of a tensor."""

from torch import Tensor


class Lazy:
    def __init__(self, pixels: Tensor) -> None:
        self._pixels = pixels
        self.shape, self.dtype = tuple(pixels.shape), pixels.dtype

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        return self._pixels[:, y : y + height, x : x + width]
