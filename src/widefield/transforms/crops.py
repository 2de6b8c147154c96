"""Cutting out and padding. Images and masks are cut alike; new pixels of masks are 0."""

from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Annotated

import pyvips

from widefield.transforms.base import Change, Transform, both
from widefield.transforms.values import BORDERS, Choice, Fill, Pixels, background, full_scale

DIRECTIONS = ("centre", "north", "east", "south", "west", "north-east", "south-east", "south-west", "north-west")


@dataclass(frozen=True)
class Crop(Transform, p=1.0):
    """Cuts out a fixed region.

    Args:
        x_min, y_min: First column and row, in pixels.
        x_max, y_max: Behind the last column and row, in pixels.

    Raises:
        ValueError: An empty region or an argument out of range. When called: the region reaches outside of the image.
    """

    x_min: int = 0
    y_min: int = 0
    x_max: int = 1024
    y_max: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.x_min < self.x_max and 0 <= self.y_min < self.y_max):
            raise ValueError(
                f"{self} is an empty region; expected 0 <= x_min < x_max and 0 <= y_min < y_max, in pixels"
            )

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        height, width = self.y_max - self.y_min, self.x_max - self.x_min
        if self.x_max > image.width or self.y_max > image.height:
            raise _outside(f"the region {self}", image)
        return _cut(self.y_min, self.x_min, height, width)


@dataclass(frozen=True)
class CenterCrop(Transform, p=1.0):
    """Cuts out the middle.

    Args:
        height, width: Size of the result, in pixels.

    Raises:
        ValueError: An argument out of range. When called: the image is smaller.
    """

    height: Annotated[int, Pixels()]
    width: Annotated[int, Pixels()]

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        rows, columns = _room(self, image)
        return _cut(rows // 2, columns // 2, self.height, self.width)


@dataclass(frozen=True)
class RandomCrop(CenterCrop):
    """Cuts out a region whose position is drawn evenly; arguments and errors are those of `CenterCrop`."""

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        rows, columns = _room(self, image)
        return _cut(random.randint(0, rows), random.randint(0, columns), self.height, self.width)


@dataclass(frozen=True)
class CropOrPad(Transform, p=1.0):
    """Cuts or pads each axis to a size. New pixels of images are white: full scale, which is 1 for floats.

    Args:
        height, width: Size of the result, in pixels.
        direction: Where the image stays: "centre", or a direction of the compass such as "north-west", the top left.

    Raises:
        ValueError: An argument out of range.
    """

    height: Annotated[int, Pixels()]
    width: Annotated[int, Pixels()]
    direction: Annotated[str, Choice(DIRECTIONS)] = "centre"

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        def fit(image: pyvips.Image, border: str, **colour: list[float]) -> pyvips.Image:
            return image.gravity(self.direction, self.width, self.height, extend=border, **colour)

        def fit_image(image: pyvips.Image) -> pyvips.Image:
            white = full_scale(image)
            # a background colour starts threads, which do not survive a fork, and "white" is 255 for floats and 16 bits
            return fit(image, "white") if image.format == "uchar" else fit(image, "background", background=[white])

        return Change(fit_image, lambda mask: fit(mask, "black"))


class Position(Enum):
    """Place of an image in a padded one."""

    CENTER = "centre"
    TOP_LEFT = "north-west"
    TOP_RIGHT = "north-east"
    BOTTOM_LEFT = "south-west"
    BOTTOM_RIGHT = "south-east"


@dataclass(frozen=True)
class PadIfNeeded(Transform, p=1.0):
    """Pads each axis to a least size, or to a multiple.

    Args:
        min_height, min_width: Least size of the result, in pixels.
        pad_height_divisor, pad_width_divisor: Numbers that shall divide the size, in place of a least size, which is then None.
        position: Where the image stays.
        border_mode: What new pixels are: "background" for `value`, or "black", "white", "copy" (of the border), "repeat" (of the
            image), "mirror".
        value: Of new pixels, in the image's own units, for all channels or one each; None for 0.
        mask_value: The same for masks.

    Raises:
        ValueError: An argument out of range, or both or none of size and divisor. When called: as many values as fit no image.
    """

    PositionType = Position

    min_height: int | None = 1024
    min_width: int | None = 1024
    pad_height_divisor: int | None = None
    pad_width_divisor: int | None = None
    position: Position | str = Position.CENTER
    border_mode: Annotated[str, Choice(BORDERS)] = "background"
    value: Fill | None = None
    mask_value: Fill | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in ("height", "width"):
            least, divisor = f"min_{axis}", f"pad_{axis}_divisor"
            given = {name: getattr(self, name) for name in (least, divisor) if getattr(self, name) is not None}
            if len(given) != 1:
                raise ValueError(
                    f"{self} has {given or 'neither'}; give one of {least} and {divisor}, and None for the other"
                )
            ((name, size),) = given.items()
            Pixels().checked(name, size)
        names = Choice(tuple(place.value for place in Position))
        names.checked("position", getattr(self.position, "value", self.position))

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        height = _padded(image.height, self.min_height, self.pad_height_divisor)
        width = _padded(image.width, self.min_width, self.pad_width_divisor)
        direction = Position(self.position).value

        def pad(image: pyvips.Image, fill: Fill | None) -> pyvips.Image:
            colour = background(fill, image, default=0)
            return image.gravity(direction, width, height, extend=self.border_mode, background=colour)

        return Change(lambda image: pad(image, self.value), lambda mask: pad(mask, self.mask_value))


def _cut(y: int, x: int, height: int, width: int) -> Change:
    return both(lambda image: image.crop(x, y, width, height))


def _room(crop: CenterCrop, image: pyvips.Image) -> tuple[int, int]:
    """Return how many rows and columns the image has more than the crop. Raises ValueError if it has fewer."""
    room = image.height - crop.height, image.width - crop.width
    if min(room) < 0:
        raise _outside(f"{type(crop).__name__} of height {crop.height} and width {crop.width}", image)
    return room


def _outside(what: str, image: pyvips.Image) -> ValueError:
    return ValueError(
        f"{what} reaches outside of the image, which has height {image.height} and width {image.width}; "
        "crop less, or pad first with PadIfNeeded; CropOrPad does both"
    )


def _padded(size: int, least: int | None, divisor: int | None) -> int:
    return max(size, least) if least is not None else -(-size // (divisor or 1)) * (divisor or 1)
