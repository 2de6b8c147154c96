"""Data sets that a configuration describes, as a Lightning data module."""

from collections.abc import Sequence
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from widefield.components.data_sample import DataSample
from widefield.components.models.base_model import as_sample
from widefield.config import checked
from widefield.data.described import Item
from widefield.data.labelled_images import EpochShuffle
from widefield.data.tables import LabelError
from widefield.errors import WrongArgumentError
from widefield.registry import DATASETS, ComponentOf, Range

DatasetConfig = Annotated[Dataset | dict[str, Any], ComponentOf(DATASETS, "dataset")]


@DATASETS.register_module()
class Datasets(pl.LightningDataModule):
    """Data sets for training, validation and test, and the batches made of them.

    A batch is `(inputs, samples)`: of tensors of one size a tensor (N, C, H, W), of views a list of such tensors, of lazily read
    images or tensors of several sizes a list of them; and a `DataSample` for each image.

    Attributes:
        class_names: Those of the first data set that has some, or None.
        label_count: How many classes there must be for the labels of data sets that know them.

    Args:
        train, val, test: Data sets, each described as `{type: ImageFolder, root: ..., transforms: [...]}`.
        batch_size: Images per step.
        num_workers: Processes that load images.
        drop_last: Leave out the last training batch where it is not full.
        seed: Of the training order.

    Raises:
        ValueError: There is no data set, the batch size is not positive, or the classes of two differ.
    """

    component_kind = "data module"

    @checked
    def __init__(
        self,
        train: DatasetConfig | None = None,
        val: DatasetConfig | None = None,
        test: DatasetConfig | None = None,
        batch_size: Annotated[int, Range(1)] = 1,
        num_workers: Annotated[int, Range(0)] = 0,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if train is None and val is None and test is None:
            raise ValueError("there are no data sets; describe one as train={type: ImageFolder, root: ...}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.seed = seed
        self.train_set, self.val_set, self.test_set = (
            () if one is None else DATASETS.build(one) for one in (train, val, test)
        )
        named = [names for one in self._sets() if (names := getattr(one, "class_names", None))]
        self.class_names = named[0] if named else None
        self.label_count = max((getattr(one, "label_count", 0) for one in self._sets()), default=0)
        for other in named[1:]:
            _refuse_other_classes(named[0], other, "those of another data set")

    def train_dataloader(self) -> DataLoader[Any]:
        if not len(self.train_set):
            raise ValueError(
                "there is nothing to train on; describe a data set as data.train={type: ImageFolder, root: ...}"
            )
        return self._loader(
            self.train_set, EpochShuffle.of(len(self.train_set), self.seed, self.trainer), self.drop_last
        )

    def val_dataloader(self) -> Any:
        return self._loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> Any:
        return self._loader(self.test_set) if len(self.test_set) else []

    def state_dict(self) -> dict[str, Any]:
        return {"class_names": self.class_names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["class_names"] and self.class_names:
            _refuse_other_classes(state_dict["class_names"], self.class_names, "those of the data sets")

    def _sets(self) -> list[Any]:
        return [one for one in (self.train_set, self.val_set, self.test_set) if len(one)]

    def _loader(self, dataset: Any, sampler: EpochShuffle | None = None, drop_last: bool = False) -> DataLoader[Any]:
        # A generator of its own: otherwise each pass over the data would draw from torch's default one.
        return DataLoader(
            dataset,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate_items,
            drop_last=drop_last,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context="spawn" if self.num_workers else None,  # libvips is not safe to fork after use
            generator=torch.Generator().manual_seed(self.seed),
        )


def collate_items(items: Sequence[Item]) -> tuple[Any, list[DataSample]]:
    """The batch of the items of a data set, see `Datasets`.

    Raises:
        WrongArgumentError: An item is no picture (or tuple of views) with a sample, as data sets of one's own may give.
    """
    pairs = [_as_pair(item) for item in items]
    pictures = [picture for picture, _ in pairs]
    samples = [sample for _, sample in pairs]
    if isinstance(pictures[0], (tuple, list)):
        return [as_batch(list(view)) for view in zip(*pictures, strict=True)], samples
    return as_batch(pictures), samples


def _as_pair(item: Any) -> Item:
    """Return picture and sample of an item: (picture, sample or label), or a dictionary of inputs and data_samples."""
    if isinstance(item, dict) and "inputs" in item:
        item = item["inputs"], item.get("data_samples")
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not _is_picture(item[0]):
        given = [type(one).__name__ for one in item] if isinstance(item, (tuple, list)) else type(item).__name__
        raise WrongArgumentError(
            f"an item of a data set is {given}; it must be (picture, DataSample), a picture being a tensor (C, H, W), "
            "a lazily read image or a tuple of views; a class index may stand for the sample"
        )
    picture, sample = item
    return picture, DataSample() if sample is None else as_sample(sample)


def _is_picture(value: Any) -> bool:
    views = value if isinstance(value, (tuple, list)) else [value]
    return bool(views) and all(hasattr(view, "shape") and len(view.shape) == 3 for view in views)


def as_batch(pictures: list[Any]) -> Any:
    """Tensors (C, H, W) of one size as a tensor (N, C, H, W); everything else as it is."""
    is_batch = all(isinstance(one, Tensor) for one in pictures) and len({one.shape for one in pictures}) == 1
    return torch.stack(pictures) if is_batch else pictures


def _refuse_other_classes(expected: Sequence[str], found: Sequence[str], whose: str) -> None:
    if list(expected) != list(found):
        raise LabelError(
            f"the classes are {', '.join(expected)}, and {whose} are {', '.join(found)}; they must be the same, in the same order"
        )
