"""The spacing that a TIFF file states, in micrometres per pixel of its largest level."""

import math
import re
from collections.abc import Mapping
from xml.etree import ElementTree

import tifffile

from widefield.images.pixel_source import Spacing

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
