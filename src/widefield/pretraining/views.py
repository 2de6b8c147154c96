"""The views of an image: crops, resized and changed at random."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from widefield.pretraining.changes import Changes, change, draw
from widefield.pretraining.transform_args import ChannelDrop, TransformArgs, pair


@dataclass(frozen=True)
class View:
    """One view and how it is drawn; `args.local_view` and `args.global_view_1` count for nothing here."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    args: TransformArgs

    def cut(self, image: Tensor, random: Random) -> Tensor:
        """The view before all that needs floats: the crop comes first, so that all else sees the small picture."""
        args = self.args
        y, x, height, width = self._box(image.shape[-2], image.shape[-1], random)
        part = image[:, y : y + height, x : x + width]
        if args.channel_drop is not None:
            part = part[_kept(args.channel_drop, random)]
        if part.dtype != torch.uint8 or args.value_range is not None:
            part = to_unit(part, args.value_range)
        view = F.resize(part, list(self.size), antialias=True)
        if args.random_flip is not None:
            if random.random() < args.random_flip.horizontal_prob:
                view = view.flip(-1)
            if random.random() < args.random_flip.vertical_prob:
                view = view.flip(-2)
        return view

    def _box(self, height: int, width: int, random: Random) -> tuple[int, int, int, int]:
        """(y, x, height, width) of the crop, drawn as `torchvision.transforms.RandomResizedCrop` does."""
        resize = self.args.random_resize
        if resize is None:
            return 0, 0, height, width
        low, high = math.log(resize.min_ratio), math.log(resize.max_ratio)
        for _ in range(10):
            area = height * width * random.uniform(resize.min_scale, resize.max_scale)
            ratio = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                # shares, so that an image that is decoded smaller gives the same crops
                y, x = random.random(), random.random()
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
        ratio = min(max(width / height, resize.min_ratio), resize.max_ratio)
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


def _kept(drop: ChannelDrop, random: Random) -> list[int]:
    """Return the numbers of the channels that are kept."""
    weights = list(drop.weight_drop)
    kept = list(range(len(weights)))
    while len(kept) > drop.num_channels_keep:
        (channel,) = random.choices(kept, [weights[k] for k in kept])
        kept.remove(channel)
    return kept


def to_unit(image: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """`image` as float32 with `value_range` (None: 0 and the largest value of an integer type, 0 and 1 of floats) at 0 and 1."""
    pixels = image.to(torch.float32)
    if value_range is not None:
        low, high = value_range
        return ((pixels - low) / (high - low)).clamp_(0, 1)
    return pixels if image.is_floating_point() else pixels / torch.iinfo(image.dtype).max


@dataclass(frozen=True)
class Views:
    """All views of an image: `args.num_views` global ones, then the local ones."""

    args: TransformArgs

    @cached_property
    def each(self) -> tuple[View, ...]:
        """The views, in order."""
        args = self.args
        first = View(pair(args.image_size), args)
        views = [first] * args.num_views
        if args.global_view_1 is not None and args.num_views > 1:
            second = args.global_view_1
            changed = replace(args, gaussian_blur=second.gaussian_blur, solarize=second.solarize)
            views[1] = View(first.size, changed)
        if args.local_view is not None:
            local = args.local_view
            changed = replace(args, random_resize=local.random_resize, gaussian_blur=local.gaussian_blur)
            views += [View(pair(local.view_size), changed)] * local.num_views
        return tuple(views)

    def reduction(self, height: int, width: int) -> float:
        """Return how many times smaller an image may be so that no crop is smaller than its view; at least 1."""
        factors = []
        for view in self.each:
            resize = view.args.random_resize
            least_height, least_width = float(height), float(width)
            if resize is not None:
                least_height = math.sqrt(resize.min_scale * height * width / resize.max_ratio)
                least_width = math.sqrt(resize.min_scale * height * width * resize.min_ratio)
            factors.append(min(least_height / view.size[0], least_width / view.size[1]))
        return max(1.0, min(factors))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every view."""
        return tuple(view.size for view in self.each)

    def __call__(self, image: Tensor, random: Random) -> list[Tensor]:
        """Return the views of an image (C, H, W), each (C, height, width): uint8 of uint8, else float32 from 0 to 1.

        All random numbers come from `random`.
        """
        cuts, changes = self.unchanged(image, random)
        return [change(cut[None], [one])[0] for cut, one in zip(cuts, changes, strict=True)]

    def unchanged(self, image: Tensor, random: Random) -> tuple[list[Tensor], list[Changes]]:
        """The same views, and what is still to be done to each: `changes.change` makes of both what calling gives."""
        pairs = [(view.cut(image, random), draw(view.args, random)) for view in self.each]
        return [cut for cut, _ in pairs], [changes for _, changes in pairs]


def whole_image(args: TransformArgs, size: int | tuple[int, int]) -> Views:
    """One view: all of the image, resized to `size`, a number or (height, width), with the channels and values of `args`."""
    return Views(
        TransformArgs(
            image_size=size,
            num_channels=args.channels,
            value_range=args.value_range,
            channel_drop=args.channel_drop,
            random_resize=None,
            random_flip=None,
            color_jitter=None,
            random_gray_scale=None,
            gaussian_blur=None,
            num_views=1,
        )
    )
