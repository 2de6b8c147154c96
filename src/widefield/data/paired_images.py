"""Images that each have a map in another folder: which belong together, crops of both, and the data module of maps of numbers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from widefield.config import checked
from widefield.data.joint_augmentation import JointAugmentation
from widefield.data.labelled_images import EpochShuffle, ImageDataset, LazyImages
from widefield.data.labels import SPLITS, FilesByName, stems_of
from widefield.data.splits import stratified_split
from widefield.data.tables import LabelError, listed
from widefield.errors import WrongArgumentError
from widefield.images import Alpha, ForegroundChoice, ImageFile, LabelMap, images_below, open_image
from widefield.images.formats import has_data
from widefield.registry import DATASETS, Range

_log = logging.getLogger(__name__)
_SAMPLES, _SAMPLE = 64, 256
"""Number and side of the regions of target maps that are read for their mean and standard deviation."""


@dataclass(frozen=True)
class PairedImage:
    """An image and the map that a data set pairs it with.

    Attributes:
        path: The image.
        label: The map.
    """

    path: Path
    label: Path


class PairedDataset(ImageDataset):
    """Pairs (lazy image, lazy map); or, by the index (epoch, index), of a crop as arrays.

    Args:
        images: What to open.
        options: How, see `ImageDataset`.
        foreground: See `ImageDataset`.
        crop: Side of crops in pixels; None for whole images.
        seed: Of the crops, and of their changes.
        augmentation: Changes crops; None for none.
    """

    def __init__(
        self,
        images: Sequence[PairedImage],
        options: Mapping[str, Any],
        foreground: str = "none",
        crop: int | None = None,
        seed: int = 0,
        augmentation: JointAugmentation | None = None,
    ) -> None:
        super().__init__(images, options, foreground)  # type: ignore[arg-type]
        self._crop, self._seed, self._augmentation = crop, seed, augmentation

    def __getitem__(self, index: Any) -> Any:
        epoch, index = index if isinstance(index, tuple) else (None, index)
        image, path = super().__getitem__(index)
        target = self.open_target(path, image)  # type: ignore[arg-type]
        if epoch is None or self._crop is None:
            return image, target
        random = np.random.default_rng((self._seed, epoch, index))
        size = np.array(target.shape[1:])
        side = np.minimum(self._crop, size)
        corners = zip(*self.corners(index, target, side, random), strict=True)
        region = *(int(random.integers(a, b + 1)) for a, b in corners), int(side[0]), int(side[1])
        crop = image.read(*region), self.cropped(target.read(*region))
        return crop if self._augmentation is None else self._augmentation(*crop, (self._seed, epoch, index))

    def open_target(self, path: Path, image: ImageFile) -> ImageFile | LabelMap:
        """Return the map of an image."""
        return open_target(path, image)

    def cropped(self, target: np.ndarray) -> np.ndarray:
        """Return a region (C, h, w) of a map as a batch has it."""
        return target

    def corners(
        self, index: int, target: Any, side: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and the greatest corner (y, x) of a crop of so many rows and columns."""
        return np.zeros(2, np.int64), np.array(target.shape[1:]) - side


class EpochCrops(EpochShuffle):
    """The order of `EpochShuffle` as pairs (epoch, index), by which a data set draws crops."""

    def __iter__(self) -> Any:
        return ((self.epoch, index) for index in super().__iter__())


def collate_maps(pairs: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return a batch: lists of lazy images and maps, or tensors of crops (N, C, h, w) and of their maps (N, ..., h, w).

    Crops of several sizes are lists, too.
    """
    images, maps = ([pair[k] for pair in pairs] for k in range(2))
    if isinstance(images[0], ImageFile):
        return images, maps
    if len({image.shape for image in images}) == 1:
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(maps))
    return [torch.from_numpy(image)[None] for image in images], [torch.from_numpy(one)[None] for one in maps]


class ImagesWithMaps(LazyImages):
    """Base class of data modules that pair each image with a map.

    Attributes:
        crop: Side of the crops that are trained on; None for whole images.
        column: The name of the maps in a table of the split.
    """

    crop: int | None
    column: str
    collate = staticmethod(collate_maps)

    def split_rows(self) -> list[dict[str, str]]:
        sets = zip(SPLITS, (self.train_set, self.val_set, self.test_set))
        return [
            {"image": str(one.path.absolute()), self.column: str(one.label), "split": name}
            for name, dataset in sets
            for one in dataset.images
        ]

    def train_dataloader(self) -> Any:
        kind = EpochShuffle if self.crop is None else EpochCrops
        return self._loader(self.train_set, kind.of(len(self.train_set), self.seed, self.trainer))


def matched(images: Path, maps: Path, flag: str = "--masks", kind: str = "label map") -> list[PairedImage]:
    """Return the images below one folder with their maps below another, in the order of their paths.

    Args:
        images: Folder of the images.
        maps: Folder of the maps.
        flag: Names `maps` in messages.
        kind: The word for a map in messages.

    Raises:
        FileNotFoundError: A folder does not exist.
        LabelError: Nothing matches, a map belongs to no image, or an image has several.
    """
    for folder, name in ((images, "--images"), (maps, flag)):
        if not folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} does not exist; check {name}")
    files = [*images_below(maps), *sorted(maps.rglob("*.geojson"))]
    by_name, left, alone = FilesByName(files, maps), dict.fromkeys(files), []
    found = []
    for image in images_below(images):
        name = image.relative_to(images).as_posix()
        matches = next((some for one in (name, *stems_of(name)) if (some := by_name.matches(one))), [])
        if len(matches) > 1:
            raise LabelError(f"the image {image} may have the {kind}s {listed(matches)}; keep one of them")
        if not matches:
            alone.append(image)
            continue
        left.pop(matches[0], None)
        found.append(PairedImage(image, matches[0].absolute()))
    if not found:
        raise LabelError(
            f"no image in {images} has a {kind} in {maps}: that of a.tif is a.png, a.tif, a.geojson or the like; there are "
            f"the images {listed(alone) or 'none'}, and the {kind}s {listed(files) or 'none'}"
        )
    if left:
        raise LabelError(f"{len(left)} {kind}(s) in {maps} have no image in {images}: {listed(left)}")
    if alone:
        _log.warning("%d image(s) in %s have no %s and are left out: %s", len(alone), images, kind, listed(alone))
    return found


def open_target(path: Path, image: ImageFile) -> ImageFile:
    """Open the map of numbers of an image, of its size and of any number of channels; no pixels are read yet.

    Raises:
        ImageReadError: It cannot be read.
        LabelError: It has another size than the image.
    """
    target = open_image(path, alpha="keep")
    if target.shape[1:] != image.shape[1:]:
        raise LabelError(
            f"the target map {path} has {target.shape[1]} x {target.shape[2]} pixels, and its image {image.path}, level "
            f"{image.level}, {image.shape[1]} x {image.shape[2]}; give one of the same size"
        )
    return target


@DATASETS.register_module()
class PairedImages(ImagesWithMaps):
    """Images of a folder with a map of numbers each, in another folder, of which some are drawn for validation.

    Heights, densities, clean images of noisy ones: the target of `a/b.tif` is the image `a/b` of any ending below the folder of
    targets, of the same size, with any number of channels and values of any type, which are taken as they are stored. Images
    without a target are left out, which the log says. Headers are read at once, pixels as they are needed.

    Args:
        images: Folder of the images.
        targets: Folder of the target maps.
        crop: Train on crops of so many pixels a side, one for each image and epoch, drawn anew in each. Validation is of whole
            images. None trains on whole images.
        augment: "flips" turns and mirrors crops and targets, each of the eight ways as likely.
        level, spacing, channels, batch_size, val_fraction, seed, alpha, foreground: See `LabelledImages`.

    Attributes:
        target: The task, and mean and standard deviation of each channel, of 64 regions of the training targets.

    Raises:
        OSError: A file or folder is missing or cannot be read.
        LabelError: No image has a target, a target has no image or several, sizes or channels differ, or values are missing.
        WrongArgumentError: `augment` without `crop`.
    """

    column = "target"

    @checked
    def __init__(
        self,
        images: Path,
        targets: Path,
        crop: Annotated[int, Range(1)] | None = None,
        augment: Literal["flips"] | None = None,
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
        self.crop = crop
        augmentation = None if augment is None else JointAugmentation(augment)
        found = matched(Path(images), Path(targets), "--targets", "target map")
        ForegroundChoice(foreground).check_count(len(found))
        train, val = stratified_split([0] * len(found), val_fraction, seed)
        self.train_set, self.val_set, self.test_set = (
            PairedDataset([found[k] for k in chosen], self.options, foreground, side, seed, augmentation)
            for chosen, side in ((train, crop), (val, None), ([], None))
        )
        self.image_channels, self.image_type = self._check_images()
        pairs: list[Any] = [pair for dataset in (self.train_set, self.val_set) for pair in dataset]
        self.class_names = _channels_of([target for _, target in pairs])
        mean, std = _scale([target for _, target in pairs[: len(self.train_set)]], seed)
        self.target = {"task": "map", "mean": mean, "std": std}
        _log.info("%d train, %d val images; %s", len(train), len(val), self.described)

    @property
    def described(self) -> str:
        """Words for what is predicted."""
        return f"numbers {', '.join(self.class_names)} of each pixel"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["class_names"] != self.class_names:
            raise LabelError(
                f"the checkpoint was trained on targets of the channels {', '.join(state_dict['class_names'])}, and here are "
                f"{', '.join(self.class_names)}; give targets as those of the run"
            )


def refuse_augmented_images(augment: Any, crop: int | None) -> None:
    """Raise WrongArgumentError if whole images are to be changed."""
    if augment is not None and crop is None:
        raise WrongArgumentError(
            "augment changes crops, and whole images are trained on; give crop too, or leave it out"
        )


def _channels_of(targets: Sequence[ImageFile]) -> list[str]:
    """Return names of the channels that all target maps have. Raises LabelError if some have more than others."""
    first = targets[0]
    for target in targets:
        if target.shape[0] != first.shape[0]:
            raise LabelError(
                f"the target map {first.path} has {first.shape[0]} channel(s) and {target.path} has {target.shape[0]}; give as "
                "many in each"
            )
    return list(first.channel_names or map(str, range(first.shape[0])))


def _scale(targets: Sequence[ImageFile], seed: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, 1 for one that is constant.

    Raises:
        LabelError: A value is missing.
    """
    random, found = np.random.default_rng(seed), []
    for k in range(_SAMPLES):
        target = targets[k * len(targets) // _SAMPLES]
        height, width = (min(_SAMPLE, n) for n in target.shape[1:])
        y, x = (int(random.integers(n - side + 1)) for n, side in zip(target.shape[1:], (height, width), strict=True))
        values = target.read(y, x, height, width)
        if not has_data(values, target.nodata).all():
            raise LabelError(
                f"the target map {target.path} has pixels without a number (NaN, infinite, or its value for missing data) near row "
                f"{y}, column {x}; fill them in, or leave the image out"
            )
        found.append(values.reshape(len(values), -1).astype(np.float64))
    values = np.concatenate(found, axis=1)
    std = values.std(1)
    return values.mean(1).tolist(), np.where(std > 0, std, 1.0).tolist()
