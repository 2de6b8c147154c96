"""TIFF, BigTIFF, OME-TIFF and GeoTIFF files: which images and levels they hold, and what they say of them."""

import logging
import math
import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tifffile
from tifffile import PHOTOMETRIC

from widefield.images.arrays import ArrayPixels, MappedArray, stacked
from widefield.images.formats import (
    Choice,
    Contents,
    ImageReadError,
    Palette,
    Pixels,
    Size,
    cannot_read,
    check_planes,
    check_reaches,
    choose_series,
    image_format,
    position_name,
)
from widefield.images.rasters import open_raster
from widefield.images.segments import Page, page_pixels
from widefield.images.slides import open_slide
from widefield.images.tiff_metadata import channel_names, georeference, nodata, shown_nodata, spacing

_log = logging.getLogger(__name__)

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ENDINGS = (".tif", ".tiff", ".btf", ".tf2", ".tf8", ".svs", ".qptiff")
_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_BESIDE = re.compile("label|macro|thumbnail|overview|map", re.IGNORECASE)
"""Names of pictures that scanners store beside the slide."""

_MASK = 4
"""Bit of NewSubfileType: the page says which pixels of another one are valid."""

_APERIO_JPEG_2000 = (33003, 33004, 33005)


@dataclass(frozen=True)
class _Plane:
    """An image: one series of tifffile at one position on each axis that is none of channels, rows and columns."""

    name: str
    index: int
    """Number of the series in the file."""
    series: tifffile.TiffPageSeries
    at: dict[str, int]


def _is_tiff(path: Path, start: bytes) -> bool:
    """True of a TIFF file, but not of DICOM, whose preamble may begin like one."""
    return start.startswith(_MAGIC) and start[128:132] != b"DICM"


@image_format("TIFF", endings=_ENDINGS, recognises=_is_tiff)
def open_tiff(path: Path, choice: Choice) -> Contents:
    """Open one image of a TIFF file. Channels that lie in other files of the same OME-TIFF are read from there."""
    with tifffile.TiffFile(path) as file:
        series = file.series
        beside = {one.name.lower(): one for one in series[1:] if _BESIDE.search(one.name)}
        planes = [
            plane
            for index, one in enumerate(series)
            if (index == 0 or not _BESIDE.search(one.name)) and not one.keyframe.subfiletype & _MASK
            for plane in _planes(path, index, one)
        ]
        if not _is_complete(file):
            raise cannot_read(path, "it is truncated: it lacks some of its pages")
        if file.is_svs and series[0].keyframe.compression in _APERIO_JPEG_2000:
            return open_slide(path, choice)
        if (scanner := _scanner(file)) is not None:
            raise cannot_read(
                path, f"it is a {scanner} file, but not as OpenSlide knows them; convert it to a tiled TIFF"
            )
        if not planes:
            raise cannot_read(path, "it holds masks only, no image")
        names, sizes = [plane.name for plane in planes], [_size(plane.series) for plane in planes]
        plane = planes[choose_series(path, choice.series, names, sizes)]
        page: Page = plane.series.keyframe
        levels = [level for level in plane.series.levels if _is_reduced(level, plane.series)]
        opened = [_attempted(partial(_level_pixels, path, file, level, plane.at, choice.palette)) for level in levels]
        crs, transform = georeference(page)
        if transform is not None and (reason := _left_to_gdal(path, file, page, crs)):
            if find_spec("rasterio") and len(planes) == 1:
                return open_raster(path, choice)
            _log.warning(
                "%s has %s, which counts for nothing; to use it, run pip install 'widefield[geo]'", path, reason
            )
        named = channel_names(file, plane.index, opened[0]) if not isinstance(opened[0], ImageReadError) else None
        return Contents(
            levels=tuple(map(_size, levels)),
            pixels=partial(_given, opened),
            spacing=spacing(file, plane.index) if transform is None else None,
            channel_names=named,
            has_alpha=transform is None and len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA,
            nodata=shown_nodata(page, choice.palette),
            crs=crs,
            transform=transform,
            associated={name: partial(_picture, path, one) for name, one in _beside_pixels(path, beside)},
        )


def _scanner(file: tifffile.TiffFile) -> str | None:
    """A name for slides that only OpenSlide puts together rightly: their tiles overlap, or the slide is not the first image."""
    if file.is_bif:
        return "Ventana"
    return "Hamamatsu NDPI" if file.is_ndpi else "Leica SCN" if file.is_scn else "Philips" if file.is_philips else None


def _left_to_gdal(path: Path, file: tifffile.TiffFile, page: Page, crs: str | None) -> str | None:
    """A name for what GDAL alone reads of a map that it gives the same pixels of; None if there is nothing."""
    if page.photometric not in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR):
        return None
    pages: list[Page] = list(file.pages)
    if any(getattr(one, "subfiletype", 0) & _MASK for one in pages) or path.with_name(f"{path.name}.msk").exists():
        return "a mask"
    if path.with_name(f"{path.name}.ovr").exists():
        return "overviews in a file beside it"
    return "a CRS without a number of EPSG" if crs is None and page.tags.valueof(34735) else None


def _attempted(opening: partial) -> Pixels | ImageReadError:
    """Pixels of a level, or the error of opening it, which is raised when the level is asked for."""
    try:
        return opening()
    except ImageReadError as error:
        return error


def _given(opened: list[Pixels | ImageReadError], level: int) -> Pixels:
    pixels = opened[level]
    if isinstance(pixels, ImageReadError):
        raise pixels
    return pixels


def _size(series: tifffile.TiffPageSeries) -> Size:
    shape = dict(zip(series.axes, series.shape, strict=True))
    return shape.get("Y", 1), shape.get("X", 1)


def _planes(path: Path, index: int, series: tifffile.TiffPageSeries) -> list[_Plane]:
    """The images of a series: one, or one for each position in time, depth and the like."""
    axes = {axis: length for axis, length in zip(series.axes, series.shape, strict=True) if axis not in "CSYX"}
    check_planes(path, axes.values())
    name = series.name or f"image {index}"
    return [
        _Plane(position_name(name, axes, where), index, series, dict(zip(axes, map(int, where), strict=True)))
        for where in np.ndindex(*axes.values())
    ]


def _is_complete(file: tifffile.TiffFile) -> bool:
    """True if all pages and SubIFDs can be reached; tifffile drops those that it cannot, with a log line only."""
    if file.imagej_metadata:
        planes = math.prod(
            n for axis, n in zip(file.series[0].axes, file.series[0].shape, strict=True) if axis not in "YXS"
        )
        if planes < file.imagej_metadata.get("images", 1):
            return False
    first: Page = file.pages.first
    try:
        for index in range(len(first.subifds or ())):
            first.pages[index]  # raises if it is damaged
    except IndexError:  # or beyond the end of the file
        return False
    position = file.pages.next_page_offset
    if position is None:
        return False
    file.filehandle.seek(position)
    return not any(file.filehandle.read(file.tiff.offsetsize))


def _is_reduced(level: tifffile.TiffPageSeries, series: tifffile.TiffPageSeries) -> bool:
    """True if a level has the proportions of the image, but for what it may be padded; labels have not."""
    (full_height, full_width), (height, width) = _size(series), _size(level)
    page = level.keyframe
    padded = page.is_tiled and height % page.tilelength == 0 and width % page.tilewidth == 0
    rows, columns = (page.tilelength, page.tilewidth) if padded else (2, 2)
    return abs(height * full_width - width * full_height) <= rows * full_width + columns * full_height


def _level_pixels(
    path: Path, file: tifffile.TiffFile, level: tifffile.TiffPageSeries, at: dict[str, int], palette: Palette
) -> Pixels:
    """Pixels of one level of an image, of one page or of a page for each channel."""
    page: Page = level.keyframe
    leading = level.axes[: len(level.axes) - len(page.axes)]
    if level.axes != leading + page.axes or math.prod(level.shape[: len(leading)]) != len(level.pages):
        return _one_directory(path, file, level, at)
    shape = level.shape[: len(leading)]
    where = [
        [at.get(axis, 0) if axis != "C" else c for axis in leading]
        for c in range(dict(zip(leading, shape)).get("C", 1))
    ]
    pages: list[Page] = [
        level.pages[int(np.ravel_multi_index(position, shape)) if leading else 0] for position in where
    ]
    if None in pages:
        raise cannot_read(
            path, "some of its channels lie in other files, which are missing; put them into the same folder"
        )
    declared = nodata(page)
    blank = declared if declared is not None else 255 if file.is_svs else 0
    parts = []
    for one in pages:
        parent = one.parent.filehandle
        holder = path if parent is file.filehandle else Path(parent.dirname) / parent.name
        _check_holds_pixels(path, parent.size, one)
        parts.append(page_pixels(holder, one, blank, palette))
    if any(part.shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype for part in parts):
        raise cannot_read(path, "its channels have different sizes or types; save them as pages of one size and type")
    return stacked(parts)


def _one_directory(path: Path, file: tifffile.TiffFile, level: tifffile.TiffPageSeries, at: dict[str, int]) -> Pixels:
    """All planes of a stack behind one another under one directory, as ImageJ and tifffile may write them."""
    page: Page = level.keyframe
    if level.dataoffset is None or page.dtype is None or page.dtype.kind not in "uif" or {"C", "S"} <= set(level.axes):
        shape = " x ".join(f"{length} {axis}" for axis, length in zip(level.axes, level.shape, strict=True))
        raise cannot_read(path, f"its planes ({shape}) lie in one compressed or unusual page; save each as a page")
    stored = page.dtype.newbyteorder(file.byteorder)
    check_reaches(path, file.filehandle.size, level.dataoffset + level.nbytes)
    mapped = MappedArray(path, level.dataoffset, level.shape, stored)
    return ArrayPixels(mapped, level.axes.replace("S", "C"), tuple(at.values()))


def _check_holds_pixels(path: Path, size: int, page: Page) -> None:
    """Compare where the pixels should lie with the size of the file, so that a truncated one is found at once."""
    check_reaches(path, size, int(np.max(np.add(page.dataoffsets, page.databytecounts, dtype=np.int64), initial=0)))


def _beside_pixels(path: Path, beside: dict[str, tifffile.TiffPageSeries]) -> list[tuple[str, Pixels]]:
    """The pictures beside the image that can be opened."""
    opened = []
    for name, series in beside.items():
        try:
            opened.append((name, page_pixels(path, series.pages[0], 255)))
        except Exception:  # a damaged label is no reason to refuse the slide
            continue
    return opened


def _picture(path: Path, pixels: Pixels) -> np.ndarray:
    channels, height, width = pixels.shape
    if pixels.dtype != np.uint8:
        raise cannot_read(path, f"a picture beside the image is of type {pixels.dtype}; expected 8 bits")
    return pixels.read(0, 0, height, width, [0, 1, 2] if channels >= 3 else [0, 0, 0]).transpose(1, 2, 0)
