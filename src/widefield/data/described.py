"""The base class of data sets that a configuration describes."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from widefield.components.data_sample import DataSample
from widefield.components.transforms.masks import MASK_GENERATORS, MaskGeneratorConfig
from widefield.data.pipeline import Picture, Pipeline, TransformsConfig

Item = tuple[Any, DataSample]
"""A picture, or a tuple of views of one, and what is known of it."""


class DescribedDataset(Dataset[Item]):
    """Pictures and `DataSample`s with `gt_label` (where there are labels), `sample_idx` and, where it is a file, `img_path`.

    A subclass has `__len__`, `picture` and `label`.

    Attributes:
        class_names: Names of the classes, or None where they have none.

    Args:
        transforms: From the picture as it is stored to what the model gets, see `Pipeline`.
        mask_generator: Gives each sample a random `mask`, for masked image modelling.
    """

    component_kind = "dataset"
    class_names: list[str] | None = None

    def __init__(self, transforms: TransformsConfig = None, mask_generator: MaskGeneratorConfig = None) -> None:
        self._pipeline = Pipeline(transforms)
        self._mask_generator = None if mask_generator is None else MASK_GENERATORS.build(mask_generator)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, index: int) -> Picture:
        """The picture as it is stored."""

    @abstractmethod
    def label(self, index: int) -> int | list[int] | None:
        """Its class, or classes; None where nothing is known."""

    def __getitem__(self, index: int) -> Item:
        picture = self.picture(index)
        place = {} if isinstance(picture, Tensor) else {"img_path": str(picture.path)}
        sample = DataSample(sample_idx=index, **place)
        label = self.label(index)
        if label is not None:
            sample.set_gt_label(torch.as_tensor(label, dtype=torch.long))  # a list may be empty
        if self._mask_generator is not None:
            sample.set_mask(self._mask_generator())
        return self._pipeline(picture), sample
