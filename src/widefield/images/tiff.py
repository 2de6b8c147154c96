"""TIFF and BigTIFF files: tifffile tells their structure (headers only), libvips decodes their pixels."""

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyvips
import tifffile

from widefield.images.decoded import DecodedPixels, TiledPixels
from widefield.images.numpy_map import MappedPixels
from widefield.images.pixel_source import (
    Alpha,
    OpenedLevel,
    PixelSource,
    Spacing,
    cannot_read,
    check_level,
    warn_of_dropped_alpha,
)
from widefield.images.planes import separate_planes
from widefield.images.vips import dtype_of, kept_out_of_cache, load

_ONE_IMAGE = ("YX", "YXS", "SYX", "CYX")
"""Axes of a series that is one image: Y rows, X columns, S samples of a pixel, C channels with a page each."""

_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)
_GREY_OR_RGB = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
_NOT_RGB = tuple(tifffile.PHOTOMETRIC[name] for name in ("CIELAB", "ICCLAB", "ITULAB", "LOGL", "LOGLUV"))
_BESIDE = re.compile("label|macro|thumbnail|overview|map", re.IGNORECASE)
"""Names of pictures that scanners store beside the slide."""

_MASK = 4
"""Bit of NewSubfileType: the page says which pixels of another one are valid."""

Page = Any
"""tifffile's TiffPage, or the TiffFrame that stands for a page like the one before it and lacks some of its types."""


def open_tiff(path: Path, level: int, alpha: Alpha) -> OpenedLevel:
    """Open one level of the only, or largest, image in a TIFF file; see `open_image` for the errors."""
    try:
        file = tifffile.TiffFile(path, _multifile=False)
    except Exception as error:  # tifffile raises whatever a damaged header leads it to
        raise _damaged(path, error) from error
    with file:
        try:
            every = file.series
            spacing = tiff_spacing(file)
            scanned = _scn_images(file) if file.is_scn else None
            complete, unsupported = _is_complete(file), _unsupported(file)
        except Exception as error:
            raise _damaged(path, error) from error
        if not complete:
            raise cannot_read(path, "it is truncated: it lacks some of its pages")
        if unsupported:
            raise cannot_read(path, f"{unsupported} are not supported; convert it to a tiled TIFF")
        if scanned is None:
            series = every[0]
            _check_is_largest(path, every)
        else:
            series, spacing = _only_region(path, every, scanned)
        _check_is_one_image(path, series)
        pyramid = [one for one in series.levels if _is_reduced(one, series)]
        levels = tuple(map(_size, pyramid))
        check_level(level, levels, path)
        _check_holds_pixels(path, file, pyramid[level])
        source = _source(path, pyramid[level], levels[level], alpha)
        return OpenedLevel(levels, _scaled(spacing, levels[0], levels[level]), source)


def _damaged(path: Path, error: Exception) -> OSError:
    return cannot_read(path, f"its TIFF structure is truncated or damaged ({type(error).__name__}: {error})")


def _size(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    shape = dict(zip(series.axes, series.shape, strict=True))
    return shape.get("Y", 1), shape.get("X", 1)


def _is_complete(file: tifffile.TiffFile) -> bool:
    """True if all pages and SubIFDs can be reached; tifffile drops those that it cannot, with a log line only."""
    if file.imagej_metadata:
        planes = math.prod(
            n for axis, n in zip(file.series[0].axes, file.series[0].shape, strict=True) if axis not in "YXS"
        )
        if planes < file.imagej_metadata.get("images", 1):
            return False
    first: Page = file.pages.first
    for index in range(len(first.subifds or ())):
        first.pages[index]  # raises if it is damaged
    position = file.pages.next_page_offset
    if position is None:
        return False
    file.filehandle.seek(position)
    return not any(file.filehandle.read(file.tiff.offsetsize))


def _unsupported(file: tifffile.TiffFile) -> str | None:
    """A name for files whose pixels would be read wrongly."""
    first: Page = file.pages.first
    if file.is_ndpi:
        return "NDPI files"
    if file.is_bif or "<iScan" in str(first.tags.valueof(700)):
        return "Ventana files, whose tiles overlap,"
    if first.software.startswith("MedScan") and "OverlapsXY" in first.description:
        return "Trestle files, whose tiles overlap,"
    return None


def _scn_images(file: tifffile.TiffFile) -> list[tuple[bool, Spacing]]:
    """For each series of a Leica SCN file: True if it shows the whole glass (the macro picture), and its spacing."""
    found = []
    for collection in ElementTree.fromstring(file.pages.first.description).iterfind("{*}collection"):
        for image in collection.iterfind("{*}image"):
            view, pixels = image.find("{*}view"), image.find("{*}pixels")
            if view is None or pixels is None or pixels.find("{*}dimension") is None:
                continue  # no series either
            is_macro = all(view.attrib[f"size{axis}"] == collection.attrib[f"size{axis}"] for axis in "XY")
            y, x = (float(view.attrib[name]) / 1000 / float(pixels.attrib[name]) for name in ("sizeY", "sizeX"))
            found.append((is_macro, (y, x)))
    return found


def _only_region(
    path: Path, every: list[tifffile.TiffPageSeries], scanned: list[tuple[bool, Spacing]]
) -> tuple[tifffile.TiffPageSeries, Spacing]:
    """The only scanned region of a Leica SCN file, and its spacing."""
    regions = [(one, spacing) for one, (is_macro, spacing) in zip(every, scanned, strict=True) if not is_macro]
    if len(regions) != 1:
        reason = f"it is a Leica SCN file of {len(regions)} scanned regions ({_sizes([one for one, _ in regions])})"
        raise cannot_read(path, f"{reason}, and one is expected; save the one that you need as a tiled TIFF")
    return regions[0]


def _check_is_largest(path: Path, every: list[tifffile.TiffPageSeries]) -> None:
    """Refuse a file whose first image is not the largest: it may be a thumbnail, or one of several scenes."""
    images = [one for one in every if not _BESIDE.search(one.name) and not one.keyframe.subfiletype & _MASK]
    if any(math.prod(_size(one)) >= math.prod(_size(every[0])) for one in images if one is not every[0]):
        reason = f"it holds several images ({_sizes(images)}), of which the first is not the largest alone"
        raise cannot_read(path, f"{reason}; save the one that you need as a file")


def _sizes(series: list[tifffile.TiffPageSeries]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in map(_size, series))


def _is_reduced(level: tifffile.TiffPageSeries, series: tifffile.TiffPageSeries) -> bool:
    """True if a level has the proportions of the image, but for what it may be padded; labels have not."""
    (full_height, full_width), (height, width) = _size(series), _size(level)
    page = level.keyframe
    padded = page.is_tiled and height % page.tilelength == 0 and width % page.tilewidth == 0
    rows, columns = (page.tilelength, page.tilewidth) if padded else (2, 2)
    return abs(height * full_width - width * full_height) <= rows * full_width + columns * full_height


def _check_is_one_image(path: Path, series: tifffile.TiffPageSeries) -> None:
    if series.axes not in _ONE_IMAGE:
        shape = " x ".join(f"{length} {axis}" for axis, length in zip(series.axes, series.shape, strict=True))
        raise cannot_read(path, f"it holds a stack ({shape}), not one image; save the page that you need as a file")


def _check_holds_pixels(path: Path, file: tifffile.TiffFile, level: tifffile.TiffPageSeries) -> None:
    """Compare where the pixels should lie with the size of the file, so that a truncated one is found at once."""
    if None in level.pages:
        raise cannot_read(path, "some of its channels lie in other files; save all of them in one file")
    pages: list[Page] = list(level.pages)
    end = max(int(np.max(np.add(page.dataoffsets, page.databytecounts, dtype=np.int64), initial=0)) for page in pages)
    if level.dataoffset is not None:
        end = max(end, level.dataoffset + level.nbytes)
    if end > file.filehandle.size:
        raise cannot_read(path, f"it is truncated: it has {file.filehandle.size} bytes, its pixels reach to {end}")


def _scaled(spacing: Spacing | None, largest: tuple[int, int], size: tuple[int, int]) -> Spacing | None:
    if spacing is None:
        return None
    return spacing[0] * largest[0] / size[0], spacing[1] * largest[1] / size[1]


def _source(path: Path, level: tifffile.TiffPageSeries, size: tuple[int, int], alpha: Alpha) -> PixelSource:
    pages: list[Page] = list(level.pages)
    page: Page = level.keyframe
    _check_colours(path, page)
    drops_alpha = alpha == "drop" and len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    if drops_alpha:
        warn_of_dropped_alpha(path, page.samplesperpixel)
    is_planar = page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    stored_dtype = page.dtype.newbyteorder(page.parent.byteorder)
    if len(pages) == 1 and level.axes == "CYX" and level.shape[0] > page.samplesperpixel:
        # ImageJ and tifffile may write one directory for all channels
        if level.dataoffset is None:
            raise cannot_read(path, "its channels lie in one compressed page; save each as a page")
        return MappedPixels(path, level.dataoffset, level.shape, stored_dtype, channels_last=False)
    if len(pages) == 1 and _lies_in_one_piece(page) and (is_planar or not drops_alpha):
        channels = page.samplesperpixel - drops_alpha
        shape = size if page.samplesperpixel == 1 else (channels, *size) if is_planar else (*size, channels)
        return MappedPixels(path, pages[0].dataoffsets[0], shape, stored_dtype, channels_last=not is_planar)

    if is_planar:
        if page.photometric not in _GREY_OR_RGB:
            reason = f"{page.photometric.name} colours in separate planes (PlanarConfiguration 2) are not supported"
            raise cannot_read(path, f"{reason}; save it pixel-interleaved")
        open_planes = separate_planes(path, page, page.samplesperpixel - drops_alpha)
    else:
        directories = tuple(_directory(one) for one in pages)
        open_planes = partial(_open_planes, path, directories, drops_alpha, "random" if page.is_tiled else "sequential")
    planes = open_planes()
    for plane in planes:
        # libvips may show more than tifffile: some scanners pad their levels to whole tiles
        if plane.height < size[0] or plane.width < size[1]:
            raise cannot_read(path, f"a level of {size[0]}x{size[1]} holds only {plane.height}x{plane.width} pixels")
    bands = sum(plane.bands for plane in planes)
    reader = TiledPixels if page.is_tiled else DecodedPixels
    return reader(path, (bands, *size), dtype_of(planes[0]), open_planes)


def _check_colours(path: Path, page: Page) -> None:
    """Refuse colours that libvips would hand out as if they were RGB."""
    if page.photometric in _NOT_RGB:
        raise cannot_read(path, f"its colours are {page.photometric.name}; convert it to RGB first")
    if page.photometric == tifffile.PHOTOMETRIC.YCBCR and page.compression != tifffile.COMPRESSION.JPEG:
        raise cannot_read(path, "its colours are YCbCr, which is read from JPEG only; convert it to RGB first")


def _directory(page: Page) -> tuple[int, int]:
    """The page, and the SubIFD of it or -1, by which libvips finds a directory."""
    if len(page.treeindex) == 1:
        return page.treeindex[0], -1
    # tifffile counts the SubIFDs of OME files from 1, so find it by its place among those of its parent
    parent = page.parent.pages[page.treeindex[0]]
    return page.treeindex[0], parent.subifds.index(page.offset)


def _lies_in_one_piece(page: Page) -> bool:
    """True if the pixels lie in the file as a plain array (height, width, samples) or (samples, height, width)."""
    return page.is_memmappable and page.photometric in _GREY_OR_RGB and page.dtype.kind in "uif"


def _open_planes(
    path: Path, directories: tuple[tuple[int, int], ...], drops_alpha: bool, access: str
) -> tuple[pyvips.Image, ...]:
    planes = []
    with kept_out_of_cache():
        for page, subifd in directories:
            # at warnings: libvips counts a tile that fails to decompress, or has no bytes, among them
            image = load(path, access, "warning", page=page, subifd=subifd)
            planes.append(image.extract_band(0, n=image.bands - 1) if drops_alpha else image)
    return tuple(planes)


_MICROMETRES = {
    "nm": 1e-3,
    "µm": 1.0,  # micro sign
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "\\u00b5m": 1.0,  # as ImageJ writes it
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "inch": 25_400.0,
}
_TAG_UNITS = {2: "inch", 3: "cm"}
_PLACEHOLDERS = (1000.0, 25_400.0 / 72)
"""Resolutions that programs write when they know nothing: 1 pixel per mm (libvips), 72 per inch (photo software)."""


def tiff_spacing(file: tifffile.TiffFile) -> Spacing | None:
    """(y, x) of the first image: from OME-XML, Aperio's MPP, or the resolution tags with their or ImageJ's unit."""
    if file.is_ome and file.ome_metadata:
        return _from_ome(file.ome_metadata)
    page = file.pages.first
    if file.is_svs:
        match = re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", page.description)
        return _valid(float(match[1]), float(match[1])) if match else None
    tags = {tag.name: tag.value for tag in page.tags.values()}
    unit = _TAG_UNITS.get(int(tags.get("ResolutionUnit", 2)))
    if file.is_imagej and file.imagej_metadata:
        unit = str(file.imagej_metadata.get("unit", unit)).strip().lower()
    return _from_resolution(tags, unit)


def _from_ome(xml: str) -> Spacing | None:
    pixels = next((node for node in ElementTree.fromstring(xml).iter() if node.tag.endswith("}Pixels")), None)
    if pixels is None:
        return None
    y, x = (
        float(pixels.get(f"PhysicalSize{axis}", "nan"))
        * _MICROMETRES.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
        for axis in "YX"
    )
    return _valid(y, x)


def _from_resolution(tags: Mapping[str, tuple[int, int]], unit: str | None) -> Spacing | None:
    if unit not in _MICROMETRES or "XResolution" not in tags or "YResolution" not in tags:
        return None
    (y_pixels, y_units), (x_pixels, x_units) = tags["YResolution"], tags["XResolution"]
    if not (y_pixels and x_pixels):
        return None
    y, x = (_MICROMETRES[unit] * units / pixels for pixels, units in ((y_pixels, y_units), (x_pixels, x_units)))
    if y == x and any(math.isclose(y, value, rel_tol=1e-4) for value in _PLACEHOLDERS):
        return None
    return _valid(y, x)


def _valid(y: float, x: float) -> Spacing | None:
    return (y, x) if 0 < y < math.inf and 0 < x < math.inf else None
