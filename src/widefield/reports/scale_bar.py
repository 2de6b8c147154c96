"""A scale bar of a round length."""

import math
from dataclasses import dataclass

_STEPS = (1, 2, 5)


@dataclass(frozen=True)
class ScaleBar:
    """A bar of `pixels` image pixels, labelled `text`."""

    pixels: float
    text: str


def scale_bar(width: int, spacing: float | None) -> ScaleBar:
    """The longest bar of 1, 2 or 5 times a power of ten that is at most a quarter of the image.

    Args:
        width: Of the image, in pixels.
        spacing: Micrometres per pixel, along x; None labels the bar in pixels.
    """
    unit = 1.0 if spacing is None else spacing
    longest = width * unit / 4
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(step * power for step in _STEPS if step * power <= longest)
    return ScaleBar(length / unit, _text(length, in_pixels=spacing is None))


def _text(length: float, in_pixels: bool) -> str:
    if in_pixels:
        return f"{length:g} px"
    if length >= 1000:
        return f"{length / 1000:g} mm"
    return f"{length:g} µm"
