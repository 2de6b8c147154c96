"""The background that models leave out of an image: whether there is some, found by which method, and what stands there."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from widefield.errors import WrongArgumentError
from widefield.images.foreground import MASK_SIZE, METHODS, Mask, foreground, is_geojson, mask_of
from widefield.images.image import ImageFile
from widefield.images.thumbnail import coarse_means

SLIDE_SIDE = 4096
"""Pixels on the long side of the largest level from which on an image may be a slide. Smaller ones are computed in seconds, and a
cell of their mask would be a few pixels: there is nothing to save, and something to lose."""
_MOSTLY_BLANK = 0.5
"""A slide with a smaller share of foreground is mostly blank."""


@dataclass(frozen=True)
class Background:
    """The part of an image that is left out.

    Attributes:
        mask: False in the background, True in the foreground, of which there is some.
        fill: A number for each channel, as the image stores it, that a pixel of the background counts as.
        required: True if it was asked for by name: where a network takes no mask that is an error.
    """

    mask: Mask
    fill: tuple[float, ...]
    required: bool


@dataclass(frozen=True)
class ForegroundChoice:
    """The way in which the foreground of images is found, one rule for training, validation and prediction.

    Attributes:
        method: One of

            - "auto": as "otsu", for slides that a thumbnail shows to be mostly blank, with less than half of it foreground, but
              some. A slide has several levels or a known spacing, is no map, and has 4096 pixels or more on the long side of its
              largest level, whatever level is read. Other images have no background;
            - "none": no image has a background;
            - "otsu" or "hsv": that method of `foreground`, for every image;
            - the path of a GeoJSON file of one image, or of a folder with a file `NAME.geojson` for each image `NAME.svs` or
              `NAME.ome.tif`, as QuPath exports them; `NAME.svs.geojson` does as well, and comes first. They hold polygons in
              pixels of level 0.

    Raises:
        ValueError: There is no such method.

    Examples:
        >>> slide = wf.open_image("slides/tumor_001.tif")
        >>> slide.background = ForegroundChoice("otsu").of(slide)
        >>> slide.background.required
        True
    """

    method: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in ("auto", "none", *METHODS) and not (
            is_geojson(self.method) or Path(self.method).is_dir()
        ):
            raise WrongArgumentError(
                f"foreground={self.method!r} is neither one of auto, none, {', '.join(METHODS)}, nor a GeoJSON file or a folder "
                "of such files"
            )

    @property
    def is_explicit(self) -> bool:
        """True if every image is to have a mask."""
        return self.method not in ("auto", "none")

    def check_count(self, images: int) -> None:
        """Raise ValueError if one GeoJSON file is given for several images."""
        if images > 1 and is_geojson(self.method) and not Path(self.method).is_dir():
            raise WrongArgumentError(
                f"foreground={self.method!r} is the foreground of one image, and there are {images}; give a folder with a file "
                "NAME.geojson for each"
            )

    def of(self, image: ImageFile) -> Background | None:
        """Return the background of an image; None if nothing is to be left out.

        Pixels of the background count as the median of the thumbnail there, per channel, in the image's own type: of white glass
        its white, of a dark field its darkness. Where none has data, it is the `fill` of `open_image`, or 0.

        Raises:
            FileNotFoundError: There is no GeoJSON file for it.
            ImageReadError: The image or the GeoJSON file cannot be read.
            ValueError: An explicit method finds no foreground.
        """
        if self.method == "none" or (self.method == "auto" and not _may_be_slide(image)):
            return None
        means = coarse_means(image, MASK_SIZE)
        if self.method == "auto" or self.method in METHODS:
            mask = mask_of(means, image.dtype, "otsu" if self.method == "auto" else self.method)
        else:
            mask = foreground(image, self._file_of(image))
        if self.method == "auto" and not 0 < mask.share < _MOSTLY_BLANK:
            return None
        if not mask.cells.any():
            raise WrongArgumentError(
                f"{image.path} has no foreground by {self.method}; leave it out, or give another foreground (none takes all of it)"
            )
        return Background(mask, _fill(image, means[:, ~mask.cells]), self.is_explicit)

    def _file_of(self, image: ImageFile) -> Path:
        given, path = Path(self.method), Path(image.path)
        if not given.is_dir():
            return given
        stems = dict.fromkeys((path.name, path.stem, path.stem.removesuffix(".ome")))
        names = [f"{stem}.geojson" for stem in stems]
        found = next((given / name for name in names if (given / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"there is no foreground of {path} in {given}: neither {' nor '.join(names)}; export its annotations there"
            )
        return found


def _may_be_slide(image: ImageFile) -> bool:
    is_map = image.crs is not None or image.transform is not None
    has_scale = len(image.levels) > 1 or image.spacing is not None
    return has_scale and not is_map and max(image.levels[0]) >= SLIDE_SIDE


def _fill(image: ImageFile, pixels: np.ndarray) -> tuple[float, ...]:
    """Return the medians of `pixels` (channels, n) in the type of the image."""
    pixels = pixels[:, np.isfinite(pixels).all(0)]
    if not pixels.size:
        return (image.fill or 0.0,) * image.shape[0]
    medians = np.median(pixels, axis=1).tolist()
    return tuple(medians) if image.dtype.kind == "f" else tuple(math.floor(value + 0.5) for value in medians)
