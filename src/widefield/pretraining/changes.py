"""Changes of views that need floats: drawn for one view at a time, made in a batch of them at once, on the batch's device."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from widefield.pretraining.transform_args import ColorJitter, GaussianBlur, RandomRotation, Solarize, TransformArgs

Part = TypeVar("Part", RandomRotation, ColorJitter, GaussianBlur, Solarize)


def shift_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue of images (N, 3, H, W) of floats from 0 to 1 by `shifts` (N, 1, 1, 1), shares of the colour circle.

    Value and saturation stay. With hue h in sixths of the circle, value v = max and chroma c = max - min, a channel is
    v - c * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = chroma.clamp(min=1e-12).reciprocal_()  # grey has chroma 0, and then any hue will do
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4))
    hue = torch.where(value == red, (green - blue).mul_(scale), hue)
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device).view(3, 1, 1) + 6 * shifts
    k = (hue + offsets).remainder_(6)
    ramp = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value, chroma, ramp, value=-1)


def blur(images: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Gaussian blur of floats (N, C, H, W), each with its standard deviation in pixels, cut at three of them; borders reflect."""
    height, width = images.shape[-2:]
    radii = [min(math.ceil(3 * sigma), height - 1, width - 1) for sigma in sigmas]
    radius = max(radii)
    if radius < 1:
        return images
    rows = [
        [math.exp(-0.5 * (k / sigma) ** 2) if k <= own else 0.0 for k in range(1, radius + 1)]
        if own
        else [0.0] * radius
        for sigma, own in zip(sigmas, radii, strict=True)
    ]
    weights = [[w / (1 + 2 * sum(row)) for w in (1.0, *row)] for row in rows]
    columns = torch.tensor(weights, dtype=images.dtype, device=images.device).T.reshape(radius + 1, -1, 1, 1, 1)
    padded = torch.nn.functional.pad(images, (radius, radius, radius, radius), mode="reflect")
    for dim, size in ((2, height), (3, width)):
        out = padded.narrow(dim, radius, size) * columns[0]
        for k in range(1, radius + 1):
            for start in (radius - k, radius + k):
                out.addcmul_(padded.narrow(dim, start, size), columns[k])
        padded = out
    return padded


class Changes(NamedTuple):
    """Changes of a view, in this order; by default none.

    Attributes:
        angle: Turned, by degrees.
        jitter: Names and factors of changes of colour, one after the other.
        grey: Without colour.
        sigma: Blurred, with this standard deviation in pixels.
        solarize: Values from this one on are inverted.
    """

    angle: float | None = None
    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    sigma: float | None = None
    solarize: float | None = None


def draw(args: TransformArgs, random: Random) -> Changes:
    """The changes of one view; `args.local_view` and `args.global_view_1` count for nothing here."""

    def happens(part: Part | None) -> TypeGuard[Part]:
        return part is not None and random.random() < part.prob

    rotation = args.random_rotation
    degrees = 0.0 if rotation is None else rotation.degrees
    return Changes(
        angle=random.uniform(*(degrees if isinstance(degrees, tuple) else (-degrees, degrees)))
        if happens(rotation)
        else None,
        jitter=_jitter(args.color_jitter, random) if happens(args.color_jitter) else (),
        grey=args.random_gray_scale is not None and random.random() < args.random_gray_scale,
        sigma=random.uniform(*args.gaussian_blur.sigmas) if happens(args.gaussian_blur) else None,
        solarize=args.solarize.threshold if happens(args.solarize) else None,
    )


def change(views: Tensor, changes: Sequence[Changes]) -> Tensor:
    """Views (N, C, height, width), uint8 or floats from 0 to 1, each with its changes; those of bytes are rounded to bytes."""
    touched = [k for k, one in enumerate(changes) if one != Changes()]
    if not touched:
        return views
    part, few = views if len(touched) == len(views) else views[touched], [changes[k] for k in touched]
    changed = _changed(part / 255 if part.dtype == torch.uint8 else part.clone(), few)
    if views.dtype == torch.uint8:
        changed = changed.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
    if len(touched) == len(views):
        return changed
    result = views.clone()
    result[touched] = changed
    return result


def _changed(out: Tensor, changes: Sequence[Changes]) -> Tensor:
    """Floats from 0 to 1 that may be written to."""
    for k, one in enumerate(changes):
        if one.angle is not None:
            out[k] = F.rotate(out[k], one.angle, F.InterpolationMode.BILINEAR)
    for place in range(max(len(one.jitter) for one in changes)):
        for name, function in _JITTER.items():
            factors = {
                k: one.jitter[place][1] for k, one in enumerate(changes) if one.jitter and one.jitter[place][0] == name
            }
            out = _on(out, factors, partial(_recoloured, function))
    out = _on(
        out,
        {k: 1.0 for k, one in enumerate(changes) if one.grey},
        lambda x, _: F.rgb_to_grayscale(x).expand_as(x).contiguous(),
    )
    out = _on(out, {k: one.sigma for k, one in enumerate(changes) if one.sigma is not None}, blur)
    thresholds = {k: one.solarize for k, one in enumerate(changes) if one.solarize is not None}
    return _on(out, thresholds, lambda x, values: torch.where(x >= _column(values, x), 1 - x, x))


def _recoloured(function: Callable[[Tensor, Tensor], Tensor], views: Tensor, values: Sequence[float]) -> Tensor:
    return function(views, _column(values, views))


def _on(views: Tensor, values: Mapping[int, float], function: Callable[[Tensor, Sequence[float]], Tensor]) -> Tensor:
    """`views`, those numbered in `values` replaced by `function` of them and their values."""
    if len(values) == len(views):
        return function(views, [*values.values()])
    if values:
        these = [*values]
        views[these] = function(views[these], [*values.values()])
    return views


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """(N, 1, 1, 1)"""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


# The functions of torchvision of these names, with a factor for each view.
_JITTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda x, factor: x.mul_(factor).clamp_(0, 1),
    "contrast": lambda x, factor: torch.lerp(F.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), x, factor).clamp_(
        0, 1
    ),
    "saturation": lambda x, factor: torch.lerp(F.rgb_to_grayscale(x), x, factor).clamp_(0, 1),
    "hue": shift_hue,
}


def _jitter(jitter: ColorJitter, random: Random) -> tuple[tuple[str, float], ...]:
    def factor(value: float) -> float:
        return random.uniform(max(0.0, 1 - jitter.strength * value), 1 + jitter.strength * value)

    hue = jitter.strength * jitter.hue
    changes = [
        ("brightness", factor(jitter.brightness)),
        ("contrast", factor(jitter.contrast)),
        ("saturation", factor(jitter.saturation)),
        ("hue", random.uniform(-hue, hue)),
    ]
    random.shuffle(changes)
    return tuple(changes)
