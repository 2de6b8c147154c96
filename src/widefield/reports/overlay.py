"""A heatmap laid over a thumbnail, with a scale bar and a colour bar."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke

from widefield.reports.grad_cam import peak

_DPI = 150
_HEIGHT_INCHES = 6.0


def save_overlay(
    path: str | Path,
    thumbnail: np.ndarray,
    evidence: np.ndarray,
    size: tuple[int, int],
    spacing: tuple[float, float] | None,
    title: str,
) -> None:
    """Write a PNG: the thumbnail, the positive evidence over it, a scale bar and a colour bar.

    Where the evidence is at or below zero the thumbnail shows through; the colour bar starts there. A circle shows where
    the evidence is greatest, which is a point in the thumbnail of a large image.

    Args:
        path: Of the PNG file; its folder must exist.
        thumbnail: uint8 (h, w, 3) of the whole image.
        evidence: (h, w) of the whole image, any resolution; see `class_activation`.
        size: (height, width) of the image in pixels.
        spacing: Micrometres per pixel (y, x), or None: then the scale bar is in pixels.
        title: Above the picture.
    """
    height, width = size
    figure = Figure(
        figsize=(max(4.0, _HEIGHT_INCHES * width / height) + 1.2, _HEIGHT_INCHES), dpi=_DPI, layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    extent = (0, width, height, 0)
    axes.imshow(thumbnail, extent=extent, interpolation="bilinear")
    top = max(float(evidence.max()), float(np.finfo(np.float32).tiny))
    positive = np.clip(evidence, 0.0, top)  # evidence far below a tiny top would overflow
    heat = axes.imshow(
        positive,
        extent=extent,
        cmap="inferno",
        vmin=0.0,
        vmax=top,
        alpha=0.75 * positive / top,
        interpolation="nearest",
    )
    colours = figure.colorbar(heat, ax=axes, shrink=0.8, label="evidence for the class (logit)")
    if colours.solids is not None:
        colours.solids.set_alpha(1.0)
    _circle_peak(axes, evidence, size)
    _draw_scale_bar(axes, height, width, spacing)
    figure.savefig(path, pil_kwargs={"compress_level": 1})  # at the default of 6, half of the time goes into this


def _circle_peak(axes: Axes, evidence: np.ndarray, size: tuple[int, int]) -> None:
    y, x = peak(evidence, size)
    circle = Circle((x, y), 0.03 * max(size), fill=False, edgecolor="white", linewidth=1.5)
    circle.set_path_effects([withStroke(linewidth=3, foreground="black")])
    axes.add_patch(circle)


def _draw_scale_bar(axes: Axes, height: int, width: int, spacing: tuple[float, float] | None) -> None:
    bar = scale_bar(width, None if spacing is None else spacing[1])
    left, bottom, thick = 0.03 * width, 0.96 * height, 0.012 * height
    axes.add_patch(
        Rectangle((left, bottom - thick), bar.pixels, thick, facecolor="white", edgecolor="black", linewidth=0.8)
    )
    axes.annotate(
        bar.text,
        (left + bar.pixels / 2, bottom - 1.5 * thick),
        ha="center",
        va="bottom",
        fontsize=9,
        color="white",
        bbox={"facecolor": "black", "alpha": 0.6, "pad": 1.5, "linewidth": 0},
    )


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
