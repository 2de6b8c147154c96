"""Slides of the scanners that OpenSlide knows: Hamamatsu, Leica, MIRAX, Philips, Sakura, Trestle, Ventana, DICOM.

Aperio's slides, which are plain TIFF files, are read as those, unless their tiles are JPEG 2000.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import openslide

from widefield.images.formats import Choice, Contents, PerProcess, choose_series, image_format, known, micrometres

_READ_AS_TIFF = ("aperio", "generic-tiff", None)
_ENDINGS = (".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")


_NO_SLIDES = (b"\x93NUMPY", b"\x89PNG", b"RIFF", b"BM", b"GIF8")
"""First bytes of files that OpenSlide need not look into, which takes longer than to open them."""


def _is_slide(path: Path, start: bytes) -> bool:
    return (
        bool(start)
        and not start.startswith(_NO_SLIDES)
        and openslide.OpenSlide.detect_format(str(path)) not in _READ_AS_TIFF
    )


@image_format(
    "slides that OpenSlide reads", endings=_ENDINGS, recognises=_is_slide, before=("TIFF", "PNG, JPEG, WebP", "DICOM")
)
def open_slide(path: Path, choice: Choice) -> Contents:
    """Open a slide: the whole scanned area, as OpenSlide lays it out, with what was not scanned in its background colour.

    Of a slide with several regions each is an image, too, after the whole: `series="region 1"`.
    """
    with openslide.OpenSlide(str(path)) as slide:
        said = slide.properties
        levels = tuple((height, width) for width, height in slide.level_dimensions)
        scales = slide.level_downsamples
        regions = _regions(said)
        names = [path.name, *(f"region {k}" for k in range(len(regions)))]
        index = choose_series(path, choice.series, names, [levels[0], *(region[2:] for region in regions)])
        y_first, x_first = 0, 0
        if index:
            y_first, x_first, height, width = regions[index - 1]
            sizes = [(int(height / scale), int(width / scale)) for scale in scales]
            levels = tuple(size for size in sizes if min(size) > 0)
        y, x = (micrometres(said.get(f"openslide.mpp-{axis}"), "um") for axis in "yx")
        colour = said.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        background = tuple(bytes.fromhex(colour))
        associated = {name: partial(associated_image, path, name) for name in slide.associated_images}
    opened = PerProcess(lambda: openslide.OpenSlide(str(path)))
    return Contents(
        levels=levels,
        pixels=lambda level: SlidePixels(opened, level, levels[level], scales[level], background, (y_first, x_first)),
        spacing=known(y, x),
        channel_names=("red", "green", "blue"),
        associated=associated,
    )


def _regions(said: Mapping[str, str]) -> list[tuple[int, int, int, int]]:
    """(y, x, height, width) at level 0 of each region of a slide that has several."""
    found: list[tuple[int, int, int, int]] = []
    while (prefix := f"openslide.region[{len(found)}].") + "x" in said:
        y, x, height, width = (int(said[prefix + name]) for name in ("y", "x", "height", "width"))
        found.append((y, x, height, width))
    return found if len(found) > 1 else []


def associated_image(path: Path, name: str) -> np.ndarray:
    """Read a picture beside the slide: uint8 array (height, width, 3)."""
    with openslide.OpenSlide(str(path)) as slide:
        return np.array(slide.associated_images[name].convert("RGB"))


@dataclass(frozen=True)
class SlidePixels:
    """One level of a slide, (3, height, width) of 8 bits. Each process opens the file at its first read."""

    slide: PerProcess
    level: int
    size: tuple[int, int]
    """(height, width)."""
    scale: float
    """Pixels of level 0 per pixel of this level."""
    background: tuple[int, ...]
    corner: tuple[int, int]
    """(y, x) of the image at level 0 of the slide."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return 3, *self.size

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels."""
        return np.dtype("u1")

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width)."""
        top, left = self.corner
        corner = (
            left + math.ceil(x * self.scale),
            top + math.ceil(y * self.scale),
        )  # at level 0, as (x, y); OpenSlide rounds down
        try:
            pixels = np.asarray(self.slide.get().read_region(corner, self.level, (width, height)))
        except openslide.OpenSlideError:
            self.slide.forget()  # after an error it is of no more use
            raise
        colours, opacity = pixels[..., :3], pixels[..., 3:]
        if opacity.min() < 255:
            opaque = opacity.astype(np.uint16)
            colours = ((colours * opaque + np.array(self.background) * (255 - opaque) + 127) // 255).astype(np.uint8)
        if list(channels) != [0, 1, 2]:
            colours = colours[..., list(channels)]
        return np.array(colours.transpose(2, 0, 1), order="K")
