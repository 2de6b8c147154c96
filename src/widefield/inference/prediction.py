"""Predictions for images by any kind of model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.components.data_sample import DataSample
from widefield.components.heads.classification_heads import MultiLabelClsHead
from widefield.components.models.base_model import BaseModel
from widefield.data.datasets import as_batch
from widefield.data.pipeline import Picture, whole
from widefield.images import open_image
from widefield.inference.averaged_views import AveragedViews, averaged
from widefield.inference.info import ModelInfo
from widefield.modules import BaseModule

Image = str | Path | np.ndarray | Picture
"""A file, pixels (H, W, C) or (H, W) as an array, a tensor (C, H, W), or an image that is read lazily."""


def as_picture(image: Image, info: ModelInfo) -> Picture:
    """`image` as the model takes it: opened, and transformed as in validation.

    Raises:
        FileNotFoundError, ImageReadError: The file cannot be read.
        ValueError: An array or tensor of another number of axes.
    """
    if isinstance(image, (str, Path)):
        picture: Any = open_image(image, info.level, alpha=info.alpha)
    elif isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(f"an array of shape {image.shape} is no image; give (H, W) or (H, W, C)")
        picture = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1)))
    elif isinstance(image, Tensor) or hasattr(image, "read"):
        picture = image
    else:
        raise ValueError(
            f"a {type(image).__name__} is no image; give a file, an array such as numpy.asarray(image), or a tensor"
        )
    if isinstance(picture, Tensor) and picture.ndim != 3:
        raise ValueError(f"a tensor of shape {tuple(picture.shape)} is no image; give one image, (C, H, W)")
    transformed: Picture = info.pipeline(picture)
    return transformed


@torch.no_grad()
def predict_samples(model: Any, pictures: Sequence[Picture], views: AveragedViews | None = None) -> list[DataSample]:
    """A sample with `pred_score` and `pred_label` for each picture.

    Args:
        model: A model of components that predicts, or a `Classifier`; its mode is left as it is.
        pictures: As one batch.
        views: Test-time augmentation: scores are those of the views of a picture, averaged.

    Raises:
        ValueError: The model predicts nothing.
    """
    if views is None:
        return _predicted(model, pictures)
    scores = averaged(lambda batch: [one.pred_score for one in _predicted(model, batch)], pictures, views)
    head = getattr(model, "head", None)
    return [DataSample().set_pred_score(score).set_pred_label(labels_of(score, head)) for score in scores]


def _predicted(model: Any, pictures: Sequence[Picture]) -> list[DataSample]:
    if not _predicts(model):
        raise ValueError(
            f"{type(model).__name__} predicts nothing; give a model such as ImageClassifier, or a Classifier"
        )
    mixed = len({isinstance(picture, Tensor) for picture in pictures}) > 1
    inputs = as_batch([whole(picture) for picture in pictures] if mixed else list(pictures))
    if isinstance(inputs, Tensor):
        inputs = inputs.to(model.device)
    elif isinstance(inputs[0], Tensor):
        inputs = [one.to(model.device) for one in inputs]
    if isinstance(model, BaseModule):
        return [
            DataSample().set_pred_score(score).set_pred_label(score.argmax()) for score in model.predict_step(inputs, 0)
        ]
    samples: list[DataSample] = model.predict_step((inputs, [DataSample() for _ in pictures]), 0)
    return samples


def _predicts(model: object) -> bool:
    return isinstance(model, BaseModule) or (isinstance(model, BaseModel) and hasattr(model, "predict"))


def labels_of(score: Tensor, head: Any) -> Tensor:
    """The classes that the scores (C,) of an image predict, by the rule of the head, (k,) or a single one."""
    if not isinstance(head, MultiLabelClsHead):
        return score.argmax()
    if head.thr is not None:
        return (score >= head.thr).nonzero()[:, 0]
    assert head.topk is not None
    return score.topk(min(head.topk, len(score))).indices
