"""Operations on small pictures where those of torchvision are slow: the same functions, several times faster on a CPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
