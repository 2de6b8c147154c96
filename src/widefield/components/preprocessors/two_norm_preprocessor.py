"""Batches for a model whose targets come from another network."""

from collections.abc import Mapping, Sequence
from typing import Any

from widefield.components.errors import WrongArgumentError
from widefield.components.preprocessors.base_preprocessor import normalised, pixel_normalisation
from widefield.components.preprocessors.self_sup_preprocessor import SelfSupDataPreprocessor, is_views
from widefield.registry import MODELS


@MODELS.register_module()
class TwoNormDataPreprocessor(SelfSupDataPreprocessor):
    """Two views of each image, normalised in two ways: that of the model and that of the target generator.

    Of images without a second view, both views are the same.

    Args:
        mean, std: Of the model's view: per channel, in units of the pixels, from 0 to 255 for 8 bits.
        second_mean, second_std: Of the target generator's view: 127.5 and 127.5 for VQ-KD, -31.875 and 318.75 for DALL-E.
        kwargs: Those of `BaseDataPreprocessor`; they concern the model's view.
    """

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        second_mean: Sequence[float] | float | None = None,
        second_std: Sequence[float] | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mean, std, **kwargs)
        if second_mean is None or second_std is None:
            raise WrongArgumentError(
                "second_mean and second_std are missing; give those of the target generator, or use SelfSupDataPreprocessor"
            )
        self.second_normalisation = pixel_normalisation(second_mean, second_std)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it: `inputs` is a list of two views, each (N, C, H, W).

        Args:
            data: `inputs`, images (N, C, H, W) or two views of them in a list, and maybe `data_samples`.
            training: Without effect.
        """
        inputs = data["inputs"]
        views = inputs if is_views(inputs) else [inputs, inputs]
        if len(views) != 2:
            raise WrongArgumentError(
                f"there are {len(views)} views; give two, that of the model and that of the target"
            )
        second = normalised(views[1], self.second_normalisation)
        return {"inputs": [self.batch(views[0]), second], "data_samples": data.get("data_samples")}
