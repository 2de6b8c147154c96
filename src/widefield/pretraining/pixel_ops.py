"""Operations on small pictures where those of torchvision are slow: the same functions, several times faster on a CPU."""

import math

import torch
from torch import Tensor


def shift_hue(image: Tensor, shift: float) -> Tensor:
    """Turn the hue of an image (3, H, W) of floats from 0 to 1 by `shift` of the colour circle; value and saturation stay.

    With hue h in sixths of the circle, value v = max and chroma c = max - min, a channel is
    v - c * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = image.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = chroma.clamp(min=1e-12).reciprocal_()  # grey has chroma 0, and then any hue will do
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4))
    hue = torch.where(value == red, (green - blue).mul_(scale), hue)
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=image.dtype).add_(6 * shift).view(3, 1, 1)
    k = (hue + offsets).remainder_(6)
    ramp = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value, chroma, ramp, value=-1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of floats (C, H, W) with standard deviation `sigma` in pixels, cut at three of them; borders reflect."""
    height, width = image.shape[-2:]
    radius = min(math.ceil(3 * sigma), height - 1, width - 1)
    if radius < 1:
        return image
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    padded = torch.nn.functional.pad(image, (radius, radius, radius, radius), mode="reflect")
    for dim, size in ((1, height), (2, width)):
        out = padded.narrow(dim, radius, size) * (weights[0] / total)
        for k in range(1, radius + 1):
            for start in (radius - k, radius + k):
                out.add_(padded.narrow(dim, start, size), alpha=weights[k] / total)
        padded = out
    return padded
