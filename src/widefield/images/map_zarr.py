"""Maps as OME-Zarr with a pyramid, or as plain Zarr arrays."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from widefield.images.map_target import (
    CHUNK,
    Bands,
    Place,
    WrittenMap,
    channels_first,
    level_shapes,
    pyramid,
    rows_of_band,
)
from widefield.writing import replacing_folder


@contextmanager
def ome_zarr(
    path: Path, maps: Sequence[WrittenMap], places: Sequence[Place], version: str = "0.5"
) -> Iterator[list[Bands]]:
    """Write OME-Zarr 0.5 or 0.4 with a pyramid: an image (c, y, x), of several maps one for each in a group of its name.

    The translation of a level is the distance of the middle of its first pixel from that of the image's.
    """
    import zarr  # slow to import

    with replacing_folder(path) as partial:
        root = zarr.open_group(partial, mode="w", zarr_format=2 if version == "0.4" else 3)
        yield [
            _multiscale(root.create_group(each.name) if len(maps) > 1 else root, each, place)
            for each, place in zip(maps, places, strict=True)
        ]


def _multiscale(group: Any, written: WrittenMap, place: Place) -> Bands:
    shapes, rows = level_shapes(channels_first(written)), rows_of_band(written.row_bytes)
    arrays = [_array(group, str(level), shape, written.dtype, rows) for level, shape in enumerate(shapes)]
    spacing, origin = (
        (place.spacing, place.origin) if place.spacing and place.origin else (written.stride, written.origin)
    )
    unit = {"unit": "micrometer"} if place.spacing else {}
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space", **unit} for name in "yx")]
    datasets = []
    for level in range(len(shapes)):
        factor = 2**level
        # the first pixel of a mean covers so many more of the largest level, the first of every second pixel is the same
        shift = 0.0 if written.labels else (factor - 1) / 2
        scale = [1.0, *(step * factor for step in spacing)]
        translation = [0.0, *(at + step * shift for at, step in zip(origin, spacing, strict=True))]
        steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    described = {"name": written.name or "map", "axes": axes, "datasets": datasets}
    described["type"] = "nearest" if written.labels else "mean"
    if group.metadata.zarr_format == 2:
        group.attrs["multiscales"] = [{"version": "0.4", **described}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [described]}
    _locate(group, place)
    return pyramid(shapes, written.dtype, rows, written.labels, lambda level, *band: _put(arrays[level], rows, *band))


@contextmanager
def plain_zarr(path: Path, maps: Sequence[WrittenMap], places: Sequence[Place]) -> Iterator[list[Bands]]:
    """Write a Zarr array (c, y, x), of several maps one for each in a group, by name."""
    import zarr  # slow to import

    with replacing_folder(path) as partial:
        group = zarr.open_group(partial, mode="w", zarr_format=3) if len(maps) > 1 else None
        yield [
            _plain(partial if group is None else group, each, place) for each, place in zip(maps, places, strict=True)
        ]


def _plain(where: Any, written: WrittenMap, place: Place) -> Bands:
    shape, rows = channels_first(written), rows_of_band(written.row_bytes)
    array = _array(where, written.name, shape, written.dtype, rows)
    if place.spacing is not None:
        array.attrs["spacing_micrometers"] = list(place.spacing)
    _locate(array, place)
    return Bands(shape, written.dtype, rows, lambda *band: _put(array, rows, *band))


def _array(where: Any, name: str, shape: tuple[int, int, int], dtype: np.dtype, rows: int) -> Any:
    import zarr

    options: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "chunks": (1, min(rows, shape[1]), min(CHUNK, shape[2])),
        "fill_value": 0,
    }
    if not isinstance(where, Path) and where.metadata.zarr_format == 2:
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
    else:
        options["dimension_names"] = ("c", "y", "x")
    if isinstance(where, Path):
        return zarr.create_array(where, overwrite=True, zarr_format=3, **options)
    return where.create_array(name, **options)


def _locate(node: Any, place: Place) -> None:
    if place.transform is not None:
        node.attrs["crs"], node.attrs["transform"] = place.crs, list(place.transform)


def _put(array: Any, rows: int, number: int, band: np.ndarray | None) -> None:
    """Write a band, without the chunks of zeros alone.

    One chunk at a time: of several, zarr would still be writing some when another has failed, and its folder is removed.
    """
    if band is None:
        return
    top = number * rows
    for channel, plane in enumerate(band):
        for left in range(0, plane.shape[1], CHUNK):
            chunk = plane[:, left : left + CHUNK]
            if chunk.any():
                array[channel, top : top + chunk.shape[0], left : left + chunk.shape[1]] = chunk
