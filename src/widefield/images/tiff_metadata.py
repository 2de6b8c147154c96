"""Metadata of the images in TIFF files: spacing, names of channels, value of missing pixels, place on the map."""

import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from tifffile import PHOTOMETRIC

from widefield.images.formats import Palette, Pixels, Spacing, Transform, all_named, known, micrometres
from widefield.images.segments import Page

_TAG_UNITS = {2: "inch", 3: "cm"}
_PRINT_DENSITIES = (72, 96, *range(50, 1000, 50), *range(1000, 4801, 200), 120, 144, 180, 360, 720, 1440, 2880)
"""Dots per inch at which pictures are shown or printed; no microscope is so coarse and so round."""

_PIXELS_PER_MM = 25.4
"""Dots per inch that libvips writes where it knows nothing: 1 pixel per mm."""


def spacing(file: tifffile.TiffFile, series: int) -> Spacing | None:
    """(y, x) of an image: from OME-XML, Aperio's MPP, or the resolution tags with their or ImageJ's unit.

    A resolution that is a usual density of print (72, 96, 300 dots per inch and the like) says nothing of a specimen.
    """
    if file.is_ome and file.ome_metadata:
        return _from_ome(file.ome_metadata, series)
    page: Page = file.series[series].keyframe
    if file.is_svs:
        match = re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", file.pages.first.description)
        return known(float(match[1]), float(match[1])) if match else None
    tags = {tag.name: tag.value for tag in page.tags.values()}
    if file.is_imagej and file.imagej_metadata and file.imagej_metadata.get("unit"):
        return _from_resolution(tags, str(file.imagej_metadata["unit"]))
    said = _from_resolution(tags, _TAG_UNITS.get(int(tags.get("ResolutionUnit", 2))))
    if said is None:
        return None
    densities = [25_400 / value for value in said]
    if any(
        all(math.isclose(d, usual, rel_tol=2e-3) for d in densities) for usual in (*_PRINT_DENSITIES, _PIXELS_PER_MM)
    ):
        return None
    return said


def _ome_pixels(xml: str, series: int) -> ElementTree.Element | None:
    nodes = [node for node in ElementTree.fromstring(xml).iter() if node.tag.endswith("}Pixels")]
    return nodes[series] if series < len(nodes) else None


def _from_ome(xml: str, series: int) -> Spacing | None:
    pixels = _ome_pixels(xml, series)
    if pixels is None:
        return None
    y, x = (
        micrometres(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")) for axis in "YX"
    )
    return known(y, x)


def _from_resolution(tags: dict[str, Any], unit: str | None) -> Spacing | None:
    if "XResolution" not in tags or "YResolution" not in tags:
        return None
    (y_pixels, y_units), (x_pixels, x_units) = tags["YResolution"], tags["XResolution"]
    if not (y_pixels and x_pixels):
        return None
    return known(micrometres(y_units / y_pixels, unit), micrometres(x_units / x_pixels, unit))


def channel_names(file: tifffile.TiffFile, series: int, pixels: Pixels) -> tuple[str, ...] | None:
    """Names of all channels of an image: from OME-XML, or GDAL's descriptions of bands. None unless all have one."""
    if file.is_ome and file.ome_metadata:
        node = _ome_pixels(file.ome_metadata, series)
        names = [] if node is None else [one.get("Name") for one in node if one.tag.endswith("}Channel")]
    elif file.series[series].keyframe.tags.valueof(42112):
        items = ElementTree.fromstring(file.series[series].keyframe.tags.valueof(42112)).iter("Item")
        described = {int(one.get("sample", 0)): one.text for one in items if one.get("role") == "description"}
        names = [described.get(channel) for channel in range(pixels.shape[0])]
    else:
        return None
    return all_named(names, pixels.shape[0])


def shown_nodata(page: Page, palette: Palette) -> float | None:
    """The value of missing pixels after the conversion of colours; None of the colours of palettes, where it is an index."""
    value = nodata(page)
    is_index = page.photometric == PHOTOMETRIC.PALETTE and palette == "colours"
    if value is None or is_index or page.photometric == PHOTOMETRIC.SEPARATED:
        return None
    is_inverted = page.photometric == PHOTOMETRIC.MINISWHITE and page.dtype.kind in "ub"
    return 2**page.bitspersample - 1 - value if is_inverted else value


def nodata(page: Page) -> float | None:
    """The value of missing pixels as they are stored, of GDAL's tag."""
    try:
        return float(str(page.tags.valueof(42113)).strip("\0 "))
    except ValueError:  # no such tag, or no number in it
        return None


def georeference(page: Page) -> tuple[str | None, Transform | None]:
    """CRS and transform of a GeoTIFF; the CRS only where it is one of EPSG's.

    The tags are those of the GeoTIFF standard, OGC 19-008r4: ModelPixelScale and ModelTiepoint, or ModelTransformation; a raster
    whose coordinates are those of the centres of pixels (RasterType 2) is moved by half a pixel.
    """
    scale, ties, matrix = (page.tags.valueof(code) for code in (33550, 33922, 34264))
    if matrix is not None and len(matrix) == 16:
        a, b, c, d, e, f = (float(matrix[k]) for k in (0, 1, 3, 4, 5, 7))
    elif scale is not None and ties is not None and len(scale) >= 2 and len(ties) == 6:
        a, b, d, e = float(scale[0]), 0.0, 0.0, -float(scale[1])
        c, f = float(ties[3]) - float(ties[0]) * a, float(ties[4]) - float(ties[1]) * e
    else:
        return None, None
    keys = np.reshape(page.tags.valueof(34735, ())[4:], (-1, 4)) if page.tags.valueof(34735) else np.empty((0, 4), int)
    values = {int(key): int(value) for key, place, _, value in keys if place == 0}
    if values.get(1025) == 2:
        c, f = c - (a + b) / 2, f - (d + e) / 2
    is_projected = values.get(1024) == 1  # from a geographic CRS, which 2048 names and which is not the map's
    code = values.get(3072) if is_projected else values.get(3072) or values.get(2048)
    return f"EPSG:{code}" if code is not None and code < 32767 else None, (a, b, c, d, e, f)
