"""Features of images, and the images of a collection whose features are similar."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.components.data_sample import DataSample
from widefield.components.models.base_model import BaseModel
from widefield.components.models.features import background_of, left_out
from widefield.components.models.image_classifier import ImageClassifier
from widefield.components.models.image_to_image_retriever import cosine_similarity
from widefield.data.datasets import as_batch
from widefield.data.described import ImageFolder
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

    Examples:
        >>> model = wf.models.Classifier("resnet10_w16", ["benign", "malignant"], tile_size=512)
        >>> wf.FeatureExtractor(model)("slides/tumor_001.tif", stage="neck")[0][-1].shape
        torch.Size([128])
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
    if not isinstance(model, Classifier) and not (isinstance(model, BaseModel) and hasattr(model, "extract_feat")):
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
    found = found[0] if isinstance(found, list) else found
    return tuple(one[0] for one in found) if isinstance(found, (tuple, list)) else found[0]


def _of_classifier(model: Classifier, batch: Any, stage: Stage) -> Any:
    background = background_of(batch[0])
    fmap = (
        model.stream_network(batch[0], **left_out(background))
        if isinstance(batch, list)
        else model.stream_network(batch)
    )
    if stage == "backbone":
        return (fmap[0],)
    assert model.head is not None
    linear = [part for part in model.head.modules() if isinstance(part, nn.Linear)][-1]
    kept: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda part, arguments: kept.append(arguments[0]))
    try:
        model.forward_head_over(fmap, background)
    finally:
        hook.remove()
    return (kept[0][0],) if stage == "neck" else kept[0][0]


_log = logging.getLogger(__name__)


class ImageRetrievalInferencer:
    """Finds the images of a collection that are most similar to an image: those of the highest cosine of features.

    Attributes:
        vectors: The features (M, C) of the collection.

    Args:
        model: An `ImageToImageRetriever`, whose similarity counts then, or another model with features behind its neck, or what
            `get_model` takes.
        prototype: The collection: a folder of images, or a list of files.
        prototype_cache: A file for the features of the collection. It is read if its images (paths, sizes, times of change) and the
            model's weights are the same, and written otherwise.
        pretrained: See `get_model`.
        device: Where the model goes; None leaves it where it is.
    """

    def __init__(
        self,
        model: nn.Module | Name,
        prototype: str | Path | Sequence[str | Path],
        prototype_cache: str | Path | None = None,
        pretrained: bool | str | Path = True,
        device: str | torch.device | None = None,
    ) -> None:
        self.model = as_model(model, pretrained, device)
        self.info = info_of(self.model)
        is_folder = isinstance(prototype, (str, Path)) and Path(prototype).is_dir()
        self.files = (
            ImageFolder(Path(prototype), with_label=False).files  # type: ignore[arg-type]
            if is_folder
            else [Path(file) for file in as_list(prototype)]  # type: ignore[arg-type]
        )
        self.vectors = self._cached(None if prototype_cache is None else Path(prototype_cache))

    def __call__(self, inputs: Image | Sequence[Image], topk: int = 1) -> list[list[dict[str, Any]]]:
        """For each image the `topk` nearest of the collection, nearest first, as dictionaries.

        `match_score` is the similarity, `sample_idx` the index in the collection, and `sample` has its `img_path`.
        """
        similarity = getattr(self.model, "similarity", cosine_similarity)
        found = []
        for image in as_list(inputs):
            scores = similarity(self._vector(image)[None], self.vectors)[0]
            order = scores.argsort(descending=True, stable=True)[:topk]
            found.append(matches(scores, order, self.files))
        return found

    def save_prototype(self, path: str | Path) -> None:
        """Write the features of the collection to a file that `prototype_cache` reads."""
        torch.save({**self._identity(), "vectors": self.vectors.cpu()}, path)

    def _cached(self, cache: Path | None) -> Tensor:
        if cache is not None and cache.is_file():
            content = torch.load(cache, map_location="cpu", weights_only=True)
            identity = self._identity()
            differing = [what for what, value in identity.items() if content.get(what) != value]
            if not differing:
                vectors: Tensor = content["vectors"]
                return vectors.to(self.model.device)
            _log.warning("%s is of other %s; computing the features anew", cache, " and ".join(differing))
        found = torch.stack([self._vector(file) for file in self.files])
        if cache is not None:
            torch.save({**self._identity(), "vectors": found.cpu()}, cache)
        return found

    def _identity(self) -> dict[str, Any]:
        """Return what the features depend on: images; weights, with how images are opened and the transforms."""
        stats = [(str(file.resolve()), file.stat()) for file in self.files]
        images = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        digest = hashlib.sha256(
            repr((sorted(self.info.opening.items()), self.info.foreground, self.info.pipeline.description)).encode()
        )
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"images": images, "weights": digest.hexdigest()}

    def _vector(self, image: Image) -> Tensor:
        stage: Stage = "neck" if isinstance(self.model, (ImageClassifier, Classifier)) else "backbone"
        found = features_of(self.model, as_picture(image, self.info), stage)
        last: Tensor = found[-1] if isinstance(found, tuple) else found
        if last.ndim != 1:
            raise ValueError(
                f"the features have the shape {tuple(last.shape)}; similar images are found by vectors: give the model "
                "a neck such as {type: GlobalAveragePooling}"
            )
        return last


def matches(scores: Tensor, order: Tensor, files: Sequence[Path] | None = None) -> list[dict[str, Any]]:
    """The items of a collection in this order, with their scores (M,)."""
    found: list[dict[str, Any]] = []
    for index in order.tolist():
        match = {"match_score": float(scores[index]), "sample_idx": index}
        found.append(match if files is None else {**match, "sample": {"img_path": str(files[index])}})
    return found
