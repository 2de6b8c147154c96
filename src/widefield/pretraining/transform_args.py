"""The settings `transform_args`, by which the views of an image are drawn. Every method has defaults of its own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from widefield.pretraining.settings import Checked, Count, NotNegative, Share
from widefield.registry import Range

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Size = Count | tuple[Count, Count]
"""Pixels of a square, or (height, width)."""


@dataclass(frozen=True)
class RandomResize(Checked):
    """A random part of the image, resized: its share of the area, and its width / height."""

    min_scale: float = 0.08
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale={self.min_scale:g} and max_scale={self.max_scale:g} must satisfy 0 < min <= max <= 1"
            )
        if not 0 < self.min_ratio <= self.max_ratio:
            raise ValueError(
                f"min_ratio={self.min_ratio:g} and max_ratio={self.max_ratio:g} must satisfy 0 < min <= max"
            )


@dataclass(frozen=True)
class RandomFlip(Checked):
    """Mirrors the view."""

    horizontal_prob: Share = 0.5
    vertical_prob: Share = 0.0


@dataclass(frozen=True)
class RandomRotation(Checked):
    """Turns the view by an angle drawn from -degrees to degrees, or between two; what comes in from outside is black."""

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {"interpolation": (3, "pixels are interpolated linearly")}
    prob: Share = 0.5
    degrees: Annotated[float, Range(0, 180)] | tuple[float, float] = 90


@dataclass(frozen=True)
class ColorJitter(Checked):
    """Changes brightness, contrast, saturation and hue, in random order, by up to `strength` times these values."""

    prob: Share = 0.8
    strength: NotNegative = 1.0
    brightness: NotNegative = 0.8
    contrast: NotNegative = 0.8
    saturation: NotNegative = 0.8
    hue: NotNegative = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength * self.hue > 0.5:
            raise ValueError(
                f"strength * hue = {self.strength * self.hue:g} must be at most 0.5, half of the colour circle"
            )


@dataclass(frozen=True)
class GaussianBlur(Checked):
    """Blurs the view with a standard deviation drawn between the two `sigmas`, in pixels."""

    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "blur_limit": (0, "how far a blur reaches follows from `sigmas`, three of them; give those")
    }
    prob: Share = 0.5
    sigmas: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sigmas[0] <= self.sigmas[1]:
            raise ValueError(f"sigmas={self.sigmas} must satisfy 0 <= low <= high")


@dataclass(frozen=True)
class Solarize(Checked):
    """Inverts values from `threshold` on, which is a share of full intensity."""

    prob: Share = 0.2
    threshold: float = 0.5


@dataclass(frozen=True)
class ChannelDrop(Checked):
    """Removes channels, drawn by weight, so that `num_channels_keep` are left, in their order; 0 is never drawn."""

    num_channels_keep: Count
    weight_drop: tuple[NotNegative, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_channels_keep > len(self.weight_drop):
            raise ValueError(
                f"num_channels_keep={self.num_channels_keep} must be at most {len(self.weight_drop)}, the number of weight_drop"
            )
        droppable, drops = sum(w > 0 for w in self.weight_drop), len(self.weight_drop) - self.num_channels_keep
        if drops > droppable:
            raise ValueError(f"{drops} channels are to be dropped, but only {droppable} have a weight_drop above 0")


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / std per channel, for values from 0 to 1. Fewer values than channels are repeated."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean has {len(self.mean)} and std {len(self.std)} values; give one per channel each")
        if not all(math.isfinite(m) for m in self.mean) or not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"mean={self.mean} must be finite and std={self.std} positive")


@dataclass(frozen=True)
class SecondView:
    """The settings in which the second of the global views differs from the first."""

    gaussian_blur: GaussianBlur | None
    solarize: Solarize | None


@dataclass(frozen=True)
class LocalViews(Checked):
    """Small views of small parts; in all else they are like the first view."""

    num_views: Count = 6
    view_size: Size = 96
    random_resize: RandomResize = field(default_factory=lambda: RandomResize(0.05, 0.14))
    gaussian_blur: GaussianBlur | None = field(default_factory=GaussianBlur)


@dataclass(frozen=True)
class TransformArgs(Checked):
    """Settings by which the views of an image are drawn.

    Attributes:
        image_size: Pixels of a global view, a number or (height, width).
        num_channels: Of what the model sees, which are those of the images unless `channel_drop` removes some; "auto": as many
            as that leaves, or as `normalize` has. Other than 3 turns off what is for colours: jitter, grey scale, solarisation.
        value_range: (low, high), which values become 0 and 1. None: 0 and the largest value of an integer type; 0 and 1 of floats.
        num_views: Global views.
        global_view_1: How the second of them differs.
        local_view: Views beside the global ones.
    """

    also_called: ClassVar[Mapping[str, str]] = {"random_grayscale": "random_gray_scale"}
    fixed: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "record_geometry": (False, "no method here needs where views were cut; leave it out")
    }
    image_size: Size = 224
    num_channels: Count | Literal["auto"] = "auto"
    value_range: tuple[float, float] | None = None
    channel_drop: ChannelDrop | None = None
    random_resize: RandomResize | None = field(default_factory=RandomResize)
    random_flip: RandomFlip | None = field(default_factory=RandomFlip)
    random_rotation: RandomRotation | None = None
    color_jitter: ColorJitter | None = field(default_factory=ColorJitter)
    random_gray_scale: Share | None = 0.2
    gaussian_blur: GaussianBlur | None = field(default_factory=GaussianBlur)
    solarize: Solarize | None = None
    normalize: Normalize = field(default_factory=Normalize)
    num_views: Count = 2
    global_view_1: SecondView | None = None
    local_view: LocalViews | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        values = len(self.normalize.mean)
        if values > self.channels and self.normalize != Normalize():
            raise ValueError(f"normalize has a mean and std of {values} channels and num_channels is {self.channels}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range={self.value_range} must be (low, high) with low < high")
        if self.channel_drop is not None and self.channel_drop.num_channels_keep != self.channels:
            raise ValueError(
                f"channel_drop keeps {self.channel_drop.num_channels_keep} channels and num_channels, which are those that the "
                f"model sees, is {self.channels}; leave num_channels out"
            )

    @property
    def channels(self) -> int:
        """Channels that the model sees."""
        if self.num_channels != "auto":
            return self.num_channels
        return len(self.normalize.mean) if self.channel_drop is None else self.channel_drop.num_channels_keep

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.channels if self.channel_drop is None else len(self.channel_drop.weight_drop)

    def for_channels(self) -> "TransformArgs":
        """Return these settings without what `num_channels` turns off, and with a mean and std for every channel."""
        given = self.normalize.mean, self.normalize.std
        mean, std = (tuple(values[k % len(values)] for k in range(self.channels)) for values in given)
        args = replace(self, num_channels=self.channels, normalize=Normalize(mean, std))
        if self.channels == 3:
            return args
        second = self.global_view_1 and replace(self.global_view_1, solarize=None)
        return replace(args, color_jitter=None, random_gray_scale=None, solarize=None, global_view_1=second)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of a `Size`."""
    return (size, size) if isinstance(size, int) else size
