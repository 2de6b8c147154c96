"""Features of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.components.data_sample import DataSample
from widefield.components.models.base_model import BaseModel
from widefield.components.models.image_classifier import ImageClassifier
from widefield.data.datasets import as_batch
from widefield.data.pipeline import Picture
from widefield.inference.models import Name, as_model, info_of
from widefield.inference.prediction import Image, as_list, as_picture
from widefield.models import Classifier

Stage = Literal["backbone", "neck", "pre_logits"]


class FeatureExtractor:
    """Features of images, as a model gives them behind one of its stages.

    Args:
        model: A model, or what `get_model` takes.
        pretrained: See `get_model`.
        device: Where the model goes; None leaves it where it is.
    """

    def __init__(
        self, model: nn.Module | Name, pretrained: bool | str | Path = True, device: str | torch.device | None = None
    ) -> None:
        self.model = as_model(model, pretrained, device)

    def __call__(self, inputs: Image | Sequence[Image], stage: Stage = "backbone") -> list[Any]:
        """The features of each image, without an axis of a batch: a tuple behind the backbone and the neck, else a tensor.

        Args:
            inputs: An image (see `widefield.inference.prediction.Image`) or a list of them.
            stage: As in `ImageClassifier.extract_feat`. Of a `Classifier` "neck" is the vector that its last layer gets, too; other
                models of components have their backbone alone.
        """
        info = info_of(self.model)
        return [features_of(self.model, as_picture(image, info), stage) for image in as_list(inputs)]


@torch.no_grad()
def features_of(model: Any, picture: Picture, stage: Stage) -> Any:
    """The features of one picture, see `FeatureExtractor`.

    Raises:
        ValueError: The model has no such stage, or is neither of components nor a `Classifier`.
    """
    if not _has_features(model):
        raise ValueError(
            f"{type(model).__name__} has no features to extract; give a model of components, or a Classifier"
        )
    batch = as_batch([picture.to(model.device) if isinstance(picture, Tensor) else picture])
    if isinstance(model, Classifier):
        return _of_classifier(model, batch, stage)
    inputs, _ = model.preprocess((batch, [DataSample()]))
    found: Any
    if isinstance(model, ImageClassifier):
        found = model.extract_feat(inputs, stage)
    elif stage == "backbone":
        found = model.extract_feat(inputs)
    else:
        raise ValueError(f"{type(model).__name__} has no stage {stage!r}; give 'backbone'")
    return _of_one(found[0] if isinstance(found, list) else found)


def _has_features(model: object) -> bool:
    return isinstance(model, Classifier) or (isinstance(model, BaseModel) and hasattr(model, "extract_feat"))


def _of_classifier(model: Classifier, batch: Any, stage: Stage) -> Any:
    maps = model.stream_network(batch)
    fmap = maps[0] if isinstance(maps, list) else maps
    if stage == "backbone":
        return (fmap[0],)
    assert model.head is not None
    linear = [part for part in model.head.modules() if isinstance(part, nn.Linear)][-1]
    kept: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda part, arguments: kept.append(arguments[0]))
    try:
        model.forward_head(fmap)
    finally:
        hook.remove()
    return (kept[0][0],) if stage == "neck" else kept[0][0]


def _of_one(features: Any) -> Any:
    return tuple(one[0] for one in features) if isinstance(features, (tuple, list)) else features[0]
