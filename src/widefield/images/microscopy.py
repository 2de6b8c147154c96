"""Zeiss CZI files, through pylibCZIrw, which the extra `microscopy` brings; microscopy files that nothing reads are refused."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openslide

from widefield.images.arrays import stacked
from widefield.images.czi_structure import check_tiles
from widefield.images.files import image_endings
from widefield.images.formats import (
    Choice,
    Contents,
    PerProcess,
    Pixels,
    Size,
    all_named,
    cannot_read,
    check_segment,
    choose_series,
    image_format,
    known,
    micrometres,
    optional,
    position_name,
)
from widefield.images.slides import associated_image

_TYPES = {"Gray8": ("u1", 1), "Gray16": ("u2", 1), "Gray32Float": ("f4", 1), "Bgr24": ("u1", 3), "Bgr48": ("u2", 3)}
"""Type and number of bands of the pixel types that pylibCZIrw decodes, by their names in CZI."""

_STACKED = "TZRIHVB"
"""Axes of a CZI file whose positions are images of their own: time, depth, rotation, illumination, phase, view, block."""

_CACHE_BYTES = 2**26
"""Decoded tiles that an open file keeps; a tile of a scanner has about 15 MiB."""

_REFUSED = {
    **dict.fromkeys((".vsi", ".ets", ".oir"), "Olympus"),
    ".ims": "Imaris",
    ".zvi": "Zeiss ZVI",
    ".dv": "DeltaVision",
}
"""Makers, or formats, of microscopy files by the endings of their names; they are refused, unless a format has the ending."""


@image_format(
    "Zeiss CZI",
    endings=(".czi",),
    recognises=lambda path, start: start.startswith(b"ZISRAWFILE"),
    before=("slides that OpenSlide reads",),
)
def open_czi(path: Path, choice: Choice) -> Contents:
    """Open one scene of a CZI file, at one position in time, depth and the like; BGR comes as RGB.

    Parts of a scene that no tile covers are 0 in grey images and white in those of colours.
    """
    pyczi: Any = optional("pylibCZIrw.czi", path, "microscopy")
    check_tiles(path)
    with pyczi.open_czi(str(path)) as header:
        tiles, metadata = _tiles(header), ElementTree.fromstring(header.raw_metadata)
    full = [tile for tile in tiles if tile.stored == tile.box[2:]]
    if not full:
        raise cannot_read(path, "it is a CZI file without an image")
    kinds = sorted({tile.kind for tile in full})
    if len(kinds) > 1 or kinds[0] not in _TYPES:
        raise cannot_read(path, f"its channels are of type {', '.join(kinds)}; expected one of {', '.join(_TYPES)}")
    dtype, bands = _TYPES[kinds[0]]
    check_segment(path, "tile", (*max((tile.stored for tile in tiles), key=math.prod), bands), np.dtype(dtype).itemsize)
    positions = {axis: {tile.at.get(axis, 0) for tile in full} for axis in _STACKED}
    axes = [axis for axis in _STACKED if len(positions[axis]) > 1]
    places = sorted({(tile.at.get("S", -1), *(tile.at.get(axis, 0) for axis in axes)) for tile in full})
    boxes = {scene: _bounds([tile.box for tile in full if tile.at.get("S", -1) == scene]) for scene, *_ in places}
    names = [position_name("image" if scene < 0 else f"scene {scene}", axes, at) for scene, *at in places]
    index = choose_series(path, choice.series, names, [boxes[scene][2:] for scene, *_ in places])
    scene, *at = places[index]
    y, x, height, width = boxes[scene]
    factors = sorted({1, *(tile.factor for tile in tiles if tile.at.get("S", -1) == scene and tile.is_exact)})
    levels = tuple((height // factor, width // factor) for factor in factors if factor <= min(height, width))
    channels = sorted({tile.at.get("C", 0) for tile in full})
    cache = pyczi.CacheOptions(max_memory_usage=_CACHE_BYTES)
    file = PerProcess(lambda: pyczi.CziReader(str(path), cache_options=cache))

    def pixels(level: int) -> Pixels:
        parts = tuple(
            PlanePixels(
                file=file,
                shape=(bands, *levels[level]),
                dtype=np.dtype(dtype),
                plane={**dict(zip(axes, at, strict=True)), "C": channel},
                scene=scene if scene >= 0 else None,
                corner=(y, x),
                factor=factors[level],
            )
            for channel in channels
        )
        return stacked(parts)

    return Contents(
        levels=levels,
        pixels=pixels,
        spacing=known(*(_metres(metadata, axis) for axis in "YX")),
        channel_names=_channel_names(metadata, len(channels), bands),
        associated=_beside(path),
    )


@image_format(
    "microscopy files that are not read",
    endings=(),
    recognises=lambda path, start: bool(start) and _maker(path) != "",
    before=("TIFF", "features in HDF5"),
)
def refuse(path: Path, choice: Choice) -> Contents:
    """Refuse a file by the ending of its name; one of them (VSI) would pass for a TIFF file and hold an overview only."""
    reason = f"{_maker(path)} files ({path.suffix.lower()}) are not read"
    raise cannot_read(path, f"{reason}; convert it to OME-TIFF or OME-Zarr, as Bio-Formats' bfconvert does")


def _maker(path: Path | str) -> str:
    ending = Path(path).suffix.lower()
    return "" if ending in image_endings() else _REFUSED.get(ending, "")


@dataclass(frozen=True)
class _Tile:
    """An entry of the directory of a CZI file ("subblock")."""

    at: dict[str, int]
    """Position on each axis that the file has but X and Y, such as C, Z, T and S."""
    box: tuple[int, int, int, int]
    """(y, x, height, width) that it covers, in pixels of the largest level."""
    stored: Size
    """(height, width) as stored."""
    kind: str

    @property
    def factor(self) -> int:
        """Pixels of the largest level per stored one."""
        return round(max(self.box[2:]) / max(self.stored))

    @property
    def is_exact(self) -> bool:
        """True if rounding of its size can't have changed its factor; that of narrow tiles at the border can be."""
        return max(self.stored) > 2 * self.factor


def _tiles(file: Any) -> list[_Tile]:
    found = []

    def add(_: int, tile: Any) -> bool:
        area, stored = tile.logicalRect, tile.physicalSize
        box, size = (area.y, area.x, area.h, area.w), (stored.h, stored.w)
        found.append(_Tile(at=tile.coordinate.to_dict(), box=box, stored=size, kind=tile.pixelType.name))
        return True

    file.enumerate_subblocks(add)
    return found


def _bounds(boxes: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """The smallest box (y, x, height, width) around several."""
    y, x = (min(box[axis] for box in boxes) for axis in (0, 1))
    bottom, right = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return y, x, bottom - y, right - x


def _metres(metadata: ElementTree.Element, axis: str) -> float:
    """Micrometres per pixel on an axis; CZI gives metres."""
    return micrometres(metadata.findtext(f"Metadata/Scaling/Items/Distance[@Id='{axis}']/Value"), "m")


def _channel_names(metadata: ElementTree.Element, count: int, bands: int) -> tuple[str, ...] | None:
    if bands == 3:
        return ("red", "green", "blue") if count == 1 else None
    path = "Metadata/Information/Image/Dimensions/Channels/Channel"
    return all_named([channel.get("Name") for channel in metadata.findall(path)], count)


def _beside(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Readers of the label and the macro picture, which OpenSlide knows of files that are slides in its eyes."""
    try:
        with openslide.OpenSlide(str(path)) as slide:
            return {name: partial(associated_image, path, name) for name in slide.associated_images}
    except openslide.OpenSlideError:
        return {}


@dataclass(frozen=True)
class PlanePixels:
    """One channel of a scene at one level: (1 or 3, height, width). libCZI may be called by any number of threads."""

    file: PerProcess
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype
    plane: dict[str, int]
    """Position on the axes of the channels, time, depth and the like."""
    scene: int | None
    """Number of the scene; None if the file has none."""
    corner: tuple[int, int]
    """(y, x) of the scene in the file, which may be negative."""
    factor: int
    """Pixels of the largest level per pixel of this one."""

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width)."""
        top, left = (start + self.factor * offset for start, offset in zip(self.corner, (y, x)))
        pixels = self.file.get().read(
            roi=(left, top, width * self.factor, height * self.factor),
            plane=self.plane,
            scene=self.scene,
            zoom=1 / self.factor,
            background_pixel=(1.0,) * 3 if self.shape[0] == 3 else (0.0,) * 3,
        )
        assert pixels.shape == (height, width, self.shape[0]) and pixels.dtype == self.dtype
        return pixels[..., ::-1].transpose(2, 0, 1)[list(channels)]
