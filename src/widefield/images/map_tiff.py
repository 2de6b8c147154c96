"""Maps as pyramidal OME-TIFF, or as a tiled BigTIFF of one level."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from widefield.errors import WrongArgumentError
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
from widefield.writing import replacing

_OME_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
_NARROWED = ("int64", "uint64")
"""Types of labels that OME-TIFF does not have: the smallest one that holds what was written takes their place."""


class _Spool:
    """Encoded tiles in a file without a name, until a TIFF file takes them in its order: channel by channel, level by level."""

    def __init__(self, folder: Path, shapes: Sequence[tuple[int, int, int]], dtype: np.dtype, rows: int) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".widefield-")  # noqa: SIM115
        self._shapes, self._dtype, self._rows = shapes, dtype, rows
        counts = [(channels, -(-height // rows), -(-width // CHUNK)) for channels, height, width in shapes]
        self._at = [np.zeros((*count, 2), np.int64) for count in counts]  # position and size; size 0: nothing but zeros
        self._low = self._high = 0
        self.dtype = np.dtype(np.uint8) if dtype.name in _NARROWED else dtype  # of the file

    def put(self, level: int, number: int, band: np.ndarray | None) -> None:
        """Take a band of a level; None: it is zero."""
        if band is None:
            return
        for channel, plane in enumerate(band):
            for column in range(self._at[level].shape[2]):
                tile = plane[:, column * CHUNK : (column + 1) * CHUNK]
                if not tile.any():
                    continue
                if self._dtype.name in _NARROWED:
                    self._low, self._high = min(self._low, int(tile.min())), max(self._high, int(tile.max()))
                    self.dtype = _narrowest(self._low, self._high)
                if tile.shape != (self._rows, CHUNK):
                    whole = np.zeros((self._rows, CHUNK), self._dtype)
                    whole[: tile.shape[0], : tile.shape[1]] = tile
                    tile = whole
                data = _encoded(tile)
                self._at[level][channel, number, column] = self._file.tell(), len(data)
                self._file.write(data)

    def tiles(self, level: int) -> Iterator[bytes]:
        """The encoded tiles of a level in the type of the file, in the order of a TIFF file."""
        blank = _encoded(np.zeros((self._rows, CHUNK), self.dtype))
        for start, size in self._at[level].reshape(-1, 2):
            if not size:
                yield blank
                continue
            self._file.seek(start)
            data = self._file.read(size)
            if self.dtype != self._dtype:
                data = _encoded(np.frombuffer(imagecodecs.deflate_decode(data), self._dtype).astype(self.dtype))
            yield data

    def close(self) -> None:
        self._file.close()


def _narrowest(low: int, high: int) -> np.dtype:
    """Return the smallest type of an OME-TIFF that holds labels from `low` to `high`.

    Raises:
        WrongArgumentError: None does.
    """
    found = np.result_type(np.min_scalar_type(low), np.min_scalar_type(high))
    if found.kind not in "ui" or found.itemsize > 4:
        raise WrongArgumentError(
            f"an OME-TIFF holds labels of up to 32 bits, and there are some from {low} to {high}; write a .tif or .zarr, which "
            "hold 64 bits, or smaller labels"
        )
    return found


def _encoded(tile: np.ndarray) -> bytes:
    return bytes(imagecodecs.deflate_encode(tile.tobytes(), level=1))


@contextmanager
def ome_tiff(path: Path, maps: Sequence[WrittenMap], places: Sequence[Place]) -> Iterator[list[Bands]]:
    """Write a pyramidal OME-TIFF of one map, a page for each channel; labels of 64 bits in the smallest type that holds them."""
    (written,), (place,) = maps, places
    shape = channels_first(written)
    if written.dtype.name not in (*_OME_TYPES, *_NARROWED):
        raise WrongArgumentError(
            f"an OME-TIFF cannot hold {written.dtype}: give dtype='float32', which holds all of its values, or another of "
            f"{', '.join(_OME_TYPES)}"
        )
    metadata: dict[str, Any] = {"axes": "CYX" if shape[0] > 1 else "YX"}
    if place.spacing is not None and place.origin is not None:
        metadata |= {"PhysicalSizeY": place.spacing[0], "PhysicalSizeX": place.spacing[1]}
        metadata |= {"PhysicalSizeYUnit": "µm", "PhysicalSizeXUnit": "µm"}
        plane: dict[str, Any] = {"PositionY": [place.origin[0]] * shape[0], "PositionX": [place.origin[1]] * shape[0]}
        metadata["Plane"] = plane | {"PositionYUnit": ["µm"] * shape[0], "PositionXUnit": ["µm"] * shape[0]}
    with _tiff(path, level_shapes(shape), written, place, metadata) as bands:
        yield bands


@contextmanager
def plain_tiff(path: Path, maps: Sequence[WrittenMap], places: Sequence[Place]) -> Iterator[list[Bands]]:
    """Write a tiled BigTIFF of one map without a pyramid, a page for each channel."""
    (written,), (place,) = maps, places
    with _tiff(path, [channels_first(written)], written, place, None) as bands:
        yield bands


@contextmanager
def _tiff(
    path: Path,
    shapes: Sequence[tuple[int, int, int]],
    written: WrittenMap,
    place: Place,
    metadata: dict[str, Any] | None,
) -> Iterator[list[Bands]]:
    rows = rows_of_band(written.row_bytes)
    with replacing(path) as partial:
        spool = _Spool(path.parent, shapes, written.dtype, rows)
        try:
            yield [pyramid(shapes, written.dtype, rows, written.labels, spool.put)]
            with tifffile.TiffWriter(partial, ome=metadata is not None, bigtiff=True) as file:
                for level, shape in enumerate(shapes):
                    options: dict[str, Any] = {"subfiletype": 1} if level else {"subifds": len(shapes) - 1}
                    options["metadata"] = None if level else metadata
                    if place.spacing is not None:
                        per_cm = [1e4 / step / 2**level for step in place.spacing]
                        options |= {"resolution": (per_cm[1], per_cm[0]), "resolutionunit": "CENTIMETER"}
                    layout: dict[str, Any] = {"tile": (rows, CHUNK), "compression": "zlib", "photometric": "minisblack"}
                    if shape[0] > 1 and metadata is None:
                        layout["planarconfig"] = "separate"
                        if shape[0] == 3 and spool.dtype in (np.uint8, np.uint16):
                            layout["photometric"] = "rgb"
                    pages = shape if shape[0] > 1 else shape[1:]
                    file.write(spool.tiles(level), shape=pages, dtype=spool.dtype, **layout, **options)
        finally:
            spool.close()
        with partial.open("rb+") as done:
            os.fsync(done.fileno())
