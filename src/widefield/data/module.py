"""A folder of images and a label table as a Lightning data module."""

import logging
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from widefield.data.dataset import Batch, EpochShuffle, ImageDataset, collate
from widefield.data.labels import LabelError, LabelledImage, read_labels
from widefield.data.split import stratified_split
from widefield.images import Alpha
from widefield.registry import DATASETS, Range

_log = logging.getLogger(__name__)


@DATASETS.register_module()
class LabelledImages(pl.LightningDataModule):
    """Labelled images of a folder, split into training, validation and test images.

    Where the label table has a column `split`, that decides. Images of the training split that it leaves without any
    validation image, and tables without the column, are split by chance, stratified and seeded.

    The table and the header of every image are read at once, so that a wrong path fails before anything is trained.

    Args:
        images: Folder of the image files.
        labels: CSV file, see `read_labels`.
        level: Level of the pyramids to train on, 0 the largest.
        batch_size: Images per optimizer step; they may differ in size.
        val_fraction: Share of each class used for validation.
        seed: Of the validation split and of the training order.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.

    Raises:
        OSError: A file or folder is missing or not readable as an image.
        LabelError: The label table cannot be used, or no images are left to train on.
        ValueError: A level that an image doesn't have, or an argument out of range.
    """

    component_kind = "data module"

    def __init__(
        self,
        images: Path,
        labels: Path,
        level: Annotated[int, Range(0)] = 0,
        batch_size: Annotated[int, Range(1)] = 1,
        val_fraction: Annotated[float, Range(0, 1)] = 0.2,
        seed: int = 0,
        alpha: Alpha = "drop",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"the batch size is {batch_size}; it must be at least 1")
        table = read_labels(labels, images)
        self.class_names = list(table.class_names)
        self.level = level
        self.alpha: Alpha = alpha
        self.batch_size = batch_size
        self.seed = seed
        splits = _split(table.images, val_fraction, seed)
        self.train_set, self.val_set, self.test_set = (
            ImageDataset(splits[name], level, alpha) for name in ("train", "val", "test")
        )
        if not len(self.train_set):
            raise LabelError(f"{labels} leaves no image to train on; give some rows the split train")
        self.channels = self._check_images()
        sizes = ", ".join(f"{len(splits[name])} {name}" for name in ("train", "val", "test"))
        _log.info("%s images of the classes %s", sizes, ", ".join(self.class_names))

    def _check_images(self) -> int:
        """Open every image once; the number of channels that all of them have."""
        channels: dict[int, Path] = {}
        for dataset in (self.train_set, self.val_set, self.test_set):
            for image, _ in dataset:
                channels.setdefault(image.shape[0], image.path)
        if len(channels) > 1:
            (first, one), (second, other), *_ = channels.items()
            raise LabelError(
                f"{one.name} has {first} channel(s) and {other.name} has {second}; convert them to the same number"
            )
        return next(iter(channels))

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "alpha": self.alpha, "class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["class_names"] != self.class_names:
            raise LabelError(
                f"the checkpoint was trained on the classes {', '.join(state_dict['class_names'])}, "
                f"the label table has {', '.join(self.class_names)}; resume with the labels of the run"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_set, EpochShuffle(len(self.train_set), self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_set)

    def _loader(self, dataset: ImageDataset, sampler: EpochShuffle | None = None) -> DataLoader[Batch]:
        # A generator of its own: otherwise each pass over the data would draw from torch's default one.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(dataset, self.batch_size, sampler=sampler, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


def _split(images: tuple[LabelledImage, ...], val_fraction: float, seed: int) -> dict[str, list[LabelledImage]]:
    splits: dict[str, list[LabelledImage]] = {"train": [], "val": [], "test": []}
    for image in images:
        splits[image.split or "train"].append(image)
    if not splits["val"]:
        candidates = splits["train"]
        train, val = stratified_split([image.label for image in candidates], val_fraction, seed)
        splits["train"] = [candidates[index] for index in train]
        splits["val"] = [candidates[index] for index in val]
    return splits
