"""Files of maps that a network computes, written row by row: which format, where a map lies, and rows of chunks of a pyramid.

The engine gives tiles in rows (`StreamingCNN.write`); what is here puts them together to bands, whole rows of chunks, so that no
map is in memory as a whole.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from widefield.errors import WrongArgumentError
from widefield.images.formats import Spacing, Transform
from widefield.images.image import scaled

CHUNK = 256
"""Columns of a chunk or tile, and its rows unless a band of so many would be large."""
_BAND_BYTES = 64 * 2**20
_LEAST_ROWS = 32


class WrittenMap(Protocol):
    """A map that is written, as the engine describes it, see `widefield.streaming.map_writing.WrittenMap`."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def labels(self) -> bool: ...
    @property
    def origin(self) -> tuple[float, float]: ...
    @property
    def stride(self) -> tuple[float, float]: ...
    @property
    def row_bytes(self) -> int: ...


@dataclass(frozen=True)
class Place:
    """The place of a map: that of the image, with pixels as large as the cells of the map.

    Attributes:
        spacing: Micrometres per pixel of the map, (y, x); None if that of the image is not known.
        origin: Micrometres from the middle of the first pixel of the image to that of the map, (y, x); None if not known.
        crs: Coordinate reference system of a map of the earth; None if there is none.
        transform: Of the map's pixels, see `ImageFile`; None if the image is no map of the earth.
        to_largest: (a, 0, c, 0, e, f): a corner (x, y) of the map's pixels lies at (a x + c, e y + f) of the image's largest level.
    """

    spacing: Spacing | None
    origin: Spacing | None
    crs: str | None
    transform: Transform | None
    to_largest: Transform

    @classmethod
    def of(cls, image: Any, origin: tuple[float, float], stride: tuple[float, float]) -> "Place":
        """Return the place of a map whose first pixel lies at `origin`, in pixels of the image from the middle of its first.

        Args:
            image: An `ImageFile`, or anything else, of which no place is known.
            origin: (y, x).
            stride: (down, across), the distance of two pixels of the map in pixels of the image.
        """
        top, left = (at + 0.5 - step / 2 for at, step in zip(origin, stride, strict=True))
        spacing, transform = getattr(image, "spacing", None), getattr(image, "transform", None)
        levels = getattr(image, "levels", None)
        finer = (1.0, 1.0) if levels is None else tuple(levels[0][k] / image.shape[1 + k] for k in (0, 1))
        to_largest = (stride[1] * finer[1], 0.0, left * finer[1], 0.0, stride[0] * finer[0], top * finer[0])
        if transform is not None:
            a, b, c, d, e, f = transform
            transform = scaled((a, b, a * left + b * top + c, d, e, d * left + e * top + f), *stride)
        return cls(
            spacing and (spacing[0] * stride[0], spacing[1] * stride[1]),
            spacing and (spacing[0] * origin[0], spacing[1] * origin[1]),
            getattr(image, "crs", None),
            transform,
            to_largest,
        )


class Bands:
    """Tiles of a map (channels, height, width), put together to bands of so many `rows`, which are given one after the other.

    Args:
        shape: Of the map.
        dtype: Of the map.
        rows: Of a band; the last has as many as are left.
        give: Called with the number of each band in turn, and the band (channels, rows, width), or None if it had no tile.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: np.dtype, rows: int, give: Callable[[int, np.ndarray | None], None]
    ) -> None:
        self.shape, self.dtype, self.rows, self._give = shape, dtype, rows, give
        self._bands: dict[int, np.ndarray] = {}
        self._next = 0

    def write(self, y: int, x: int, tile: np.ndarray) -> None:
        """Take a tile (channels, height, width) whose corner is at (y, x)."""
        channels, height, width = self.shape
        for number in range(y // self.rows, -(-(y + tile.shape[1]) // self.rows)):
            top = number * self.rows
            if number not in self._bands:
                self._bands[number] = np.zeros((channels, min(self.rows, height - top), width), self.dtype)
            first, stop = max(y, top), min(y + tile.shape[1], top + self.rows)
            self._bands[number][:, first - top : stop - top, x : x + tile.shape[2]] = tile[:, first - y : stop - y]

    def rows_done(self, y: int) -> None:
        """Give the bands above row `y`, for which no tile will come any more."""
        while min((self._next + 1) * self.rows, self.shape[1]) <= y and self._next * self.rows < self.shape[1]:
            number = self._next
            self._next += 1
            self._give(number, self._bands.pop(number, None))

    def finish(self) -> None:
        """Give all bands that are left."""
        self.rows_done(self.shape[1])


def level_shapes(shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Return the shapes (channels, height, width) of a pyramid: halves, rounded up, until one fits a chunk."""
    shapes = [shape]
    while max(shapes[-1][1:]) > CHUNK:
        channels, height, width = shapes[-1]
        shapes.append((channels, -(-height // 2), -(-width // 2)))
    return shapes


def pyramid(
    shapes: Sequence[tuple[int, int, int]],
    dtype: np.dtype,
    rows: int,
    labels: bool,
    give: Callable[[int, int, np.ndarray | None], None],
    level: int = 0,
) -> Bands:
    """Return the bands of the largest of several levels; each band is also halved, and so goes through the smaller levels.

    Args:
        shapes: See `level_shapes`.
        dtype: Of the map.
        rows: Of a band, an even number.
        labels: Take every second pixel, rather than the mean of 2 x 2.
        give: Called with a level, and the number and the pixels of a band of it, see `Bands`.
        level: Number of the largest level.
    """
    smaller = pyramid(shapes[1:], dtype, rows, labels, give, level + 1) if len(shapes) > 1 else None

    def pass_on(number: int, band: np.ndarray | None) -> None:
        give(level, number, band)
        if smaller is not None:
            if band is not None:
                smaller.write(number * rows // 2, 0, halved(band, labels))
            smaller.rows_done(-(-min((number + 1) * rows, shapes[0][1]) // 2))

    return Bands(shapes[0], dtype, rows, pass_on)


def halved(band: np.ndarray, labels: bool) -> np.ndarray:
    """Return every second pixel of `labels`, or else means of 2 x 2; the last row and column of odd sizes count twice."""
    if labels:
        return band[:, ::2, ::2]
    _, height, width = band.shape
    even = np.pad(band, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge") if height % 2 or width % 2 else band
    exact = band.dtype.kind == "f" and band.itemsize >= 4
    kind = band.dtype if exact else np.dtype(np.float32 if band.itemsize <= 2 else np.float64)
    total = even[:, ::2, ::2].astype(kind)
    for part in (even[:, ::2, 1::2], even[:, 1::2, ::2], even[:, 1::2, 1::2]):
        total += part
    total /= 4
    return total if exact else (np.rint(total) if band.dtype.kind != "f" else total).astype(band.dtype)


def rows_of_band(row_bytes: int) -> int:
    """Return the number of rows of a band: fewer where a row is long, so that a band is not much more than 64 MiB."""
    rows = CHUNK
    while rows > _LEAST_ROWS and rows * row_bytes > _BAND_BYTES:
        rows //= 2
    return rows


Format = Callable[[Path, Sequence[WrittenMap], Sequence[Place]], AbstractContextManager[Sequence[Bands]]]
"""Makes a file of maps (channels, height, width), whole or not at all; gives the bands in which they are taken."""


@dataclass(frozen=True)
class PathTarget:
    """One file for all maps, if its format holds several, or one for each; see `map_target`."""

    paths: tuple[Path, ...]
    ome_zarr: str = "0.5"

    def buffer_rows(self, written: WrittenMap) -> int:
        """Return the rows of a map that are in memory: a band of each level, one that is halved, and one that is encoded."""
        return 3 * rows_of_band(written.row_bytes)

    @contextmanager
    def begin(self, image: Any, maps: Sequence[WrittenMap]) -> Iterator["_PathSink"]:
        """Open the files of the maps of an image; they take their places when the block ends without an error.

        Raises:
            ValueError: A map has more than one image, or other dimensions than channels, height and width; the number of paths is
                not that of maps; a format does not hold such a map.
            MissingExtraError: A format needs a package that is not installed.
        """
        for each in maps:
            if len(each.shape) > 4 or (len(each.shape) == 4 and each.shape[0] != 1):
                raise WrongArgumentError(
                    f"a map of shape {each.shape}{each.name and f' ({each.name})'} cannot be written to {self.paths[0]}: a file "
                    "holds that of one image, (channels, height, width). Call write(images[k : k + 1], path) for each k with a "
                    "path of its own, or write to an array of that shape"
                )
        places = [Place.of(image, each.origin, each.stride) for each in maps]
        with ExitStack() as stack:
            if len(self.paths) == 1 and (several := _format_of(self.paths[0], places[0], self.ome_zarr)).holds_several:
                bands = stack.enter_context(several.make(self.paths[0], maps, places))
                yield _PathSink(tuple(bands), [self.paths[0]] * len(maps))
            else:
                paths = self._path_of_each(maps)
                bands = [
                    stack.enter_context(_format_of(path, place, self.ome_zarr).make(path, [each], [place]))[0]
                    for path, each, place in zip(paths, maps, places, strict=True)
                ]
                yield _PathSink(tuple(bands), paths)
            for band in bands:
                band.finish()

    def _path_of_each(self, maps: Sequence[WrittenMap]) -> list[Path]:
        if len(self.paths) == len(maps):
            return list(self.paths)
        names = ", ".join(repr(each.name) for each in maps)
        if len(self.paths) > 1:
            raise WrongArgumentError(
                f"{len(self.paths)} paths were given for {len(maps)} maps, {names}: give one for each, or one for all"
            )
        stem, ending = split_ending(self.paths[0])
        return [self.paths[0].with_name(f"{stem}.{each.name}{ending}") for each in maps]


@dataclass(frozen=True)
class _PathSink:
    """Takes tiles, see `widefield.streaming.map_writing.MapSink`."""

    bands: Sequence[Bands]
    places: Sequence[Path]

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        self.bands[number].write(y, x, tile.reshape(-1, *tile.shape[-2:]))

    def rows_done(self, number: int, y: int) -> None:
        self.bands[number].rows_done(y)


@dataclass(frozen=True)
class _Format:
    make: Format
    holds_several: bool = False


def channels_first(written: WrittenMap) -> tuple[int, int, int]:
    """Return the shape of a map of one image as (channels, height, width)."""
    height, width = written.shape[-2:]
    return int(np.prod(written.shape[:-2], dtype=np.int64)), height, width


_ENDINGS = (".ome.zarr", ".zarr", ".ome.tif", ".ome.tiff", ".tif", ".tiff", ".geojson")


def split_ending(path: Path) -> tuple[str, str]:
    """Return the name of a file of a map without its ending, and the ending; the latter is empty if it is none that is written."""
    ending = next((one for one in _ENDINGS if path.name.lower().endswith(one)), "")
    return path.name[: len(path.name) - len(ending)], path.name[len(path.name) - len(ending) :]


def _format_of(path: Path, place: Place, version: str) -> _Format:
    ending = split_ending(path)[1].lower()
    if ending.endswith("zarr"):
        from widefield.images.map_zarr import ome_zarr, plain_zarr  # slow to import

        return _Format(partial(ome_zarr, version=version) if ending == ".ome.zarr" else plain_zarr, holds_several=True)
    if ending == ".geojson":
        from widefield.images.polygons import polygons_of_tiles

        return _Format(polygons_of_tiles)
    if place.transform is not None and not ending.startswith(".ome"):
        from widefield.images.map_geotiff import geotiff

        return _Format(geotiff)
    from widefield.images.map_tiff import ome_tiff, plain_tiff

    return _Format(ome_tiff if ending.startswith(".ome") else plain_tiff)


def map_target(to: Any, *, ome_zarr: Literal["0.4", "0.5"] = "0.5") -> PathTarget:
    """Return the target that writes maps to a path, or to one for each of several maps.

    The ending says the format:

    - `.ome.zarr`: OME-Zarr with a pyramid; each of several maps is an image of its own in it;
    - `.zarr`: a Zarr array, of several maps a group of them;
    - `.ome.tif`: a pyramidal OME-TIFF;
    - `.tif`: a cloud optimized GeoTIFF if the image is a map of the earth, which needs the extra `geo`, and else a tiled BigTIFF;
    - `.geojson`: the polygons of a map of labels, see `widefield.images.polygons`; needs the extra `geo`.

    Of formats that hold one map, several are written beside each other: `out.tif` becomes `out.NAME.tif`.

    Args:
        to: A path, or a list of one for each map. It is replaced when all is written.
        ome_zarr: Version of OME-Zarr: 0.4 (Zarr 2) is what older programs read.

    Raises:
        ValueError: It is no path, or has another ending.

    Examples:
        >>> model = wf.stream(nn.Conv2d(3, 2, 3), tile_size=64)
        >>> target = map_target("map.ome.zarr", ome_zarr="0.4")
        >>> written = model.write(torch.rand(1, 3, 100, 80), target, postprocess="argmax")
    """
    if ome_zarr not in ("0.4", "0.5"):
        raise WrongArgumentError(f"ome_zarr={ome_zarr!r}; expected '0.4' or '0.5'")
    listed = list(to) if isinstance(to, (list, tuple)) and to else [to]
    if not all(isinstance(one, (str, os.PathLike)) for one in listed):
        raise WrongArgumentError(
            f"to={to!r:.200}; expected a path that ends in {', '.join(_ENDINGS)}, an array or tensor of the map's shape, or a "
            "list of one for each map"
        )
    paths = tuple(Path(one) for one in listed)
    for path in paths:
        if not split_ending(path)[1] or path.name.startswith("."):
            raise WrongArgumentError(
                f"{path} says no format that maps are written in; expected a name that ends in {', '.join(_ENDINGS)}"
            )
        if path.is_dir() and not path.name.lower().endswith("zarr"):
            raise WrongArgumentError(f"{path} is a folder; name a file, or remove it")
    if len(set(paths)) < len(paths):
        raise WrongArgumentError(f"to={to!r}: each map needs a path of its own")
    return PathTarget(paths, ome_zarr)
