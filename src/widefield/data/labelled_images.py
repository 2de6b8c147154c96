"""Labelled images of a folder: the Lightning data module and its data sets of lazily read images."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from widefield.config import checked
from widefield.data.labels import SPLITS, Columns, LabelledImage, LabelTable, read_labels
from widefield.data.splits import stratified_split
from widefield.data.tables import LabelError, listed
from widefield.data.targets import Label, Target, Task, interval_names, strata, target_of
from widefield.images import Alpha, Background, ForegroundChoice, ImageFile, open_image
from widefield.registry import DATASETS, Range

_log = logging.getLogger(__name__)
Batch = tuple[list[ImageFile], Tensor]
"""Lazy images, of any sizes, and their class indices, integers of shape (N,); or several numbers each, float32 of shape (N, K), see
`Label`."""


class ImageDataset(Dataset[tuple[ImageFile, Label]]):
    """Pairs (lazy image, label). Opening an image reads its header, and the first time a thumbnail, if it may have a background.

    Attributes:
        foreground: How the background is found, which an image has as its attribute `background`.

    Args:
        images: What to open.
        options: How, see `open_image`: level, spacing, channels, alpha, fill.
        foreground: See above; by default no image has a background.
    """

    def __init__(self, images: Sequence[LabelledImage], options: Mapping[str, Any], foreground: str = "none") -> None:
        self.images = tuple(images)
        self.options = options
        self.foreground = ForegroundChoice(foreground)
        self._found: dict[tuple[int, ForegroundChoice], Background | None] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[ImageFile, Label]:
        labelled = self.images[index]
        image, key = open_image(labelled.path, **self.options), (index, self.foreground)
        if key not in self._found:
            self._found[key] = self.foreground.of(image)
        image.background = self._found[key]
        return image, labelled.label

    def __iter__(self) -> Iterator[tuple[ImageFile, Label]]:
        return (self[index] for index in range(len(self)))


def collate(pairs: Sequence[tuple[ImageFile, Label]]) -> Batch:
    """A batch of the pairs that an `ImageDataset` gives; no pixels are read."""
    return [image for image, _ in pairs], torch.tensor([label for _, label in pairs])


class EpochShuffle(DistributedSampler[int]):
    """A random order that depends on the seed and the epoch alone, so a resumed run sees what an unbroken one sees.

    Lightning calls `set_epoch` before every epoch. Of several replicas each takes every n-th index, so that together they train on
    what one takes in a larger batch; where they do not divide the length, the first indices come again.

    Args:
        length: Number of indices.
        seed: Of the order.
        num_replicas, rank: Processes that train on images of their own, and which of them this is.
    """

    def __init__(self, length: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(length), num_replicas, rank, seed=seed)  # type: ignore[arg-type]

    @classmethod
    def of(cls, length: int, seed: int, trainer: pl.Trainer | None) -> "EpochShuffle":
        """Return that of this process in the run of `trainer`."""
        return cls(length, seed, **((trainer and trainer.distributed_sampler_kwargs) or {}))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        return islice(cycle(order), self.rank, self.total_size, self.num_replicas)


class LazyImages(pl.LightningDataModule):
    """Lazily read images for training, validation and test, with whatever their data sets pair them with.

    Attributes:
        options: How images are opened, see `ImageDataset`.
        train_set, val_set, test_set: The data sets.
        batch_size: Images per optimizer step.
        seed: Of the training order.
        class_names: Names of what is predicted.
        target: The task with what was found in the images to train on.
        image_channels, image_type: Number of channels and type of the pixels of all images.
        collate: Makes a batch of pairs.
    """

    component_kind = "data module"
    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset
    class_names: list[str]
    target: Target
    image_channels: int
    image_type: str
    collate: Callable[[Sequence[Any]], Any] = staticmethod(collate)

    def __init__(
        self,
        level: int,
        spacing: float | None,
        channels: list[int | str] | None,
        alpha: Alpha,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        if spacing is not None and level:
            raise ValueError(f"level={level} and spacing={spacing:g} were both given; give one of them")
        self.options: dict[str, Any] = {
            "level": None if spacing else level,
            "spacing": spacing,
            "channels": channels,
            "alpha": alpha,
        }
        self.batch_size, self.seed = batch_size, seed

    def _check_images(self) -> tuple[int, str]:
        """Open every image once; the number of channels and the type that all of them have. Spacings that differ are said."""
        channels: dict[int, Path] = {}
        types: dict[np.dtype, Path] = {}
        spacings: dict[float | None, Path] = {}
        for dataset in (self.train_set, self.val_set, self.test_set):
            for image, _ in dataset:
                channels.setdefault(image.shape[0], image.path)
                types.setdefault(image.dtype, image.path)
                spacings.setdefault(image.spacing and round(image.spacing[0], 3), image.path)
        for what, found in (("channel(s)", channels), ("as the type of its pixels", types)):
            if len(found) > 1:
                (first, one), (second, other), *_ = found.items()
                raise LabelError(
                    f"{one.name} has {first} {what} and {other.name} has {second}; convert them to the same"
                )
        known = [spacing for spacing in spacings if spacing]
        if self.options["spacing"] is None and known and (None in spacings or max(known) > 1.1 * min(known)):
            named = ", ".join(f"{spacing or 'unknown'} ({path.name})" for spacing, path in list(spacings.items())[:8])
            _log.warning(
                "the images have different spacings: %s micrometres per pixel; --spacing reads all at one", named
            )
        return next(iter(channels)), str(next(iter(types)))

    @property
    def foreground(self) -> str:
        """The rule by which the foreground of all images is found."""
        return self.train_set.foreground.method

    def take_all_of_images(self) -> None:
        """Leave no background out from now on, and say so in checkpoints."""
        for dataset in (self.train_set, self.val_set, self.test_set):
            dataset.foreground = ForegroundChoice("none")

    def split_rows(self) -> list[dict[str, str]]:
        """Return a row for each image with its absolute path, what it is paired with and its split."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.options,
            "foreground": self.foreground,
            "pixels": (self.image_channels, self.image_type),
            "class_names": self.class_names,
            "target": self.target,
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_set, EpochShuffle.of(len(self.train_set), self.seed, self.trainer))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_set)

    def _loader(self, dataset: ImageDataset, sampler: EpochShuffle | None = None) -> DataLoader[Batch]:
        # A generator of its own: otherwise each pass over the data would draw from torch's default one.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(dataset, self.batch_size, sampler=sampler, collate_fn=self.collate, generator=generator)  # type: ignore[arg-type]


@DATASETS.register_module()
class LabelledImages(LazyImages):
    """Labelled images of a folder, split into training, validation and test images.

    Where the label table has a column `split`, that decides. Where that leaves no validation image, and without the column, some
    of the images for training are drawn for validation, see `stratified_split`: seeded, stratified by label, and all images of a
    patient on one side if the table says whose they are.

    The table and the header of every image are read at once, so that a wrong path fails before anything is trained.

    Args:
        images: Folder of the image files.
        labels: CSV or Parquet file, see `read_labels`.
        level: Level of the pyramids to train on, 0 the largest.
        spacing: Micrometres per pixel instead of a level, see `open_image`.
        channels: Which channels, by index or name, see `open_image`; all by default.
        batch_size: Images per optimizer step; they may differ in size.
        val_fraction: Share of each class used for validation.
        seed: Of the validation split and of the training order.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.
        columns: Names of columns of the table, such as `{image: slide, label: grade}`; those that are left out are guessed.
        task: What is to be predicted: one class, any number of labels, numbers, or the time of an event.
        separator: For task=multilabel, what stands between the labels in one cell.
        foreground: What is computed of an image, see `ForegroundChoice.method`: a model that takes masks leaves out the rest.

    Attributes:
        class_names: Names of the classes, the labels, the numbers, or the intervals of time.
        target: The task with what was found in the images to train on; a `Classifier` takes it.

    Raises:
        OSError: A file or folder is missing or not readable as an image.
        LabelError: The label table cannot be used, or no images are left to train on.
        ValueError: A level that an image doesn't have, an argument out of range, or no foreground by an explicit method.

    Examples:
        >>> data = LabelledImages("slides", "labels.csv", val_fraction=0.5)
        >>> data.class_names, data.val_set[0][0].shape
        (['negative', 'tumor'], (3, 512, 512))
    """

    @checked
    def __init__(
        self,
        images: Path,
        labels: Path,
        level: Annotated[int, Range(0)] = 0,
        spacing: Annotated[float, Range(0)] | None = None,
        channels: list[int | str] | None = None,
        batch_size: Annotated[int, Range(1)] = 1,
        val_fraction: Annotated[float, Range(0, 1)] = 0.2,
        seed: Annotated[int, Range(0)] = 0,
        alpha: Alpha = "drop",
        columns: Columns | None = None,
        task: Task = "classification",
        separator: str | None = None,
        foreground: str = "auto",
    ) -> None:
        super().__init__(level, spacing, channels, alpha, batch_size, seed)
        table = read_labels(labels, images, columns, task, separator)
        ForegroundChoice(foreground).check_count(len(table.images))
        self._table = table
        splits = _split(table, task, val_fraction, seed)
        self.train_set, self.val_set, self.test_set = (
            ImageDataset(splits[name], self.options, foreground) for name in ("train", "val", "test")
        )
        if not len(self.train_set):
            raise LabelError(f"{labels} leaves no image to train on; give some rows the split train")
        self.target = target_of(task, [image.label for image in self.train_set.images])
        self.class_names = list(table.class_names) or interval_names(self.target["edges"])
        self.image_channels, self.image_type = self._check_images()
        sizes = ", ".join(f"{len(splits[name])} {name}" for name in SPLITS)
        _log.info("%s images; %s", sizes, self.described)
        if val_fraction and not len(self.val_set):
            _log.warning("no image is left for validation: those to train on are too few, or of one patient")

    @property
    def described(self) -> str:
        """Words for what is predicted."""
        kind = {
            "classification": "classes",
            "multilabel": "labels",
            "regression": "numbers",
            "survival": "intervals of time",
        }
        return f"{kind[self.target['task']]} {', '.join(self.class_names)}"

    def split_rows(self) -> list[dict[str, str]]:
        """Return a row for each image with the columns that were used, its absolute path and its split: a label table again."""
        (image_column,), (split,) = self._table.columns["image"], self._table.columns.get("split", ("split",))
        places = {
            image.path: name
            for name, dataset in zip(SPLITS, (self.train_set, self.val_set, self.test_set))
            for image in dataset.images
        }
        return [
            {**dict(image.cells), image_column: str(image.path.absolute()), split: places[image.path]}
            for image in self._table.images
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["class_names"] != self.class_names:
            raise LabelError(
                f"the checkpoint was trained on the classes {', '.join(state_dict['class_names'])}, "
                f"the label table has {', '.join(self.class_names)}; resume with the labels of the run"
            )
        if self.foreground == "auto" and state_dict.get("foreground", "none") == "none":
            self.take_all_of_images()  # as in the training: before there were masks, or of a model that takes none
        trained = state_dict.get("target", {"task": "classification"})
        if trained != self.target:
            raise LabelError(
                f"the checkpoint was trained with the target {trained}, and the label table gives {self.target}; "
                "resume with the labels, the split and the task of the run"
            )


def _split(table: LabelTable, task: Task, val_fraction: float, seed: int) -> dict[str, list[LabelledImage]]:
    splits: dict[str, list[LabelledImage]] = {name: [] for name in SPLITS}
    for image in table.images:
        splits[image.split or "train"].append(image)
    if not splits["val"]:
        candidates = splits["train"]
        patients = [image.patient for image in candidates] if "patient" in table.columns else None
        classes = strata(task, [image.label for image in candidates])
        train, val = stratified_split(classes, val_fraction, seed, patients)
        splits["train"] = [candidates[index] for index in train]
        splits["val"] = [candidates[index] for index in val]
    _warn_of_leaks(splits, "".join(table.columns.get("patient", ())))
    return splits


def _warn_of_leaks(splits: dict[str, list[LabelledImage]], column: str) -> None:
    """Say in the log which patients the split of the table puts on several sides."""
    sides = [{image.patient for image in images if image.patient is not None} for images in splits.values()]
    several = sorted(one for k, side in enumerate(sides) for one in side if any(one in other for other in sides[:k]))
    if several:
        _log.warning(
            "the table puts images of one %s into several splits, so that what is measured may be too good: %s",
            column,
            listed(dict.fromkeys(several)),
        )
