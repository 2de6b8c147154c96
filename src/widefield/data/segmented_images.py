"""Images with label maps: the Lightning data module and its data sets, whole images or crops of them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from widefield.config import checked
from widefield.data.joint_augmentation import JointAugmentation
from widefield.data.paired_images import (
    ImagesWithMaps,
    PairedDataset,
    PairedImage,
    matched,
    refuse_augmented_images,
)
from widefield.data.splits import stratified_split
from widefield.data.tables import LabelError, listed
from widefield.images import Alpha, ForegroundChoice, ImageFile, LabelMap, open_image, open_labels
from widefield.images.foreground import is_geojson, named_polygons
from widefield.images.label_maps import class_counts
from widefield.registry import DATASETS, TRANSFORMS, ComponentOf, Range

_log = logging.getLogger(__name__)
_CELL = 64
"""Side, in pixels, of the cells in which it is known which classes there are."""
_BALANCED = 0.5
"""Share of the crops that hold a class other than 0, of which each is as likely."""
_STRIP = 16


class SegmentedDataset(PairedDataset):
    """Pairs (lazy image, lazy label map); or, by the index (epoch, index), of a crop as arrays.

    Args:
        images: What to open.
        options: How, see `ImageDataset`.
        class_names: For polygons.
        ignore_index: The label that is no class.
        others: As of `PairedDataset`.
    """

    def __init__(
        self,
        images: Sequence[PairedImage],
        options: Mapping[str, Any],
        class_names: Sequence[str],
        ignore_index: int = 255,
        **others: Any,
    ) -> None:
        super().__init__(images, options, **others)
        self._class_names, self._ignored = list(class_names), ignore_index
        self._cells: dict[int, dict[int, np.ndarray]] = {}

    def open_target(self, path: Path, image: ImageFile) -> LabelMap:
        return open_labels(path, image, self._class_names)

    def cropped(self, target: np.ndarray) -> np.ndarray:
        return target[0]

    def corners(
        self, index: int, target: LabelMap, side: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        low, high = super().corners(index, target, side, random)
        if index not in self._cells:
            self._cells[index] = cells_by_class(target, self._ignored)
        classes = [label for label in self._cells[index] if label > 0]
        if classes and random.random() < _BALANCED:
            cells = self._cells[index][classes[random.integers(len(classes))]]
            cell = cells[random.integers(len(cells))] * _CELL
            low, high = np.clip(cell + _CELL - side, 0, high), np.clip(cell, 0, high)
            low, high = np.minimum(low, high), np.maximum(low, high)  # a crop smaller than a cell lies inside of it
        return low, high


def cells_by_class(labels: LabelMap, ignore_index: int) -> dict[int, np.ndarray]:
    """Return for each label of a map the cells (row, column) of 64 x 64 pixels that hold it, (n, 2), in the order of labels."""
    found: dict[int, list[np.ndarray]] = {}
    for y, strip in label_strips(labels):
        for label in np.unique(strip):
            if label != ignore_index:
                rows, columns = np.nonzero(strip == label)
                cells = np.unique(np.stack([(rows + y) // _CELL, columns // _CELL], 1), axis=0)
                found.setdefault(int(label), []).append(cells)
    return {label: np.concatenate(found[label]) for label in sorted(found)}


def label_strips(labels: LabelMap) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row of each strip of whole cells, and its labels (height, width)."""
    _, height, width = labels.shape
    rows = max(1, min(_STRIP, 2**24 // (width * _CELL))) * _CELL
    for y in range(0, height, rows):
        yield y, labels.read(y, 0, min(rows, height - y), width)[0]


@DATASETS.register_module()
class SegmentedImages(ImagesWithMaps):
    """Images of a folder with a label map each, in another folder, of which some are drawn for validation.

    The label map of `a/b.tif` is the file `a/b` of any ending below the folder of label maps: a label image (one channel of whole
    numbers, the indices of classes; of one with a palette its indices), or polygons in GeoJSON, see `open_labels`. Images without
    a label map are left out, which the log says. Headers are read at once, pixels as they are needed.

    Args:
        images: Folder of the images.
        masks: Folder of the label maps.
        classes: Names of the classes, in the order of their indices. None finds them, and reads all label maps once for it: numbers
            up to the greatest label, or of polygons "background", which is what none covers, and their classes by name.
        ignore_index: The label of pixels that count neither in the loss nor in metrics.
        crop: Train on crops of so many pixels a side, one for each image and epoch, drawn anew in each: half of them anywhere, half
            around a class other than 0, all of which are as likely. Validation is of whole images. None trains on whole images.
        augment: Change crops and their labels alike: "flips", or a list of transforms of torchvision, see `JointAugmentation`.
        level, spacing, channels, batch_size, val_fraction, seed, alpha, foreground: See `LabelledImages`.

    Raises:
        OSError: A file or folder is missing or cannot be read.
        LabelError: No image has a label map, a label map has no image or several, or images differ in channels or type.
        WrongArgumentError: `augment` without `crop`, or one that is not known.
        LabelMapError: A label map has another size than its image, or is none.
    """

    column = "mask"

    @checked
    def __init__(
        self,
        images: Path,
        masks: Path,
        classes: list[str] | None = None,
        ignore_index: int = 255,
        crop: Annotated[int, Range(1)] | None = None,
        augment: Annotated[str | list[dict[str, Any]] | None, ComponentOf(TRANSFORMS)] = None,
        level: Annotated[int, Range(0)] = 0,
        spacing: Annotated[float, Range(0)] | None = None,
        channels: list[int | str] | None = None,
        batch_size: Annotated[int, Range(1)] = 1,
        val_fraction: Annotated[float, Range(0, 1)] = 0.2,
        seed: Annotated[int, Range(0)] = 0,
        alpha: Alpha = "drop",
        foreground: str = "none",
    ) -> None:
        super().__init__(level, spacing, channels, alpha, batch_size, seed)
        refuse_augmented_images(augment, crop)
        augmentation = None if augment is None else JointAugmentation(augment, ignore_index)
        found = matched(Path(images), Path(masks))
        ForegroundChoice(foreground).check_count(len(found))
        self.crop, self.ignore_index = crop, ignore_index
        self.class_names = classes or _classes_in(found, self.options, ignore_index)
        if len(set(self.class_names)) != len(self.class_names) or len(self.class_names) < 2:
            raise LabelError(f"the classes are {listed(self.class_names)}; expected two at least, all different")
        train, val = stratified_split([0] * len(found), val_fraction, seed)
        self.train_set, self.val_set, self.test_set = (
            SegmentedDataset(
                [found[k] for k in chosen],
                self.options,
                self.class_names,
                ignore_index,
                foreground=foreground,
                crop=side,
                seed=seed,
                augmentation=augmentation,
            )
            for chosen, side in ((train, crop), (val, None), ([], None))
        )
        self.target = {"task": "segment"}
        self.image_channels, self.image_type = self._check_images()
        _log.info("%d train, %d val images; %s", len(train), len(val), self.described)

    @property
    def described(self) -> str:
        """Words for what is predicted."""
        return f"classes {', '.join(self.class_names)} of each pixel"

    def class_counts(self) -> np.ndarray:
        """Return how many pixels of the training label maps are of each class, (C,); all of them are read."""
        counts = np.zeros(len(self.class_names), np.int64)
        pairs: Any = self.train_set
        for _, labels in pairs:
            counts += class_counts(labels, len(counts))
        return counts

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["class_names"] != self.class_names:
            raise LabelError(
                f"the checkpoint was trained on the classes {', '.join(state_dict['class_names'])}, and here are "
                f"{', '.join(self.class_names)}; give those of the run with --classes"
            )


def _classes_in(found: Sequence[PairedImage], options: Mapping[str, Any], ignore_index: int) -> list[str]:
    """Return names for the classes in label maps, all of which are read for it."""
    _log.info("reading %d label maps once for their classes; --classes names them", len(found))
    names = {name for one in found if is_geojson(one.label) for name, _ in named_polygons(one.label)}
    greatest = 0
    for one in found:
        if not is_geojson(one.label):
            labels = open_labels(one.label, open_image(one.path, **options))
            for _, strip in label_strips(labels):
                greatest = max(greatest, int(np.where(strip == ignore_index, 0, strip).max()))
    if names and greatest:
        raise LabelError(
            "some label maps are images and others polygons; name the classes, in the order of the indices"
        )
    if names:
        if None in names:
            raise LabelError(
                f"a GeoJSON file in {found[0].label.parent} has polygons without a class; give each one, as QuPath's "
                "classification does"
            )
        return ["background", *sorted(str(name) for name in names if name != "background")]
    return [str(k) for k in range(greatest + 1)]
