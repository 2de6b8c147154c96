"""What `transform_args` may say: how the views of an image are drawn. Every method has defaults of its own."""

import math
from dataclasses import dataclass, field, replace

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value:g} is no probability; expected 0 to 1")


@dataclass(frozen=True)
class RandomResize:
    """A random part of the image, resized: its share of the area, and its width / height."""

    min_scale: float = 0.08
    max_scale: float = 1.0
    min_ratio: float = 3 / 4
    max_ratio: float = 4 / 3

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale <= 1:
            raise ValueError(
                f"min_scale={self.min_scale:g} and max_scale={self.max_scale:g} must satisfy 0 < min <= max <= 1"
            )
        if not 0 < self.min_ratio <= self.max_ratio:
            raise ValueError(
                f"min_ratio={self.min_ratio:g} and max_ratio={self.max_ratio:g} must satisfy 0 < min <= max"
            )


@dataclass(frozen=True)
class RandomFlip:
    """Mirrors the view."""

    horizontal_prob: float = 0.5
    vertical_prob: float = 0.0

    def __post_init__(self) -> None:
        _probability("horizontal_prob", self.horizontal_prob)
        _probability("vertical_prob", self.vertical_prob)


@dataclass(frozen=True)
class RandomRotation:
    """Turns the view by an angle drawn from -degrees to degrees; what comes in from outside is black."""

    prob: float = 0.5
    degrees: float = 90

    def __post_init__(self) -> None:
        _probability("prob", self.prob)
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees={self.degrees:g} must be 0 to 180")


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in random order, by up to `strength` times these values."""

    prob: float = 0.8
    strength: float = 1.0
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2

    def __post_init__(self) -> None:
        _probability("prob", self.prob)
        for name in ("strength", "brightness", "contrast", "saturation", "hue"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name):g} must be at least 0")
        if self.strength * self.hue > 0.5:
            raise ValueError(
                f"strength * hue = {self.strength * self.hue:g} must be at most 0.5, half of the colour circle"
            )


@dataclass(frozen=True)
class GaussianBlur:
    """Blurs the view with a standard deviation drawn between the two `sigmas`, in pixels."""

    prob: float = 0.5
    sigmas: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        _probability("prob", self.prob)
        if not 0 <= self.sigmas[0] <= self.sigmas[1]:
            raise ValueError(f"sigmas={self.sigmas} must satisfy 0 <= low <= high")


@dataclass(frozen=True)
class Solarize:
    """Inverts values from `threshold` on, which is a share of full intensity."""

    prob: float = 0.2
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _probability("prob", self.prob)


@dataclass(frozen=True)
class ChannelDrop:
    """Keeps `num_channels_keep` channels, drawn by weight, and sets the others to 0."""

    num_channels_keep: int
    weight_drop: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.num_channels_keep <= len(self.weight_drop):
            raise ValueError(
                f"num_channels_keep={self.num_channels_keep} must be 1 to {len(self.weight_drop)}, the number of weight_drop"
            )
        if any(not (weight >= 0 and math.isfinite(weight)) for weight in self.weight_drop):
            raise ValueError(f"weight_drop={self.weight_drop} must be numbers of at least 0")
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

    def repeated(self, channels: int) -> "Normalize":
        """For so many channels: the values again from the first where there are too few."""
        mean, std = (tuple(v[k % len(v)] for k in range(channels)) for v in (self.mean, self.std))
        return Normalize(mean, std)


@dataclass(frozen=True)
class SecondView:
    """How the second of the global views differs from the first."""

    gaussian_blur: GaussianBlur | None
    solarize: Solarize | None


@dataclass(frozen=True)
class LocalViews:
    """Small views of small parts; in all else they are like the first view."""

    num_views: int = 6
    view_size: int | tuple[int, int] = 96
    random_resize: RandomResize = field(default_factory=lambda: RandomResize(0.05, 0.14))
    gaussian_blur: GaussianBlur | None = field(default_factory=GaussianBlur)

    def __post_init__(self) -> None:
        if self.num_views < 1:
            raise ValueError(f"num_views={self.num_views} must be at least 1; local_view=None turns local views off")
        size_of(self.view_size, "view_size")


@dataclass(frozen=True)
class TransformArgs:
    """How the views of an image are drawn.

    Attributes:
        image_size: Pixels of a global view, a number or (height, width).
        num_channels: Of the images. Other than 3 turns off what is defined for colours: jitter, grey scale, solarisation.
        value_range: (low, high), which values become 0 and 1. None: 0 and the largest value of an integer type; 0 and 1 of floats.
        num_views: Global views.
        global_view_1: How the second of them differs.
        local_view: Views beside the global ones.
    """

    image_size: int | tuple[int, int] = 224
    num_channels: int = 3
    value_range: tuple[float, float] | None = None
    channel_drop: ChannelDrop | None = None
    random_resize: RandomResize | None = field(default_factory=RandomResize)
    random_flip: RandomFlip | None = field(default_factory=RandomFlip)
    random_rotation: RandomRotation | None = None
    color_jitter: ColorJitter | None = field(default_factory=ColorJitter)
    random_gray_scale: float | None = 0.2
    gaussian_blur: GaussianBlur | None = field(default_factory=GaussianBlur)
    solarize: Solarize | None = None
    normalize: Normalize = field(default_factory=Normalize)
    num_views: int = 2
    global_view_1: SecondView | None = None
    local_view: LocalViews | None = None

    def __post_init__(self) -> None:
        size_of(self.image_size, "image_size")
        if self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels} must be at least 1")
        if self.num_views < 1:
            raise ValueError(f"num_views={self.num_views} must be at least 1")
        values = len(self.normalize.mean)
        if values > self.num_channels and self.normalize != Normalize():
            raise ValueError(
                f"normalize has a mean and std of {values} channels and num_channels is {self.num_channels}"
            )
        if self.random_gray_scale is not None:
            _probability("random_gray_scale", self.random_gray_scale)
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range={self.value_range} must be (low, high) with low < high")
        if self.channel_drop is not None and len(self.channel_drop.weight_drop) != self.num_channels:
            raise ValueError(
                f"channel_drop.weight_drop has {len(self.channel_drop.weight_drop)} values and num_channels is {self.num_channels}"
            )

    def for_channels(self) -> "TransformArgs":
        """Without what `num_channels` turns off, and with a mean and std for every channel."""
        args = replace(self, normalize=self.normalize.repeated(self.num_channels))
        if self.num_channels == 3:
            return args
        second = self.global_view_1 and replace(self.global_view_1, solarize=None)
        return replace(args, color_jitter=None, random_gray_scale=None, solarize=None, global_view_1=second)


def size_of(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """(height, width) of a number or a pair; ValueError for less than a pixel."""
    pair = (size, size) if isinstance(size, int) else size
    if min(pair) < 1:
        raise ValueError(f"{name}={size} must be at least 1 pixel")
    return pair
