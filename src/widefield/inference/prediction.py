"""Predictions for images by any kind of model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from widefield.components.data_sample import DataSample
from widefield.components.heads.classification_heads import MultiLabelClsHead
from widefield.components.models.base_model import BaseModel
from widefield.components.models.image_to_image_retriever import ImageToImageRetriever
from widefield.data.datasets import as_batch
from widefield.data.pipeline import Picture, Pipeline, whole
from widefield.inference.averaged_views import AveragedViews, averaged
from widefield.inference.masks import keep_background_if_usable
from widefield.inference.models import ModelInfo, Name, as_model, info_of
from widefield.modules import BaseModule
from widefield.reports.overlay import save_picture

Image = str | Path | np.ndarray | Picture
"""A file, pixels (H, W, C) or (H, W) as an array, a tensor (C, H, W), or an image that is read lazily."""


def as_picture(image: Image, info: ModelInfo) -> Picture:
    """`image` as the model takes it: opened, and transformed as in validation.

    Raises:
        FileNotFoundError, ImageReadError: The file cannot be read.
        ValueError: An array or tensor of another number of axes.
    """
    if isinstance(image, (str, Path)):
        picture: Any = info.open(image)
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


def as_list(inputs: Image | Sequence[Image]) -> list[Image]:
    """One image or several, as a list."""
    return list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]  # type: ignore[list-item]


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
    return [DataSample().set_pred_score(score).set_pred_label(labels_of(score, model)) for score in scores]


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
            DataSample().set_pred_score(score).set_pred_label(labels_of(score, model))
            for score in model.predict_step(inputs, 0)
        ]
    samples: list[DataSample] = model.predict_step((inputs, [DataSample() for _ in pictures]), 0)
    return samples


def _predicts(model: object) -> bool:
    return isinstance(model, BaseModule) or (isinstance(model, BaseModel) and hasattr(model, "predict"))


def task_of(model: Any) -> str:
    """The task of a `Classifier`, see `LabelledImages`; of all else classification."""
    target = getattr(model, "target", None)
    return str(target["task"]) if isinstance(target, Mapping) else "classification"


def labels_of(score: Tensor, model: Any) -> Tensor:
    """The classes that the scores (C,) of an image predict, by the rule of the task and the head, (k,) or a single one.

    Numbers that a regression predicts are no classes: an empty tensor.
    """
    task, head = task_of(model), getattr(model, "head", None)
    if task == "regression":
        return score.new_empty(0, dtype=torch.long)
    if task == "multilabel":
        return (score >= 0.5).nonzero()[:, 0]
    if not isinstance(head, MultiLabelClsHead):
        return score.argmax()
    if head.thr is not None:
        return (score >= head.thr).nonzero()[:, 0]
    assert head.topk is not None
    return score.topk(min(head.topk, len(score))).indices


def row_of(scores: Tensor, labels: Tensor, model: Any, names: Sequence[str]) -> dict[str, float | str]:
    """Return what `widefield predict` writes of the scores of an image, by column.

    Args:
        scores: (C,), on any device.
        labels: Indices of what is predicted, see `labels_of`.
        model: Its task says what the scores are: `probability_NAME`; of a regression `predicted_NAME`, of a retriever
            `similarity_NAME`.
        names: Of the C scores.

    Returns:
        A number for each score, and `predicted`: the names of what is predicted, separated by semicolons.
    """
    kind = "similarity" if isinstance(model, ImageToImageRetriever) else "probability"
    kind = "predicted" if task_of(model) == "regression" else kind
    columns = {f"{kind}_{name}": value for name, value in zip(names, scores.tolist(), strict=True)}
    return {**columns, "predicted": ";".join(names[label] for label in labels.reshape(-1).tolist())}


class ImageClassificationInferencer:
    """Predicts the classes of images, or what else the task of a `Classifier` is.

    Args:
        model: A model, or what `get_model` takes: the folder of a run, a checkpoint, a configuration.
        pretrained: See `get_model`.
        device: Where the model goes; None leaves it where it is.
        classes: Names of the classes; None takes those that the model was trained with.
        views: Test-time augmentation, see `AveragedViews`.
        foreground: What is computed of images that are files, see `ForegroundChoice.method`; None: as in the training.

    Examples:
        >>> model = wf.models.Classifier("resnet10_w16", ["benign", "malignant"], tile_size=512)
        >>> wf.ImageClassificationInferencer(model)("slides/tumor_001.tif")[0]["pred_class"] in model.class_names
        True
    """

    def __init__(
        self,
        model: nn.Module | Name,
        pretrained: bool | str | Path = True,
        device: str | torch.device | None = None,
        classes: Sequence[str] | None = None,
        views: AveragedViews | None = None,
        foreground: str | Path | None = None,
    ) -> None:
        self.model = as_model(model, pretrained, device)
        self.info = info_of(self.model).with_foreground(None if foreground is None else str(foreground))
        self.classes = self.info.class_names if classes is None else tuple(classes)
        scores = getattr(getattr(self.model, "head", None), "num_classes", None)
        if classes is not None and scores is not None and len(classes) != scores:
            raise ValueError(f"classes has {len(classes)} names, and the model {scores} classes; give a name for each")
        self.views = views

    def __call__(
        self, inputs: Image | Sequence[Image], batch_size: int = 1, show_dir: str | Path | None = None
    ) -> list[dict[str, Any]]:
        """A dictionary for each image.

        `pred_scores` is an array of a score per class, `pred_label` the index of the highest, `pred_score` its score, and
        `pred_class` its name, if the classes have names. Of a model that predicts several labels these are lists, of a regression
        empty ones. `row` is what `widefield predict` writes: by task `probability_NAME` or `predicted_NAME`, and `predicted`. Large
        images are read tile by tile where the model streams.

        Args:
            inputs: A file, an array (H, W, C), a tensor (C, H, W) or a lazily read image, or a list of them.
            batch_size: How many are computed together; without streaming these must be of one size.
            show_dir: A folder for a PNG of each image with what is predicted above, `NAME.png` of a file and `INDEX.png` of others,
                where a second of the same name is `INDEX_NAME.png`.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive")
        images = as_list(inputs)
        results = []
        for start in range(0, len(images), batch_size):
            pictures = [as_picture(image, self.info) for image in images[start : start + batch_size]]
            for picture in pictures:
                keep_background_if_usable(self.model, picture)
            results += [self._result(sample) for sample in predict_samples(self.model, pictures, self.views)]
        if show_dir is not None:
            self._show(images, results, Path(show_dir))
        return results

    def _show(self, images: Sequence[Image], results: Sequence[Mapping[str, Any]], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        names: set[str] = set()
        for k, (image, result) in enumerate(zip(images, results, strict=True)):
            name = Path(image).stem if isinstance(image, (str, Path)) else str(k)
            name = f"{k}_{name}" if name in names else name
            names.add(name)
            score, predicted = result["pred_score"], result["row"]["predicted"]
            title = f"{predicted}: {score:.3f}" if isinstance(score, float) else predicted
            save_picture(folder / f"{name}.png", as_picture(image, replace(self.info, pipeline=Pipeline())), title)

    def _result(self, sample: Any) -> dict[str, Any]:
        scores = sample.pred_score.float().cpu()
        labels, names = labels_of(scores, self.model), ModelInfo(self.classes).names(len(scores))
        result = {
            "pred_scores": scores.numpy(),
            "pred_label": labels.tolist(),
            "pred_score": scores[labels].tolist(),
            "row": row_of(scores, sample.pred_label, self.model, names),
        }
        return result if self.classes is None else {**result, "pred_class": np.array(names)[labels.numpy()].tolist()}


def inference_model(model: nn.Module | Name, image: Image) -> Any:
    """Return the prediction of `model` for one image: the dictionary of `ImageClassificationInferencer`, or a retriever's matches.

    Raises:
        ValueError: The model predicts nothing.
    """
    from widefield.inference.features import matches

    made = as_model(model, True, None)
    if isinstance(made, ImageToImageRetriever):
        sample = predict_samples(made, [as_picture(image, info_of(made))])[0]
        return matches(sample.pred_score, sample.pred_label)
    return ImageClassificationInferencer(made)(image)[0]
