"""Rasters that GDAL reads, through rasterio, which the extra `geo` brings: JPEG 2000 (Sentinel-2), VRT, NITF, Erdas Imagine."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from widefield.images.formats import (
    Choice,
    Contents,
    ForkSafeLock,
    PerProcess,
    all_named,
    cannot_read,
    check_segment,
    choose_series,
    image_format,
    optional,
)

_ENDINGS = (".jp2", ".j2k", ".vrt", ".ntf", ".img")
_MAGIC = re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51|\s*<VRTDataset|NITF0|EHFA_HEADER_TAG")


@image_format(
    "JPEG 2000, VRT, NITF, Imagine", endings=_ENDINGS, recognises=lambda path, start: bool(_MAGIC.match(start))
)
def open_raster(path: Path, choice: Choice) -> Contents:
    """Open a raster; its overviews are the levels.

    What its mask leaves out comes as the file's value for missing data; if it has none, as NaN in floats and as 0, which counts as
    that value then, in integers.
    """
    rasterio: Any = optional("rasterio", path, "geo")
    with rasterio.open(path) as raster:
        kinds, names, crs, transform = raster.dtypes, raster.descriptions, raster.crs, raster.transform
        last, nodata, factors = raster.colorinterp[-1], raster.nodata, raster.overviews(1)
        flags = rasterio.enums.MaskFlags
        is_masked = flags.per_dataset in raster.mask_flag_enums[0] and flags.alpha not in raster.mask_flag_enums[0]
        check_segment(path, "block", raster.block_shapes[0], np.dtype(kinds[0]).itemsize)
    described = []
    for level in range(1 + len(factors)):
        with _opened(path, level) as raster:
            described.append((raster.count, raster.height, raster.width))
    if len(set(kinds)) > 1 or np.dtype(kinds[0]).kind not in "uif":
        raise cannot_read(path, f"its bands are of type {', '.join(kinds)}; expected integers or floats of one type")
    dtype = np.dtype(kinds[0])
    if is_masked and nodata is None:
        nodata = float("nan") if dtype.kind == "f" else 0
    levels = tuple((height, width) for _, height, width in described)
    choose_series(path, choice.series, [path.name], levels[:1])
    is_map = crs is not None or not transform.is_identity
    return Contents(
        levels=levels,
        pixels=lambda level: RasterPixels(
            PerProcess(partial(_opened, path, level)), described[level], dtype, nodata if is_masked else None
        ),
        channel_names=all_named(names, len(names)),
        has_alpha=not is_map and last == rasterio.enums.ColorInterp.alpha,
        nodata=nodata,
        crs=None if crs is None else crs.to_string(),
        transform=tuple(transform)[:6] if is_map else None,  # type: ignore[arg-type]
    )


def _opened(path: Path, level: int) -> Any:
    import rasterio

    return rasterio.open(path) if level == 0 else rasterio.open(path, overview_level=level - 1)


@dataclass(frozen=True)
class RasterPixels:
    """One level of a raster. A GDAL dataset belongs to one process and one thread at a time."""

    raster: PerProcess
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype
    masked: float | None
    """Value of what the mask of the file leaves out; None if it has no mask."""
    _lock: Any = field(default_factory=ForkSafeLock, repr=False)

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width)."""
        window = ((y, y + height), (x, x + width))
        with self._lock:
            pixels: np.ndarray = self.raster.get().read([channel + 1 for channel in channels], window=window)
            if self.masked is not None:
                pixels[:, self.raster.get().dataset_mask(window=window) == 0] = self.masked
        return pixels
