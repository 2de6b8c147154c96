"""Data sets that a configuration describes: their base class, files in folders, and files that a text file names."""

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from widefield.components.data_sample import DataSample
from widefield.components.transforms.masks import MASK_GENERATORS, MaskGeneratorConfig
from widefield.config import checked
from widefield.data.pipeline import Picture, Pipeline, TransformsConfig
from widefield.data.tables import LabelError
from widefield.images import OTHER_PICTURES, Alpha, image_endings, images_below, open_image
from widefield.registry import DATASETS, Range

_log = logging.getLogger(__name__)
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
        sample = DataSample(place, sample_idx=index)
        label = self.label(index)
        if label is not None:
            sample.set_gt_label(torch.as_tensor(label, dtype=torch.long))  # a list may be empty
        if self._mask_generator is not None:
            sample.set_mask(self._mask_generator())
        return self._pipeline(picture), sample


class _ImageFiles(DescribedDataset):
    """Image files, each opened at one level of its pyramid.

    Attributes:
        files: Set by a subclass.
    """

    files: list[Path]

    def __init__(
        self, level: int, alpha: Alpha, transforms: TransformsConfig, mask_generator: MaskGeneratorConfig
    ) -> None:
        super().__init__(transforms, mask_generator)
        self.level = level
        self.alpha: Alpha = alpha

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, index: int) -> Picture:
        return open_image(self.files[index], self.level, alpha=self.alpha)


@DATASETS.register_module()
class ImageFolder(_ImageFiles):
    """Image files of a folder, with a class for each of its sub-folders.

    Sub-folders are sorted by name; their files, however deep, too. Links are followed; hidden files and folders count for nothing.

    Args:
        root: The folder.
        with_label: False takes all files of the folder, however deep, without classes.
        level: Level of pyramids, 0 the largest.
        extensions: How the names of image files end; by default as those of all formats.
        transforms: See `Pipeline`.
        mask_generator: Gives each sample a random `mask`.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.

    Raises:
        FileNotFoundError: There is no such folder.
        LabelError: It has no sub-folders, or no images.
    """

    @checked
    def __init__(
        self,
        root: Path,
        with_label: bool = True,
        level: Annotated[int, Range(0)] = 0,
        extensions: tuple[str, ...] | None = None,
        transforms: TransformsConfig = None,
        mask_generator: MaskGeneratorConfig = None,
        alpha: Alpha = "drop",
    ) -> None:
        super().__init__(level, alpha, transforms, mask_generator)
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"the folder of images {root} does not exist")
        self._labels: list[int] | None = None
        if not with_label:
            self.files = images_below(root, extensions)
        else:
            folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
            if not folders:
                raise LabelError(
                    f"{root} has no sub-folders, one for each class; without classes give with_label=false"
                )
            self.class_names = [folder.name for folder in folders]
            files = [images_below(folder, extensions) for folder in folders]
            self.files = [file for inside in files for file in inside]
            self._labels = [label for label, inside in enumerate(files) for _ in inside]
            empty = [folder.name for folder, inside in zip(folders, files, strict=True) if not inside]
            if empty and self.files:
                _log.warning("%s has no images of %s", root, ", ".join(empty))
        if not self.files:
            raise LabelError(f"{root} holds no images; those end in {', '.join(extensions or image_endings())}")

        _warn_of_others(root, extensions or image_endings())

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]


def _warn_of_others(root: Path, endings: Sequence[str]) -> None:
    """Say in the log how many files of `root` have names of images, and are left out for they do not end in `endings`."""
    others = {*OTHER_PICTURES, *image_endings()} - {ending.lower() for ending in endings}
    left_out = [path for path in images_below(root, sorted({*others, ".zarr"})) if path.suffix.lower() in others]
    if left_out:
        counts = Counter(path.suffix.lower() for path in left_out)
        named = ", ".join(f"{count} of {ending}" for ending, count in counts.items())
        _log.warning(
            "%s has images that are left out: %s; those that are taken end in %s", root, named, ", ".join(endings)
        )


@DATASETS.register_module()
class AnnotationFile(_ImageFiles):
    """Image files that a text file names, with their labels.

    A line is a path from `root`, which may hold spaces, and after a space the index of the class: `dogs/rex.png 3`. Empty lines and
    those that begin with # count for nothing.

    Attributes:
        label_count: The largest label, plus 1.

    Args:
        root: The folder of the images.
        ann_file: The text file (UTF-8), by its path from `root` or as it is.
        class_names: Names of the classes; None where they have none.
        multi_label: A line has any number of classes, separated by commas: `rex.png 0,3`; an image of none ends in a dash.
        level: Level of pyramids, 0 the largest.
        transforms: See `Pipeline`.
        mask_generator: Gives each sample a random `mask`.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.

    Raises:
        FileNotFoundError: The text file, or an image, is not there.
        LabelError: A line without a label, or with one that there is no class for; there are no lines.
    """

    @checked
    def __init__(
        self,
        root: Path,
        ann_file: Path,
        class_names: list[str] | None = None,
        multi_label: bool = False,
        level: Annotated[int, Range(0)] = 0,
        transforms: TransformsConfig = None,
        mask_generator: MaskGeneratorConfig = None,
        alpha: Alpha = "drop",
    ) -> None:
        super().__init__(level, alpha, transforms, mask_generator)
        root, ann_file = Path(root), Path(ann_file)
        place = root / ann_file if (root / ann_file).is_file() else ann_file
        if not place.is_file():
            raise FileNotFoundError(f"the annotation file {ann_file} does not exist, neither as it is nor in {root}")
        self.class_names = class_names
        self.multi_label = multi_label
        lines = enumerate(place.read_text(encoding="utf-8-sig").splitlines(), start=1)
        rows = [
            self._parse(line.strip(), f"{place}, line {number}")
            for number, line in lines
            if line.strip() and not line.startswith("#")
        ]
        if not rows:
            raise LabelError(f"{place} names no image; write a line for each, such as images/1.png 0")
        self.files = [root / path for path, _ in rows]
        self._labels = [labels for _, labels in rows]
        missing = [path for path in self.files if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise FileNotFoundError(
                f"{place} names {missing[0]}{more}, which does not exist; paths start from root={root}"
            )
        self.label_count = max((label for labels in self._labels for label in labels), default=-1) + 1

    def label(self, index: int) -> int | list[int]:
        labels = self._labels[index]
        return labels if self.multi_label else labels[0]

    def _parse(self, line: str, where: str) -> tuple[str, list[int]]:
        path, _, text = line.rpartition(" ")
        texts = [] if self.multi_label and text == "-" else text.split(",")
        if not path or not all(one.isdecimal() for one in texts):
            raise LabelError(
                f"{where}: {line!r} does not end in the index of a class; write a path, a space, and 0, say"
            )
        labels = [int(one) for one in texts]
        if len(labels) > 1 and not self.multi_label:
            raise LabelError(f"{where}: there are {len(labels)} labels; several per image need multi_label=true")
        if self.class_names is not None and max(labels, default=0) >= len(self.class_names):
            raise LabelError(
                f"{where}: the label {max(labels)} is beyond the {len(self.class_names)} class names, from 0"
            )
        return path.strip(), labels
