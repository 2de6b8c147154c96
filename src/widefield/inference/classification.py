"""Classes of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from widefield.components.models.image_to_image_retriever import ImageToImageRetriever
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.features import as_list, as_model
from widefield.inference.info import ModelInfo, info_of
from widefield.inference.models import Name
from widefield.inference.prediction import Image, as_picture, predict_samples


class ImageClassificationInferencer:
    """Predicts the classes of images.

    Args:
        model: A model, or what `get_model` takes: the folder of a run, a checkpoint, a configuration.
        pretrained: See `get_model`.
        device: Where the model goes; None leaves it where it is.
        classes: Names of the classes; None takes those that the model was trained with.
        views: Test-time augmentation, see `AveragedViews`.
    """

    def __init__(
        self,
        model: nn.Module | Name,
        pretrained: bool | str | Path = True,
        device: str | torch.device | None = None,
        classes: Sequence[str] | None = None,
        views: AveragedViews | None = None,
    ) -> None:
        self.model = as_model(model, pretrained, device)
        self.info = info_of(self.model)
        self.classes = self.info.class_names if classes is None else tuple(classes)
        scores = getattr(getattr(self.model, "head", None), "num_classes", None)
        if classes is not None and scores is not None and len(classes) != scores:
            raise ValueError(f"classes has {len(classes)} names, and the model {scores} classes; give a name for each")
        self.views = views

    def __call__(self, inputs: Image | Sequence[Image], batch_size: int = 1) -> list[dict[str, Any]]:
        """A dictionary for each image.

        `pred_scores` is an array of a score per class, `pred_label` the index of the highest, `pred_score` its score, and
        `pred_class` its name, if the classes have names. Large images are read tile by tile where the model streams.

        Args:
            inputs: A file, an array (H, W, C), a tensor (C, H, W) or a lazily read image, or a list of them.
            batch_size: How many are computed together; without streaming these must be of one size.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        images = as_list(inputs)
        results = []
        for start in range(0, len(images), batch_size):
            pictures = [as_picture(image, self.info) for image in images[start : start + batch_size]]
            results += [self._result(sample) for sample in predict_samples(self.model, pictures, self.views)]
        return results

    def _result(self, sample: Any) -> dict[str, Any]:
        scores = sample.pred_score.float().cpu().numpy()
        label = int(scores.argmax())
        result = {"pred_scores": scores, "pred_label": label, "pred_score": float(scores[label])}
        return (
            result
            if self.classes is None
            else {**result, "pred_class": ModelInfo(self.classes).names(len(scores))[label]}
        )


def inference_model(model: nn.Module | Name, image: Image) -> Any:
    """Return the prediction of `model` for one image: the dictionary of `ImageClassificationInferencer`, or a retriever's matches.

    Raises:
        ValueError: The model predicts nothing.
    """
    from widefield.inference.retrieval import matches

    made = as_model(model, True, None)
    if isinstance(made, ImageToImageRetriever):
        sample = predict_samples(made, [as_picture(image, info_of(made))])[0]
        return matches(sample.pred_score, sample.pred_label)
    return ImageClassificationInferencer(made)(image)[0]
