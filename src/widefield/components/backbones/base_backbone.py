"""What backbones share."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.components.base_module import BaseModule


class BaseBackbone(BaseModule):
    """A feature extractor: `forward` gives a tuple of maps, one for each of `out_indices`."""

    component_kind = "backbone"
    norm_eval = False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of the stages that `out_indices` names."""
        raise NotImplementedError

    def frozen_parts(self) -> Iterable[nn.Module]:
        """Parts that do not train: no gradients, and evaluation mode whatever the mode of the backbone."""
        return ()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; frozen parts, and with `norm_eval` batch norms, stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
            part.requires_grad_(False)
        if self.norm_eval:
            for part in self.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self
