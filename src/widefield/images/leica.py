"""Leica LIF and LOF files, and XLEF, which names LOF files.

Their structure is read by liffile, which the extra `microscopy` brings, their pixels from the file.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element

import numpy as np

from widefield.images.arrays import ArrayPixels, MappedArray, stacked
from widefield.images.formats import (
    Choice,
    Contents,
    all_named,
    cannot_read,
    choose_series,
    image_format,
    known,
    micrometres,
    optional,
    position_name,
)

_AXES = {1: "X", 2: "Y", 3: "Z", 4: "T", 5: "lambda", 6: "A", 7: "N", 8: "Q", 9: "excitation", 10: "M", 11: "L"}
"""Letters of the dimensions of an image by their numbers in LIF: 6 rotation, 7 and 8 slices, 10 tile of a mosaic, 11 loop."""

_RED, _GREEN, _BLUE = 1, 2, 3
"""Tags of the channels of a colour camera."""


@dataclass(frozen=True)
class _Axis:
    name: str
    count: int
    step: int
    """Bytes from one position to the next."""
    spacing: float
    """Micrometres from one position to the next; NaN if unknown."""


@dataclass(frozen=True)
class _Image:
    """One image of a file, as its XML tells it; of several positions in time, depth and the like."""

    file: Path
    """The file that its pixels lie in."""
    name: str
    axes: dict[str, _Axis]
    channels: list[Element]
    offset: int | None
    """Place at which its pixels begin; None if the file lacks them."""
    size: int
    """Bytes of its pixels."""

    @property
    def stacked(self) -> dict[str, int]:
        """Numbers of positions on the axes but those of a plane, where there are several; not told of an image without pixels."""
        if self.offset is None:
            return {}
        return {name: axis.count for name, axis in self.axes.items() if name not in "YX" and axis.count > 1}


def _is_leica(path: Path | str, start: bytes) -> bool:
    is_project = str(path).lower().endswith(".xlef") and start.startswith((b"<", b"\xff\xfe<", b"\xef\xbb\xbf<"))
    return is_project or (start.startswith(b"\x70\0\0\0") and start[8:9] == b"\x2a")


@image_format("Leica LIF, LOF, XLEF", endings=(".lif", ".lof", ".xlef"), recognises=_is_leica)
def open_lif(path: Path, choice: Choice) -> Contents:
    """Open one plane of an image of a LIF file, or of a LOF file that an XLEF names: all its channels at one position.

    What is no picture of rows and columns (line scans, histograms of photon counts) is none of the images.
    """
    liffile: Any = optional("liffile", path, "microscopy")
    images = [one for one in _images(path, liffile) if {"Y", "X"} <= one.axes.keys()]
    places = [(one, at) for one in images for at in np.ndindex(*one.stacked.values())]
    if not places:
        reason = "no picture of rows and columns" + " in a LOF file" * (path.suffix.lower() == ".xlef")
        raise cannot_read(path, f"it holds {reason}; convert it to OME-TIFF, as Bio-Formats' bfconvert does")
    names = [position_name(one.name, one.stacked, at) for one, at in places]
    sizes = [(one.axes["Y"].count, one.axes["X"].count) for one, _ in places]
    index = choose_series(path, choice.series, names, sizes)
    image, at = places[index]
    y, x = image.axes["Y"], image.axes["X"]
    if image.offset is None:
        raise cannot_read(path, f"it is truncated: it lacks the pixels of {image.name}")
    channels = sorted(image.channels, key=lambda one: int(one.attrib["BytesInc"]))
    tags = [int(one.attrib["ChannelTag"]) for one in channels]
    if is_colour := sorted(tags) == [_RED, _GREEN, _BLUE]:
        channels = [channels[tags.index(tag)] for tag in (_RED, _GREEN, _BLUE)]
    dtypes = {_dtype(path, one) for one in channels}
    if len(dtypes) != 1:
        raise cannot_read(path, f"its channels are of type {', '.join(map(str, dtypes)) or 'none'}; expected one type")
    (dtype,) = dtypes
    first = sum(image.axes[axis].step * k for axis, k in zip(image.stacked, at, strict=True))
    starts = [image.offset + first + int(one.attrib["BytesInc"]) for one in channels]
    parts = tuple(
        ArrayPixels(MappedArray(image.file, start, (y.count, x.count), dtype, (y.step, x.step)), "YX")
        for start in starts
    )
    end = max(starts) + (y.count - 1) * y.step + (x.count - 1) * x.step + dtype.itemsize
    if end > image.offset + image.size:
        reason = f"the pixels of {names[index]} reach to {end - image.offset} of {image.size} bytes"
        raise cannot_read(path, f"its structure is damaged: {reason}")
    named = ["red", "green", "blue"] if is_colour else [one.get("LUTName", "") for one in channels]
    return Contents(
        levels=(sizes[index],),
        pixels=lambda level: stacked(parts),
        spacing=known(y.spacing, x.spacing),
        channel_names=all_named(named, len(set(named))),
    )


def _images(path: Path, liffile: Any) -> list[_Image]:
    """All images but histograms of photon counts; of an XLEF those whose pixels lie in a LOF file, by their names in the XLEF."""
    with liffile.LifFile(path) as file:
        if path.suffix.lower() != ".xlef":
            return [_image(path, one) for one in file.images if not one.is_flim]
        named = [
            (one.path, Path(one.parent.dirname), one.memory_block.frames) for one in file.images if not one.is_flim
        ]
    found = []
    for name, folder, parts in named:
        if len(parts) != 1 or not parts[0].file.lower().endswith(".lof"):
            continue
        lof = folder / unquote(parts[0].file).replace("\\", "/")
        if not lof.is_file():
            raise cannot_read(path, f"{lof}, in which the pixels of {name} lie, is missing")
        with liffile.LifFile(lof) as file:
            found += [replace(_image(lof, one), name=name) for one in file.images]
    return found


def _image(path: Path, image: Any) -> _Image:
    """The facts about an image of liffile, which refuses some layouts of pixels and rows that are padded."""
    description = image.xml_element.find("./Data/Image/ImageDescription")
    axes: dict[str, _Axis] = {}
    for one in description.findall("./Dimensions/DimensionDescription"):
        number, count = int(one.attrib["DimID"]), int(one.attrib["NumberOfElements"])
        name, step = _AXES.get(number, f"axis {number}"), int(one.attrib["BytesInc"])
        if name in axes or count < 1 or step < 1:
            raise cannot_read(
                path, f"its structure is damaged: {image.path} has an axis {name} of {count} by {step} bytes"
            )
        length = micrometres(one.attrib["Length"], one.attrib["Unit"])
        axes[name] = _Axis(name, count, step, abs(length) / (count - 1) if count > 1 else math.nan)
    try:
        block = image.memory_block
        is_there = block.size and block.offset + block.size <= path.stat().st_size
        offset, size = (block.offset, block.size) if is_there else (None, 0)
    except KeyError:
        offset, size = None, 0
    if offset is not None and (planes := math.prod(one.count for one in axes.values())) > size:
        raise cannot_read(path, f"its structure is damaged: {image.path} has {planes} pixels of {size} bytes together")
    return _Image(path, image.path, axes, description.findall("./Channels/ChannelDescription"), offset, size)


def _dtype(path: Path, channel: Element) -> np.dtype:
    """The type of a channel: integers or floats, of the least number of bytes that holds its bits."""
    bits, kind = int(channel.attrib["Resolution"]), {"0": "u", "1": "f"}.get(channel.attrib["DataType"])
    itemsize = next((size for size in (1, 2, 4, 8) if bits <= 8 * size), None)
    if kind is None or itemsize is None or (kind, itemsize) == ("f", 1):
        raise cannot_read(
            path, f"its pixels are of {bits} bits of type {channel.attrib['DataType']}; expected up to 64"
        )
    return np.dtype(f"<{kind}{itemsize}")
