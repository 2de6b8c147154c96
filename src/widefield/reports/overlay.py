"""Overlays: the picture of an image with the evidence over it, and beside it what lies at the peak, at full resolution."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from widefield.images import ImageFile, thumbnail
from widefield.images.formats import strips
from widefield.reports.figures import new_figure, save
from widefield.reports.heatmap import COLOUR, Heatmap
from widefield.writing import replacing

_DPI = 150
_LARGEST = (6.0, 10.0)
"""Height and width of the whole image at most, in inches."""
_BESIDE_INCHES = 4.5
"""Height and width of what is shown at full resolution."""
_SIDE = 1024
"""Long side of the picture under an overlay, in pixels."""
_CELLS = 512
"""Cells along the long side of the heatmap at most; of more, the greatest stands for its neighbours, as it would vanish alone."""
_DETAIL = 192
"""Side of what is shown at full resolution, in pixels of the level that the model saw."""
_COLOUR = np.array(COLOUR) / 255
_OPACITY = 0.75
"""Opacity of the greatest evidence, from 0 to 1."""
_POWERS, _PAINTED = (2, 4, 8), 0.1
"""Opacity grows with a power of the share of the greatest evidence: the first that keeps the mean of all shares below this, so that
weak evidence everywhere does not hide the image."""
_SHOWN_SHARE = (2, 98)
"""Percentiles of a channel that become black and white where pixels are not of 8 bits."""


def save_overlay(path: str | Path, image: ImageFile | Tensor, heatmap: Heatmap, title: str) -> None:
    """Write a PNG: the image, its positive evidence in one colour, a scale bar; and the surroundings of the peak, uncovered.

    The greater the evidence, the more of the colour; where it is at or below zero the image is as it is. The surroundings of the
    peak are shown at the resolution of `image`, and framed in the picture of the whole; of an image that is hardly larger than
    they are, a circle shows the peak. Where the image holds no data there is no evidence. The scale bar is in
    pixels where the spacing is unknown.

    Args:
        path: Of the PNG file; written whole or not at all.
        image: What the model got, a file at whatever level or a tensor (C, H, W). 8 bits are shown as they are, other values
            from black to white; of two channels one is magenta and one green, of more than three the first three are shown.
        heatmap: See `Heatmap.of`.
        title: Above the picture.
    """
    height, width = heatmap.size
    peak = heatmap.peak
    has_detail = peak is not None and not isinstance(image, Tensor) and max(image.shape[1:]) > 2 * _DETAIL
    inch = min(_LARGEST[0] / height, _LARGEST[1] / width)
    shown_height, shown_width = max(2.0, inch * height), max(2.5, inch * width)
    added = _BESIDE_INCHES * has_detail
    size = shown_width + added + 0.2, max(shown_height, added) + 0.9
    figure = Figure(size, dpi=_DPI, layout="constrained")
    ratios = [shown_width, added][: 1 + has_detail]
    axes, *others = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    figure.suptitle(title, fontsize=10)
    axes.imshow(overview(image, _SIDE), extent=(0, width, height, 0), interpolation="bilinear")
    _paint(figure, axes, heatmap)
    spacing = None if heatmap.spacing is None else heatmap.spacing[1]
    _frame(axes, (0, 0, height, width), spacing)
    if peak is not None:
        y, x = peak
        mark: Patch = Circle((x, y), 0.03 * max(heatmap.size), fill=False, edgecolor="white", linewidth=1.5)
        for beside in others:
            assert not isinstance(image, Tensor)
            pixels, region = _detail(image, heatmap, peak)
            top, left, high, wide = region
            beside.imshow(pixels, extent=(left, left + wide, top + high, top))
            beside.set_title("around the greatest evidence (framed), as the model saw it", fontsize=9)
            down, across = heatmap.cells.stride
            corner = x + 0.5 - across / 2, y + 0.5 - down / 2
            beside.add_patch(Rectangle(corner, across, down, fill=False, edgecolor=_COLOUR, linewidth=2))
            _frame(beside, region, spacing)
            mark = Rectangle((left, top), wide, high, fill=False, edgecolor="white", linewidth=1.5)
        mark.set_path_effects([withStroke(linewidth=3, foreground="black")])
        axes.add_patch(mark)
    with replacing(Path(path)) as partial:  # at the default compression of 6, half of the time goes into this
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 1})


def _paint(figure: Figure, axes: Axes, heatmap: Heatmap) -> None:
    """Lay the positive evidence over a picture, and draw its colour bar."""
    evidence = np.where(np.isnan(heatmap.evidence), 0, heatmap.evidence)
    top = max(float(evidence.max()), float(np.finfo(np.float32).tiny))
    share = np.clip(evidence, 0.0, top) / top  # evidence far below a tiny top would overflow
    power = next((power for power in _POWERS if (share**power).mean() <= _PAINTED), _POWERS[-1])
    factor = -(-max(share.shape) // _CELLS)
    rows, cols = (-(-count // factor) for count in share.shape)
    share = np.pad(share, ((0, rows * factor - share.shape[0]), (0, cols * factor - share.shape[1])))
    colours = np.empty((rows, cols, 4), np.uint8)
    colours[..., :3] = COLOUR
    colours[..., 3] = np.rint(255 * _OPACITY * share.reshape(rows, factor, cols, factor).max((1, 3)) ** power)
    ((above, _), (left, _)), (down, across) = heatmap.edges, heatmap.cells.stride
    extent = (left, left + across * factor * cols, above + down * factor * rows, above)
    axes.imshow(colours, extent=extent, interpolation="nearest")
    on_white = 1 - _OPACITY * np.linspace(0, 1, 256)[:, None] ** power * (1 - _COLOUR)
    bar = ScalarMappable(Normalize(0, top), ListedColormap(on_white))
    label = "evidence for the class (logit)"
    figure.colorbar(bar, ax=axes, shrink=0.5, aspect=40, pad=0.01, location="bottom", label=label)


Region = tuple[float, float, float, float]
"""(y, x, height, width) in pixels of the largest level."""


def _detail(image: ImageFile, heatmap: Heatmap, peak: tuple[int, int]) -> tuple[np.ndarray, Region]:
    """Return the surroundings of the peak as a picture, and where they lie."""
    size = image.shape[1:]
    scale = heatmap.size[0] / size[0], heatmap.size[1] / size[1]
    sides = min(_DETAIL, size[0]), min(_DETAIL, size[1])
    y, x = (
        min(max(int((place + 0.5) / factor) - side // 2, 0), full - side)
        for place, factor, side, full in zip(peak, scale, sides, size, strict=True)
    )
    region = y * scale[0], x * scale[1], sides[0] * scale[0], sides[1] * scale[1]
    return as_rgb(image.read(y, x, *sides)), region


def save_picture(path: str | Path, image: ImageFile | Tensor, title: str) -> None:
    """Write a PNG of a whole image, in the colours of `save_overlay`, with a title above."""
    figure, axes = new_figure()
    axes.imshow(overview(image, _SIDE))
    axes.set_title(title)
    axes.set_axis_off()
    save(figure, path)


def overview(image: ImageFile | Tensor, size: int) -> np.ndarray:
    """Return the whole image as a picture (height, width, 3), uint8; a file's has a long side of about `size` pixels at most.

    See `save_overlay` for its colours.
    """
    if isinstance(image, Tensor):
        return as_rgb(image.cpu().numpy())
    if image.dtype == np.uint8 and image.shape[0] != 2:
        return thumbnail(image, size)
    enough = [index for index, level in enumerate(image.levels) if max(level) >= size]
    level = max([image.level, *enough])
    image = image if level == image.level else image.at_level(level)
    _, height, width = image.shape
    step = -(-max(height, width) // size)
    read = [image.read(y, 0, rows, width)[:, ::step, ::step] for y, rows in strips(image, step)]
    return as_rgb(np.concatenate(read, axis=1))


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Return pixels (C, H, W) of any type as a picture (H, W, 3), uint8; see `save_overlay` for its colours."""
    chosen = pixels[:3] if len(pixels) >= 2 else pixels[:1]
    if pixels.dtype == np.uint8:
        values = chosen.astype(np.float64)
    elif len(pixels) in (3, 4):  # colours of one camera keep their balance
        values = _stretched(chosen)
    else:
        values = np.stack([_stretched(channel) for channel in chosen])
    if len(values) == 2:
        values = values[[0, 1, 0]]  # magenta and green add up to white
    elif len(values) == 1:
        values = values[[0, 0, 0]]
    return np.rint(values).astype(np.uint8).transpose(1, 2, 0)


def _stretched(pixels: np.ndarray) -> np.ndarray:
    """Return pixels from 0 to 255, clipped where they are darkest and brightest; what is not finite is 0."""
    values = pixels.astype(np.float64)
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, _SHOWN_SHARE) if known.size else (0.0, 0.0)
    scaled = (values - low) * (255 / (high - low) if high > low else 0)
    return np.clip(np.nan_to_num(scaled, nan=0, posinf=0, neginf=0), 0, 255)


def _frame(axes: Axes, region: Region, spacing: float | None) -> None:
    """Show a region alone, without ticks, and with a scale bar in its corner."""
    top, left, height, width = region
    axes.set_xlim(left, left + width)
    axes.set_ylim(top + height, top)
    axes.set_axis_off()
    bar = scale_bar(width, spacing)
    x, bottom, thick = left + 0.03 * width, top + 0.96 * height, 0.012 * height
    axes.add_patch(
        Rectangle((x, bottom - thick), bar.pixels, thick, facecolor="white", edgecolor="black", linewidth=0.8)
    )
    axes.annotate(
        bar.text,
        (x + bar.pixels / 2, bottom - 1.5 * thick),
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


def scale_bar(width: float, spacing: float | None) -> ScaleBar:
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
