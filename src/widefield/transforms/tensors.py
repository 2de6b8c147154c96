"""From pixels as they are stored to a tensor for a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import pyvips
import torch
from torch import Tensor

from widefield.transforms.base import Change, Transform
from widefield.transforms.reading import read
from widefield.transforms.values import FLOATS, FULL_SCALE, as_format, full_scale

DTYPES = {"uchar": "uint8", "ushort": "uint16", "float": "float32", "double": "float64"}
"""Names of `ToDtype`, and what they are called elsewhere."""


@dataclass(frozen=True)
class ToDtype(Transform, p=1.0):
    """Converts images to another type of pixels; masks stay.

    Args:
        dtype: "uchar" (uint8), "ushort" (uint16), "float" (float32) or "double" (float64).
        scale: Map full scale to full scale: the maximum of an integer type to 1 of a float type, and back. Otherwise values are
            kept. Integers are rounded and clipped.

    Raises:
        ValueError: An unknown dtype, or an argument out of range.
    """

    dtype: str
    scale: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            known = ", ".join(f'"{name}" ({other})' for name, other in DTYPES.items())
            raise ValueError(f"dtype={self.dtype!r}; expected one of {known}, the names of libvips")

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        def convert(image: pyvips.Image) -> pyvips.Image:
            factor = FULL_SCALE[self.dtype] / full_scale(image) if self.scale else 1.0
            if factor == 1.0:
                return as_format(image, self.dtype)
            image = image.cast("double") if self.dtype == "double" else image
            return as_format(image.linear([factor], [0]), self.dtype)

        return Change(convert)


@dataclass(frozen=True)
class Normalize(Transform, p=1.0):
    """Makes floats `(image - mean) / std` of images, per channel; masks stay. The image is not scaled to 0..1 before.

    A network of this library that was given a `mean` and `std`, as the ImageNet models are, does this itself.

    Args:
        mean, std: One number per channel, or one for all, in the image's own units.

    Raises:
        ValueError: `std` is not positive, or an argument out of range. When called: as many numbers as fit no image.
    """

    mean: Sequence[float] | float
    std: Sequence[float] | float

    def __post_init__(self) -> None:
        super().__post_init__()
        mean, std = self._statistics()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"mean={self.mean!r} and std={self.std!r}; expected one number per channel each, with std above 0"
            )

    def _statistics(self) -> tuple[list[float], list[float]]:
        mean, std = ([v] if isinstance(v, int | float) else [float(x) for x in v] for v in (self.mean, self.std))
        return mean, std

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        mean, std = self._statistics()

        def normalise(image: pyvips.Image) -> pyvips.Image:
            if len(mean) not in (1, image.bands):
                raise ValueError(
                    f"mean and std of Normalize have {len(mean)} numbers and the image {image.bands} channels; "
                    "give one per channel"
                )
            image = image if image.format in FLOATS else image.cast("float")
            return image.linear([1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)])

        return Change(normalise)


@dataclass(frozen=True)
class ToTensor(Transform, always_apply=True, p=1.0):
    """Reads the pixels: the last transform, and the only one that decodes.

    Images become contiguous tensors of shape (channels, height, width), masks of one channel (height, width) and other masks
    (height, width, channels). Values and types stay; uint16 and uint32 become torch's types of these names.

    Args:
        transpose_mask: Give masks of several channels the shape (channels, height, width) instead.

    Raises:
        ValueError: An argument out of range.
        ImageReadError: When called: a file is damaged, or was opened for reading from top to bottom only and is turned.
    """

    transpose_mask: bool = False

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        def mask_tensor(mask: pyvips.Image) -> Tensor:
            tensor = torch.from_numpy(read(mask, channels_first=self.transpose_mask))
            return tensor if mask.bands > 1 else tensor.reshape(mask.height, mask.width)

        return Change(lambda image: torch.from_numpy(read(image, channels_first=True)), mask_tensor)
