"""TIFF and BigTIFF files: tifffile tells their structure (headers only), libvips decodes their pixels."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import tifffile

from widefield.images.decoded import DecodedPixels
from widefield.images.errors import cannot_read
from widefield.images.numpy_map import MappedPixels
from widefield.images.source import OpenedLevel, PixelSource, Spacing, check_level
from widefield.images.spacing import tiff_spacing
from widefield.images.tiled import TiledPixels
from widefield.images.vips import dtype_of, kept_out_of_cache, load

_ONE_IMAGE = ("YX", "YXS", "SYX", "CYX")
"""Axes of a series that is one image: Y rows, X columns, S samples of a pixel, C channels with a page each."""

_ALPHA = (tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA)

Page = Any
"""tifffile's TiffPage, or the TiffFrame that stands for a page like the one before it and lacks some of its types."""


def open_tiff(path: Path, level: int) -> OpenedLevel:
    """Open one level of the first image in a TIFF file; see `open_image` for the errors."""
    try:
        file = tifffile.TiffFile(path, _multifile=False)
    except Exception as error:  # tifffile raises whatever a damaged header leads it to
        raise _damaged(path, error) from error
    with file:
        try:
            series = file.series[0]
            levels = tuple(_size(one) for one in series.levels)
            spacing = tiff_spacing(file)
            complete = _is_complete(file)
        except Exception as error:
            raise _damaged(path, error) from error
        if not complete:
            raise cannot_read(path, "it is truncated: its list of pages leads beyond the end of the file")
        _check_is_one_image(path, file, series)
        check_level(level, levels, path)
        pages = tuple(series.levels[level].pages)
        if None in pages:
            raise cannot_read(path, "some of its channels lie in other files; save all of them in one file")
        _check_holds_pixels(path, file, pages)
        return OpenedLevel(levels, _scaled(spacing, levels[0], levels[level]), _source(path, pages, levels[level]))


def _damaged(path: Path, error: Exception) -> OSError:
    return cannot_read(path, f"its TIFF structure is truncated or damaged ({type(error).__name__}: {error})")


def _size(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    shape = dict(zip(series.axes, series.shape, strict=True))
    return shape.get("Y", 1), shape.get("X", 1)


def _is_complete(file: tifffile.TiffFile) -> bool:
    """Whether all pages and SubIFDs can be reached; tifffile drops those that it cannot, with a log line only."""
    first: Page = file.pages.first
    for index in range(len(first.subifds or ())):
        first.pages[index]  # raises if it is damaged
    position = file.pages.next_page_offset
    if position is None:
        return False
    file.filehandle.seek(position)
    return not any(file.filehandle.read(file.tiff.offsetsize))


def _check_is_one_image(path: Path, file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    if file.is_ndpi:
        raise cannot_read(path, "NDPI files are not supported; convert it to a tiled TIFF")
    if series.axes not in _ONE_IMAGE:
        shape = " x ".join(f"{length} {axis}" for axis, length in zip(series.axes, series.shape, strict=True))
        raise cannot_read(path, f"it holds a stack ({shape}), not one image; save the page that you need as a file")


def _check_holds_pixels(path: Path, file: tifffile.TiffFile, pages: tuple[Page, ...]) -> None:
    """Compare where the pixels should lie with the size of the file, so that a truncated one is found at once."""
    end = max(int(np.max(np.add(page.dataoffsets, page.databytecounts, dtype=np.int64), initial=0)) for page in pages)
    if end > file.filehandle.size:
        raise cannot_read(path, f"it is truncated: it has {file.filehandle.size} bytes, its pixels reach to {end}")


def _scaled(spacing: Spacing | None, largest: tuple[int, int], size: tuple[int, int]) -> Spacing | None:
    if spacing is None:
        return None
    return spacing[0] * largest[0] / size[0], spacing[1] * largest[1] / size[1]


def _source(path: Path, pages: tuple[Page, ...], size: tuple[int, int]) -> PixelSource:
    page = pages[0]
    has_alpha = len(page.extrasamples) == 1 and page.extrasamples[0] in _ALPHA
    if len(pages) == 1 and not has_alpha and _lies_in_one_piece(page):
        stored_shape = size if page.samplesperpixel == 1 else (*size, page.samplesperpixel)
        stored_dtype = page.dtype.newbyteorder(page.parent.byteorder)
        return MappedPixels(path, page.dataoffsets[0], stored_shape, stored_dtype, channels_last=True)

    if page.is_tiled and page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        raise cannot_read(path, "its channels lie in separate tiles (PlanarConfiguration 2); save it pixel-interleaved")
    directories = tuple(_directory(one) for one in pages)
    access = "random" if page.is_tiled else "sequential"
    open_planes = partial(_open_planes, path, directories, has_alpha, access)
    planes = open_planes()
    for plane in planes:
        # libvips may show more than tifffile: some scanners pad their levels to whole tiles
        if plane.height < size[0] or plane.width < size[1]:
            raise cannot_read(path, f"a level of {size[0]}x{size[1]} holds only {plane.height}x{plane.width} pixels")
    shape = (sum(plane.bands for plane in planes), *size)
    reader = TiledPixels if page.is_tiled else DecodedPixels
    return reader(path, shape, dtype_of(planes[0]), open_planes)


def _directory(page: Page) -> tuple[int, int]:
    """The page, and the SubIFD of it or -1, by which libvips finds a directory."""
    if len(page.treeindex) == 1:
        return page.treeindex[0], -1
    # tifffile counts the SubIFDs of OME files from 1, so find it by its place among those of its parent
    parent = page.parent.pages[page.treeindex[0]]
    return page.treeindex[0], parent.subifds.index(page.offset)


def _lies_in_one_piece(page: Page) -> bool:
    """Whether the pixels lie in the file as a plain array (height, width, samples)."""
    return (
        page.is_memmappable
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
        and page.dtype.kind in "uif"
    )


def _open_planes(
    path: Path, directories: tuple[tuple[int, int], ...], has_alpha: bool, access: str
) -> tuple[pyvips.Image, ...]:
    planes = []
    with kept_out_of_cache():
        for page, subifd in directories:
            # at warnings: libvips counts a tile that fails to decompress, or has no bytes, among them
            image = load(path, access, "warning", page=page, subifd=subifd)
            planes.append(image.extract_band(0, n=image.bands - 1) if has_alpha else image)
    return tuple(planes)
