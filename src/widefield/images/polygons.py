"""Polygons of label maps, as GeoJSON for QuPath or for geographic information systems, by GDAL (the extra `geo`)."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from widefield.errors import WrongArgumentError
from widefield.images.formats import Transform, strips
from widefield.images.image import ImageFile, open_image
from widefield.images.map_geotiff import gdal_raster, import_rasterio, open_raster, written_by_gdal
from widefield.images.map_target import Bands, Place, WrittenMap, channels_first
from widefield.writing import replacing

_TYPES = ("uint8", "int8", "uint16", "int16", "int32")


def polygons(
    labels: Path | str | ImageFile | np.ndarray,
    to: Path | str,
    *,
    image: ImageFile | None = None,
    names: Mapping[int, str] | Sequence[str] | None = None,
) -> Path:
    """Write the outlines of a label map as GeoJSON: a polygon for each region of pixels of one label that share edges.

    The map is read row by row; a region is one polygon however large it is. 0, and what is below, is background
    and has none. Whole or not at all.

    Args:
        labels: A label map on disk, as `StreamingCNN.write` writes one, opened or not; or an array (height, width).
        to: The file.
        image: The image that the labels are of: coordinates are then pixels of its largest level, (x, y) from its corner, as QuPath
            has them. None: pixels of the label map. Where the label map has a place on the earth, they are those of its CRS.
        names: Name of each label; by default "label 1" and so on.

    Returns:
        The path of the file.

    Raises:
        MissingExtraError: rasterio is not installed.
        ValueError: It is no map of one channel of whole numbers of at most 32 bits.
        ImageReadError: The map cannot be read.

    Examples:
        >>> labels = np.zeros((64, 64), np.uint8)
        >>> labels[10:20, 30:50] = 1
        >>> polygons(labels, "cells.geojson", names={1: "cell"}).name
        'cells.geojson'
    """
    to = Path(to)
    opened = labels if isinstance(labels, ImageFile) else open_image(labels)
    channels, height, width = opened.shape
    if channels != 1:
        raise WrongArgumentError(
            f"labels of shape {opened.shape}; expected one channel: (height, width), or a file of it"
        )
    stride = _pixel(opened, image)
    written = _Labels("", (height, width), opened.dtype, stride)
    place = Place.of(image, written.origin, stride)
    if opened.transform is not None:
        place = Place.of(opened, (0.0, 0.0), (1.0, 1.0))
    with _polygons_file(to, written, place, names) as bands:
        for y, rows in strips(opened):
            bands.write(y, 0, opened.read(y, 0, rows, width))
            bands.rows_done(y + rows)
    return to


@contextmanager
def polygons_of_tiles(path: Path, maps: Sequence[WrittenMap], places: Sequence[Place]) -> Iterator[list[Bands]]:
    """Write the outlines of one label map that is being computed; see `polygons`."""
    with _polygons_file(path, maps[0], places[0], None) as bands:
        yield [bands]


@dataclass(frozen=True)
class _Labels:
    """A label map that is there already, see `WrittenMap`."""

    name: str
    shape: tuple[int, int]
    dtype: np.dtype
    stride: tuple[float, float]
    labels: bool = True

    @property
    def origin(self) -> tuple[float, float]:
        """Its corner is that of the image."""
        return (self.stride[0] - 1) / 2, (self.stride[1] - 1) / 2

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.dtype.itemsize


def _pixel(labels: ImageFile, image: ImageFile | None) -> tuple[float, float]:
    """Return the height and width of a pixel of `labels` in pixels of `image`: by their spacings, or else by their sizes."""
    if image is None:
        return 1.0, 1.0
    if labels.spacing is not None and image.spacing is not None:
        return labels.spacing[0] / image.spacing[0], labels.spacing[1] / image.spacing[1]
    return image.shape[1] / labels.shape[1], image.shape[2] / labels.shape[2]


@contextmanager
def _polygons_file(
    path: Path, written: WrittenMap, place: Place, names: Mapping[int, str] | Sequence[str] | None
) -> Iterator[Bands]:
    rasterio = import_rasterio("polygons of a label map")
    if channels_first(written)[0] != 1 or written.dtype.name not in _TYPES:
        raise WrongArgumentError(
            f"polygons need a map of one channel, whose whole numbers are labels ({', '.join(_TYPES)}): got {written.dtype} of "
            f"shape {written.shape}; with write(), give postprocess='argmax' or a threshold"
        )
    to = place.to_largest if place.transform is None else place.transform
    with replacing(path) as partial, gdal_raster(path, written, None) as (raster, bands):
        yield bands
        with written_by_gdal(path):
            raster.close()
            with open_raster(raster.name) as source, open_raster(_as_bytes(source)) as positive:
                shapes = rasterio.features.shapes(rasterio.band(source, 1), mask=rasterio.band(positive, 1))
                _write(partial, _features(shapes, to, names), place.crs if place.transform is not None else None)


def _as_bytes(raster: Any) -> str:
    """Return a virtual raster of the same values as bytes, greater ones as 255 and negative ones as 0, as rasterio has a mask."""
    return (
        f'<VRTDataset rasterXSize="{raster.width}" rasterYSize="{raster.height}"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{escape(raster.name)}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )


def _features(
    shapes: Iterator[tuple[dict[str, Any], float]], to: Transform, names: Mapping[int, str] | Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    a, b, c, d, e, f = to
    for shape, value in shapes:
        label = int(value)
        known = names is not None and (label in names if isinstance(names, Mapping) else 0 <= label < len(names))
        rings = [
            [[round(a * x + b * y + c, 6), round(d * x + e * y + f, 6)] for x, y in ring]
            for ring in shape["coordinates"]
        ]
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": names[label] if names is not None and known else f"label {label}"},
                "label": label,
            },
        }


def _write(path: Path, features: Iterator[dict[str, Any]], crs: str | None) -> None:
    """Write a FeatureCollection, a feature a line. That of a CRS has the member `crs`, which GDAL and QGIS read."""
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection",')
        if crs is not None:
            name = re.sub(r"^EPSG:(\d+)$", r"urn:ogc:def:crs:EPSG::\1", crs)
            file.write(f' "crs": {json.dumps({"type": "name", "properties": {"name": name}})},')
        file.write(' "features": [')
        for number, feature in enumerate(features):
            file.write(("," if number else "") + "\n" + json.dumps(feature, ensure_ascii=False))
        file.write("\n]}\n")
