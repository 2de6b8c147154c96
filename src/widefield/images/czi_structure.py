"""The structure of a CZI file: what it says twice is compared, and each tile has as many pixels as it says.

By Zeiss' "ZISRAW (CZI) File Format" and libCZI, which compares entries in the same way when it reads a tile.
"""

import struct
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from widefield.images.embedded import declared_size, zstd_content_size
from widefield.images.formats import ImageReadError, Size, cannot_read, check_segment

_SEGMENT = struct.Struct("<16sqq")
"""Head of a segment: id, bytes that are its own, bytes of them that are used."""

_DIRECTORY_PLACE = 84
"""Place in the file of the place of the directory."""

_ENTRY = struct.Struct("<2siqii6xi")
"""Head of an entry: schema, type of pixels, place of the tile, part of the file, compression, number of dimensions."""

_DIMENSION = struct.Struct("<4siifi")
"""Name of an axis, start, size, start coordinate, stored size."""

_SIZES = struct.Struct("<iiq")
"""Bytes of the metadata, the attachment and the pixels of a tile."""

_HEAD_BYTES = 128
"""Bytes of the directory before its entries."""

_LEAST_TILE_HEAD = 256
"""Bytes from the end of the head of a tile's segment to its metadata, at least."""

_READ_BYTES = 2048
"""Bytes that are read of each tile; mostly they reach to its pixels."""

_MAX_DIMENSIONS = 40

_PIXEL_BYTES = {0: 1, 1: 2, 2: 4, 3: 3, 4: 6, 8: 12, 9: 4, 10: 8, 11: 24, 12: 4, 13: 8}
"""Bytes of a pixel by the number of its type."""

_UNCOMPRESSED, _JPEG_XR, _ZSTD_0, _ZSTD_1 = 0, 4, 5, 6
_OTHERS = {1: "JPEG", 2: "LZW"}


@dataclass(frozen=True)
class _Entry:
    """An entry of the directory, of which each tile has a copy."""

    position: int
    kind: int
    compression: int
    axes: dict[str, tuple[int, ...]]
    """Start of each axis, of X and Y also the size and the stored size."""
    nbytes: int

    @property
    def said(self) -> tuple[object, ...]:
        """Return what a copy must say, too."""
        return self.kind, self.compression, self.axes

    @property
    def stored(self) -> Size:
        """(height, width) of its pixels."""
        return self.axes["Y"][2], self.axes["X"][2]


def check_tiles(path: Path) -> None:
    """Compare the directory of a CZI file with its tiles ("sub-blocks"), of which no pixel is decoded.

    A tile whose entry is damaged may lie nowhere, or elsewhere: it would never be read, and background would pass for its pixels.

    Raises:
        ImageReadError: They differ, a tile is compressed in a way that is not read, or its pixels are fewer than it says.
    """
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        for number, entry in enumerate(_directory(path, file, size)):
            try:
                _check_tile(path, file, size, entry)
            except ImageReadError:
                raise
            except (struct.error, ValueError, KeyError) as error:
                raise cannot_read(path, f"its structure is damaged: tile {number} {error}") from error


def _directory(path: Path, file: FileIO, size: int) -> list[_Entry]:
    file.seek(_DIRECTORY_PLACE)
    (place,) = struct.unpack("<q", file.read(8))
    file.seek(place)
    name, allocated, used = _SEGMENT.unpack(file.read(_SEGMENT.size))
    if name.rstrip(b"\0") != b"ZISRAWDIRECTORY":
        raise cannot_read(path, "its structure is damaged: its directory does not lie where it says")
    data = file.read(min(used or allocated, size))
    (count,) = struct.unpack_from("<i", data)
    entries, at = [], _HEAD_BYTES
    for _ in range(count):
        entries.append(_entry(data, at))
        at += entries[-1].nbytes
    if data[at : at + 2] == b"DV":
        raise cannot_read(path, f"its structure is damaged: its directory has more than the {count} tiles that it says")
    return entries


def _entry(data: bytes, at: int) -> _Entry:
    schema, kind, position, _, compression, count = _ENTRY.unpack_from(data, at)
    if schema != b"DV" or not 0 < count <= _MAX_DIMENSIONS:
        raise ValueError(f"has an entry of schema {schema!r} and {count} axes")
    axes: dict[str, tuple[int, ...]] = {}
    for k in range(count):
        name, start, length, _, stored = _DIMENSION.unpack_from(data, at + _ENTRY.size + k * _DIMENSION.size)
        letter = name.rstrip(b"\0").decode("latin-1").upper()
        axes[letter] = (start, length, stored or length) if letter in ("X", "Y") else (start,)
    if min(axes["Y"][1:] + axes["X"][1:]) < 1:
        raise ValueError(f"has a size of {axes['Y'][1:]} by {axes['X'][1:]}")
    return _Entry(position, kind, compression, axes, _ENTRY.size + count * _DIMENSION.size)


def _check_tile(path: Path, file: FileIO, size: int, entry: _Entry) -> None:
    file.seek(entry.position)
    data = file.read(_READ_BYTES)
    name, _, used = _SEGMENT.unpack_from(data.ljust(_SEGMENT.size, b"\0"))
    if name.rstrip(b"\0") != b"ZISRAWSUBBLOCK":
        return  # libCZI raises an error where such a tile is read, and only there
    place = _SEGMENT.size + _SIZES.size
    copy = _entry(data, place)
    if copy.said != entry.said:
        raise ValueError(f"says {copy.said}, where the directory says {entry.said}")
    metadata, attachment, count = _SIZES.unpack_from(data, _SEGMENT.size)
    first = _SEGMENT.size + max(_LEAST_TILE_HEAD, _SIZES.size + copy.nbytes)
    together = first - _SEGMENT.size + metadata + attachment + count
    if min(metadata, attachment, count) < 0 or entry.position + first + metadata + count > size or 0 < used < together:
        raise ValueError(f"has {metadata}, {attachment} and {count} bytes, which are not there")
    if first + metadata > len(data) - 64:
        file.seek(entry.position + first)
        data, first = file.read(metadata + _READ_BYTES), 0
    described, data = data[first : first + metadata], data[first + metadata :][:count]
    if described and not described.rstrip(b"\0\r\n\t ").endswith(b">"):
        raise ValueError("has metadata that do not end as XML does")
    _check_pixels(path, entry, data, count)


def _check_pixels(path: Path, entry: _Entry, data: bytes, count: int) -> None:
    """Compare what `data`, the first of `count` bytes of compressed pixels, say of themselves with the entry."""
    height, width = entry.stored
    expected = height * width * _PIXEL_BYTES[entry.kind]
    if entry.compression == _UNCOMPRESSED:
        held, there, unit = count, expected, "bytes"
    elif entry.compression in (_ZSTD_0, _ZSTD_1):
        start = data[0] if entry.compression == _ZSTD_1 else 0
        held, there, unit = zstd_content_size(data[start:]) or 0, expected, "bytes"
        check_segment(path, "tile", (held,), 1)
    elif entry.compression == _JPEG_XR:
        if not data.startswith(b"II\xbc"):
            raise ValueError("is no JPEG XR, as it says")
        rows, columns, _ = declared_size(data) or (height, width, 1)
        held, there, unit = min(rows, height) * min(columns, width), height * width, "pixels"
        check_segment(path, "tile", (rows, columns), _PIXEL_BYTES[entry.kind])
    else:
        named = _OTHERS.get(entry.compression, f"number {entry.compression}")
        raise cannot_read(path, f"its tiles are compressed by {named}; expected JPEG XR, Zstandard, or none")
    if held < there:
        raise ValueError(f"holds {held} of its {there} {unit}")
