"""Global average pooling."""

from typing import Literal

from torch import Tensor

from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module(replaceable=True)
class GlobalAveragePooling(BaseModule):
    """The average of each channel over all positions.

    Args:
        dim: Axes of position: 1, 2 or 3.
    """

    component_kind = "neck"

    def __init__(self, dim: Literal[1, 2, 3] = 2) -> None:
        super().__init__()
        if dim not in (1, 2, 3):
            raise WrongArgumentError(f"dim={dim} is not one of 1, 2, 3")
        self.dim = dim

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Of a map (N, C, ...) its averages (N, C); of a tuple of maps a tuple."""
        if isinstance(inputs, tuple):
            return tuple(self._pool(one) for one in inputs)
        if isinstance(inputs, Tensor):
            return self._pool(inputs)
        raise TypeError(f"the inputs of a neck are a tuple of tensors or a tensor, not a {type(inputs).__name__}")

    def _pool(self, one: Tensor) -> Tensor:
        if one.ndim != self.dim + 2:
            raise ValueError(f"a map has the shape {tuple(one.shape)}; with dim={self.dim} it has {self.dim + 2} axes")
        return one.flatten(2).mean(2)
