"""Batches of self-supervised learning."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from widefield.components.preprocessors.base_preprocessor import BaseDataPreprocessor
from widefield.registry import MODELS


@MODELS.register_module()
class SelfSupDataPreprocessor(BaseDataPreprocessor):
    """Normalises and stacks images, or each of several views of them."""

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it.

        Args:
            data: `inputs` and maybe `data_samples`. Inputs are images (N, C, H, W), a list of images (C, h, w), or a list of views,
                each of them images (N, C, H, W).
            training: Without effect.
        """
        inputs = data["inputs"]
        views = inputs if is_views(inputs) else [inputs]
        batches = [self.batch(view) for view in views]
        return {"inputs": batches if is_views(inputs) else batches[0], "data_samples": data.get("data_samples")}


def is_views(inputs: Any) -> bool:
    """Whether inputs are a list of batches, not one batch."""
    return isinstance(inputs, (list, tuple)) and all(isinstance(view, Tensor) and view.ndim == 4 for view in inputs)
