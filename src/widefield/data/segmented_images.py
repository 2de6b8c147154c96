"""Images with label maps: the Lightning data module and its data sets, whole images or crops of them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from widefield.config import checked
from widefield.data.joint_augmentation import JointAugmentation
from widefield.data.labelled_images import EpochShuffle, ImageDataset, LazyImages
from widefield.data.labels import SPLITS, FilesByName, stems_of
from widefield.data.splits import stratified_split
from widefield.data.tables import LabelError, listed
from widefield.errors import WrongArgumentError
from widefield.images import Alpha, ForegroundChoice, ImageFile, LabelMap, images_below, open_image, open_labels
from widefield.images.foreground import is_geojson, named_polygons
from widefield.registry import DATASETS, TRANSFORMS, ComponentOf, Range

_log = logging.getLogger(__name__)
_CELL = 64
"""Side, in pixels, of the cells in which it is known which classes there are."""
_BALANCED = 0.5
"""Share of the crops that hold a class other than 0, of which each is as likely."""
_STRIP = 16


@dataclass(frozen=True)
class SegmentedImage:
    """An image and its label map, which is what a data set pairs it with.

    Attributes:
        path: The image.
        label: The label map.
    """

    path: Path
    label: Path


class SegmentedDataset(ImageDataset):
    """Pairs (lazy image, lazy label map); or, by the index (epoch, index), of a crop as arrays.

    Args:
        images: What to open.
        options: How, see `ImageDataset`.
        class_names: For polygons.
        foreground: See `ImageDataset`.
        crop: Side of crops in pixels; None for whole images.
        ignore_index: The label that is no class.
        seed: Of the crops, and of their changes.
        augmentation: Changes crops; None for none.
    """

    def __init__(
        self,
        images: Sequence[SegmentedImage],
        options: Mapping[str, Any],
        class_names: Sequence[str],
        foreground: str = "none",
        crop: int | None = None,
        ignore_index: int = 255,
        seed: int = 0,
        augmentation: JointAugmentation | None = None,
    ) -> None:
        super().__init__(images, options, foreground)  # type: ignore[arg-type]
        self._augmentation = augmentation
        self._class_names, self._crop, self._ignored, self._seed = list(class_names), crop, ignore_index, seed
        self._cells: dict[int, dict[int, np.ndarray]] = {}

    def __getitem__(self, index: Any) -> Any:
        epoch, index = index if isinstance(index, tuple) else (None, index)
        image, path = super().__getitem__(index)
        labels = open_labels(path, image, self._class_names)  # type: ignore[arg-type]
        if epoch is None or self._crop is None:
            return image, labels
        region = self._region(index, labels, epoch)
        crop = image.read(*region), labels.read(*region)[0]
        return crop if self._augmentation is None else self._augmentation(*crop, (self._seed, epoch, index))

    def _region(self, index: int, labels: LabelMap, epoch: int) -> tuple[int, int, int, int]:
        """Return the crop (y, x, height, width) of an image in an epoch, which depends on these and the seed alone."""
        assert self._crop is not None
        random = np.random.default_rng((self._seed, epoch, index))
        size = np.array(labels.shape[1:])
        side = np.minimum(self._crop, size)
        low, high = np.zeros(2, np.int64), size - side
        if index not in self._cells:
            self._cells[index] = cells_by_class(labels, self._ignored)
        classes = [label for label in self._cells[index] if label > 0]
        if classes and random.random() < _BALANCED:
            cells = self._cells[index][classes[random.integers(len(classes))]]
            cell = cells[random.integers(len(cells))] * _CELL
            low, high = np.clip(cell + _CELL - side, 0, high), np.clip(cell, 0, high)
            low, high = np.minimum(low, high), np.maximum(low, high)  # a crop smaller than a cell lies inside of it
        y, x = (int(random.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        return y, x, int(side[0]), int(side[1])


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


class EpochCrops(EpochShuffle):
    """The order of `EpochShuffle` as pairs (epoch, index), by which a data set draws crops."""

    def __iter__(self) -> Iterator[Any]:
        return ((self.epoch, index) for index in super().__iter__())


def collate_maps(pairs: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return a batch: lists of lazy images and label maps, or tensors of crops (N, C, h, w) and (N, h, w), if of one size."""
    images, labels = ([pair[k] for pair in pairs] for k in range(2))
    if isinstance(images[0], ImageFile):
        return images, labels
    if len({image.shape for image in images}) == 1:
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))
    return [torch.from_numpy(image)[None] for image in images], [torch.from_numpy(one)[None] for one in labels]


@DATASETS.register_module()
class SegmentedImages(LazyImages):
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

    collate = staticmethod(collate_maps)

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
        if augment is not None and crop is None:
            raise WrongArgumentError(
                "augment changes crops, and whole images are trained on; give crop too, or leave it out"
            )
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
                foreground,
                side,
                ignore_index,
                seed,
                augmentation,
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

    def split_rows(self) -> list[dict[str, str]]:
        sets = zip(SPLITS, (self.train_set, self.val_set, self.test_set))
        return [
            {"image": str(one.path.absolute()), "mask": str(one.label), "split": name}
            for name, dataset in sets
            for one in dataset.images
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["class_names"] != self.class_names:
            raise LabelError(
                f"the checkpoint was trained on the classes {', '.join(state_dict['class_names'])}, and here are "
                f"{', '.join(self.class_names)}; give those of the run with --classes"
            )

    def train_dataloader(self) -> Any:
        kind = EpochShuffle if self.crop is None else EpochCrops
        return self._loader(self.train_set, kind.of(len(self.train_set), self.seed, self.trainer))


def matched(images: Path, masks: Path) -> list[SegmentedImage]:
    """Return the images below one folder with their label maps below another, in the order of their paths.

    Raises:
        FileNotFoundError: A folder does not exist.
        LabelError: Nothing matches, a label map belongs to no image, or an image has several.
    """
    for folder, flag in ((images, "--images"), (masks, "--masks")):
        if not folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} does not exist; check {flag}")
    files = [*images_below(masks), *sorted(masks.rglob("*.geojson"))]
    by_name, left, alone = FilesByName(files, masks), dict.fromkeys(files), []
    found = []
    for image in images_below(images):
        name = image.relative_to(images).as_posix()
        matches = next((some for one in (name, *stems_of(name)) if (some := by_name.matches(one))), [])
        if len(matches) > 1:
            raise LabelError(f"the image {image} may have the label maps {listed(matches)}; keep one of them")
        if not matches:
            alone.append(image)
            continue
        left.pop(matches[0], None)
        found.append(SegmentedImage(image, matches[0].absolute()))
    if not found:
        raise LabelError(
            f"no image in {images} has a label map in {masks}: that of a.tif is a.png, a.tif, a.geojson or the like; there are "
            f"the images {listed(alone) or 'none'}, and the label maps {listed(files) or 'none'}"
        )
    if left:
        raise LabelError(f"{len(left)} label map(s) in {masks} have no image in {images}: {listed(left)}")
    if alone:
        _log.warning("%d image(s) in %s have no label map and are left out: %s", len(alone), images, listed(alone))
    return found


def _classes_in(found: Sequence[SegmentedImage], options: Mapping[str, Any], ignore_index: int) -> list[str]:
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
