"""Retrieval of images by an image."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from widefield.components.component import HeadConfig
from widefield.components.data_sample import DataSample
from widefield.components.models.base_model import BaseModel, as_sample, split_batch
from widefield.components.models.features import backbone_features, neck_features, streams
from widefield.components.preprocessors.batch_augments import BatchAugmentsConfig
from widefield.components.preprocessors.data_preprocessors import PreprocessorConfig, with_augments
from widefield.config import check_description
from widefield.data.datasets import as_batch
from widefield.errors import WrongArgumentError
from widefield.images import images_below, open_image
from widefield.registry import DATASETS, MODELS, ComponentOf, arguments_of, import_object, suggestion

EncoderConfig = Annotated[nn.Module | dict[str, Any] | list[dict[str, Any]], ComponentOf(MODELS)]
Similarity = Callable[[Tensor, Tensor], Tensor]


@MODELS.register_module()
class ImageToImageRetriever(BaseModel):
    """Ranks the images of a collection, the prototype, by their similarity with an image.

    The features of the collection are computed at the first prediction, and anew after training, for they change with the weights.
    They are no part of the checkpoint; `dump_prototype` saves them.

    Attributes:
        prototype_vecs: The features (M, C) of the collection; None until they are needed.

    Args:
        image_encoder: Gives features (N, C), or a tuple of which the last has them; a backbone and its necks make a sequence.
        prototype: The collection: a data loader of batches as the model takes them; a description of one, `{dataset: {type: ...},
            batch_size: 4, ...}`; a folder of images, which are taken in the order of their paths; a file of features, as
            `dump_prototype` writes it; or a tensor of features (M, C). Where samples have a `sample_idx`, it is their row.
        head: Gives losses, for training.
        similarity_fn: "cosine_similarity", or a function of features (N, C) and (M, C), itself or its import path, that gives
            similarities (N, M).
        train_cfg: Short for the `batch_augments` of the data preprocessor, see `ImageClassifier`.
        data_preprocessor: Normalises images; without a type a `ClsDataPreprocessor`.
        topk: How many labels are predicted; -1 is all.
        kwargs: Those of `BaseModel`.
    """

    prototype_vecs: Tensor | None

    def __init__(
        self,
        image_encoder: EncoderConfig,
        prototype: DataLoader | dict[str, Any] | str | os.PathLike[str] | Tensor,
        head: HeadConfig | None = None,
        *,
        similarity_fn: str | Similarity = "cosine_similarity",
        train_cfg: BatchAugmentsConfig | None = None,
        data_preprocessor: PreprocessorConfig | None = None,
        topk: int = -1,
        **kwargs: Any,
    ) -> None:
        built_head: Any = None if head is None else MODELS.build(head)
        described = with_augments(data_preprocessor, train_cfg, getattr(built_head, "num_classes", None))
        super().__init__(data_preprocessor=described, **kwargs)
        if topk != -1 and topk < 1:
            raise WrongArgumentError(f"topk={topk} must be positive, or -1 for all")
        self.image_encoder = MODELS.build(image_encoder)
        self.head = built_head
        self.prototype = _checked(prototype)
        self.similarity = _similarity(similarity_fn)
        self.topk = topk
        self.register_buffer("prototype_vecs", None, persistent=False)
        self._is_prepared = False

    def extract_feat(self, inputs: Any) -> Tensor:
        """The features (N, C) of images.

        Raises:
            WrongArgumentError: The encoder gives something else.
        """
        backbone, neck = self._parts()
        features = backbone_features(backbone, inputs, self.data_preprocessor)
        features = neck_features(neck, features, of_list=self.reads_tiles and isinstance(inputs, (list, tuple)))
        last = features[-1] if isinstance(features, (tuple, list)) else features
        if last.ndim != 2:
            raise WrongArgumentError(
                f"the encoder gives features of the shape {tuple(last.shape)}; vectors (N, C) are needed: end image_encoder with a "
                "neck such as {type: GlobalAveragePooling}"
            )
        return last

    @property
    def reads_tiles(self) -> bool:
        return streams(self._parts()[0])

    def loss(self, inputs: Any, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        if self.head is None:
            raise WrongArgumentError("this retriever has no head, so there is no loss; give one, or predict only")
        return self.head.loss((self.extract_feat(inputs),), data_samples)

    def matching(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities (N, M) of features (N, C) with the collection, and the indices (N, M) of the collection, nearest first."""
        if not self._is_prepared:
            self.prepare_prototype()
        vectors = self.prototype_vecs
        assert vectors is not None
        if features.shape[1] != vectors.shape[1]:
            raise WrongArgumentError(
                f"the encoder gives {features.shape[1]} channels, and the prototype has {vectors.shape[1]}; it is of another one"
            )
        similarity = self.similarity(features, vectors.to(features))
        if similarity.shape != (len(features), len(vectors)):
            raise WrongArgumentError(
                f"similarity_fn gives the shape {tuple(similarity.shape)} for {len(features)} images and {len(vectors)} of the "
                f"prototype; expected ({len(features)}, {len(vectors)})"
            )
        return similarity, similarity.argsort(dim=1, descending=True, stable=True)

    def predict(self, inputs: Any, data_samples: Sequence[DataSample | None] | None = None) -> list[DataSample]:
        """The samples, new ones where there are none, with `pred_score` and `pred_label`.

        `pred_score` are the similarities (M,) with the collection in its order, `pred_label` the indices of the nearest `topk`,
        nearest first.
        """
        similarity, order = self.matching(self.extract_feat(inputs).detach())
        labels = order if self.topk == -1 else order[:, : self.topk]
        samples = [None] * len(labels) if data_samples is None else data_samples
        return [
            (sample or DataSample()).set_pred_score(score).set_pred_label(label)
            for sample, score, label in zip(samples, similarity, labels, strict=True)
        ]

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        # metrics take what is predicted
        return None if self.head is None else super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.head is None else super().test_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> list[DataSample]:
        return self.predict(*self.preprocess(batch))

    @torch.no_grad()
    def prepare_prototype(self) -> None:
        """Compute, or read, the features of the collection now.

        Raises:
            WrongArgumentError: The collection is empty, or its features are no (M, C).
            FileNotFoundError: There is no such file or folder.
        """
        was_training = self.training
        self.eval()
        try:
            vectors = self._read_prototype()
        finally:
            self.train(was_training)
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not len(vectors):
            given = (
                f"a tensor of shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
            )
            raise WrongArgumentError(f"the prototype holds {given}; features (M, C) of one image at least are needed")
        self.prototype_vecs = vectors.to(self.device)
        self._is_prepared = True

    def dump_prototype(self, path: str | os.PathLike[str]) -> None:
        """Save the features of the collection to a file, which is a `prototype` then; its name ends as you like, such as `.pth`."""
        if not self._is_prepared:
            self.prepare_prototype()
        assert self.prototype_vecs is not None
        torch.save(self.prototype_vecs.cpu(), path)

    def setup(self, stage: str) -> None:
        """Refuse, before a run begins, a collection that is not there."""
        if isinstance(self.prototype, (str, os.PathLike)) and not Path(self.prototype).exists():
            raise _gone(self.prototype)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; after training features of images are computed anew."""
        if mode and not isinstance(self.prototype, Tensor):
            self._is_prepared = False
        return super().train(mode)

    def _parts(self) -> tuple[nn.Module, nn.Module | None]:
        """The backbone, and what follows it."""
        encoder = self.image_encoder
        if isinstance(encoder, nn.Sequential) and len(encoder) > 1:
            return encoder[0], encoder[1:]
        return (encoder[0] if isinstance(encoder, nn.Sequential) and len(encoder) else encoder), None

    def _read_prototype(self) -> Any:
        if isinstance(self.prototype, Tensor):
            return self.prototype
        if isinstance(self.prototype, DataLoader):
            return self._embed(self.prototype)
        if isinstance(self.prototype, dict):
            return self._embed(_loader(self.prototype))
        path = Path(self.prototype)
        if path.is_dir():
            return self._embed(_images(path))
        if not path.is_file():
            raise _gone(path)
        return torch.load(path, map_location="cpu", weights_only=True)

    def _embed(self, batches: Iterable[Any]) -> Tensor:
        """Features of all images, each at the row that its sample names, or else in their order."""
        rows: list[int] = []
        vectors = []
        for batch in batches:
            inputs, samples = self.preprocess(move_data_to_device(batch, self.device))
            rows += [int(sample.get("sample_idx", len(rows) + k)) for k, sample in enumerate(samples)]
            vectors.append(self.extract_feat(inputs))
        if not rows:
            raise WrongArgumentError("the prototype has no images; give one at least")
        if sorted(rows) != list(range(len(rows))):
            raise WrongArgumentError(
                f"the sample_idx of the prototype are {sorted(rows)[:10]}, ...; expected 0 to {len(rows) - 1}, each once"
            )
        return torch.cat(vectors)[torch.tensor(rows).argsort().to(self.device)]


def _gone(path: str | os.PathLike[str]) -> FileNotFoundError:
    return FileNotFoundError(f"prototype={str(path)!r} does not exist; give a folder of images, or a file of features")


def _checked(prototype: Any) -> Any:
    if not isinstance(prototype, (DataLoader, dict, str, os.PathLike, Tensor)):
        raise WrongArgumentError(
            f"prototype={prototype!r} must be a data loader, a dictionary that describes one, a path, or a tensor (M, C)"
        )
    if not isinstance(prototype, dict):
        return prototype
    if "dataset" not in prototype:
        raise WrongArgumentError(
            f"prototype={prototype} has no dataset; describe a data loader: {{dataset: {{type: NAME, ...}}, batch_size: 4}}"
        )
    known = arguments_of(DataLoader).named
    for name in prototype.keys() - known.keys():
        raise WrongArgumentError(f"prototype.{name}: a data loader has no {name!r}; {suggestion(name, known)}")
    if isinstance(prototype["dataset"], dict):
        for path, problem in check_description(prototype["dataset"], ComponentOf(DATASETS), ("prototype", "dataset")):
            raise WrongArgumentError(f"{'.'.join(path)}: {problem}")
    return prototype


def _similarity(given: str | Similarity) -> Similarity:
    if given == "cosine_similarity":
        return cosine_similarity
    found = import_object(given) if isinstance(given, str) and "." in given else given
    if not callable(found):
        raise WrongArgumentError(
            f"similarity_fn={given!r} must be 'cosine_similarity', a function, or the import path of one"
        )
    return found


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines (N, M) of the angles between vectors (N, C) and (M, C), in memory of that size."""
    return functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T


def _loader(description: Mapping[str, Any]) -> DataLoader:
    """A data loader by its arguments; the data set may be described, and functions named by import path."""
    named = {name: value for name, value in description.items() if name.endswith("_fn") and isinstance(value, str)}
    found = {name: import_object(value) for name, value in named.items()}
    dataset = DATASETS.build(description["dataset"])
    return DataLoader(**{"collate_fn": _collate, **description, **found, "dataset": dataset})


def _collate(items: Sequence[Any]) -> dict[str, Any]:
    """The batch of items (picture, target), or `{inputs: ..., data_samples: ...}`; pictures of one size make one tensor."""
    pictures, targets = zip(*map(split_batch, items), strict=True)
    samples = [DataSample() if target is None else as_sample(target) for target in targets]
    return {"inputs": as_batch(list(pictures)), "data_samples": samples}


def _images(folder: Path) -> Iterable[Any]:
    """Batches of one image each, of all image files in a folder, in the order of their paths."""
    for path in images_below(folder):
        yield {"inputs": [open_image(path)]}
