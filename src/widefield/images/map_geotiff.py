"""Maps of the earth as cloud optimized GeoTIFF, through rasterio, which the extra `geo` brings."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from widefield.errors import MissingExtraError, WrongArgumentError
from widefield.images.map_target import CHUNK, Bands, Place, WrittenMap, channels_first, rows_of_band
from widefield.writing import replacing

_CACHE = 16 * 2**20
"""Bytes of blocks that GDAL keeps in memory; by default it would take a share of all memory."""


def import_rasterio(feature: str) -> Any:
    """Return the module rasterio. Raises MissingExtraError if it is not installed, which `feature` needs."""
    try:
        import rasterio
        import rasterio.features
        import rasterio.shutil
    except ModuleNotFoundError as error:
        raise MissingExtraError(feature, "rasterio", "geo") from error
    return rasterio


@contextmanager
def geotiff(path: Path, maps: Sequence[WrittenMap], places: Sequence[Place]) -> Iterator[list[Bands]]:
    """Write a cloud optimized GeoTIFF of one map, with the CRS of the image and a pixel for each cell."""
    rasterio = import_rasterio("a map with a place on the earth (GeoTIFF)")
    (written,), (place,) = maps, places
    with replacing(path) as partial, gdal_raster(path, written, place) as (raster, bands):
        yield [bands]
        with written_by_gdal(path):
            raster.close()
            layout = {"BLOCKSIZE": CHUNK, "COMPRESS": "DEFLATE", "PREDICTOR": "YES", "BIGTIFF": "IF_SAFER"}
            overviews = {"OVERVIEW_RESAMPLING": "NEAREST" if written.labels else "AVERAGE"}
            rasterio.shutil.copy(raster.name, partial, driver="COG", **layout, **overviews)


@contextmanager
def gdal_raster(path: Path, written: WrittenMap, place: Place | None) -> Iterator[tuple[Any, Bands]]:
    """A raster of a map in a temporary folder beside `path`, and the bands in which it takes the map."""
    rasterio = import_rasterio("a map that GDAL writes")
    (channels, height, width), rows = channels_first(written), rows_of_band(written.row_bytes)
    if not rasterio.dtypes.check_dtype(written.dtype) or written.dtype == np.float16:
        raise WrongArgumentError(f"{path} cannot hold {written.dtype}; give dtype='float32', or another that GDAL has")
    shape = {"count": channels, "height": height, "width": width, "dtype": written.dtype}
    layout = {"tiled": True, "blockxsize": CHUNK, "blockysize": rows, "compress": "deflate", "zlevel": 1}
    layout |= {"bigtiff": "yes", "sparse_ok": True, "interleave": "band"}
    where = {}
    if place is not None and place.transform is not None:
        where = {"crs": place.crs, "transform": rasterio.Affine(*place.transform)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial") as folder,
        rasterio.Env(GDAL_CACHEMAX=_CACHE),
    ):
        with written_by_gdal(path):
            raster = open_raster(Path(folder) / "map.tif", "w", driver="GTiff", **shape, **layout, **where)

        def put(number: int, band: np.ndarray | None) -> None:
            if band is not None:
                with written_by_gdal(path):
                    raster.write(band, window=((number * rows, number * rows + band.shape[1]), (0, width)))

        try:
            yield raster, Bands((channels, height, width), written.dtype, rows, put)
        finally:
            with suppress(Exception):  # what it could not write was said before
                raster.close()


def open_raster(*arguments: Any, **options: Any) -> Any:
    """`rasterio.open`, without a warning where a raster has no place on the earth."""
    rasterio = import_rasterio("a map that GDAL writes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(*arguments, **options)


@contextmanager
def written_by_gdal(path: Path) -> Iterator[None]:
    """Errors of GDAL, which have classes of its own, become OSErrors that name `path`."""
    rasterio = import_rasterio("a map that GDAL writes")
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise OSError(f"cannot write {path}: {error}") from error
