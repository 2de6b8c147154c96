"""TIFF pages whose channels lie in separate planes (PlanarConfiguration 2), decoded by libvips plane by plane.

libvips reads most such pages wrongly, without an error: each row of a strip comes back as the first row of the strip. So it is
shown another file: the bytes of the real one, between a header and directories that make a page of one channel of each plane.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import tifffile

from widefield.images.vips import kept_out_of_cache, load

_LONG8, _UNDEFINED = 16, 7
_HEADER_BYTES = 16
"""Bytes of the header of a BigTIFF file, by which the bytes of the real file are shifted."""


@dataclass(frozen=True)
class SeparatePlanes:
    """Directories for the planes of one page.

    Attributes:
        path: The real file.
        size: Bytes of the real file.
        header: Goes before its bytes.
        directories: Go behind its bytes.
        access: "random" or "sequential", see `load`.
    """

    path: Path
    size: int
    header: bytes
    directories: bytes
    access: str

    @classmethod
    def of(cls, path: Path, page: Any) -> "SeparatePlanes":
        """The planes of a page of tifffile."""
        order, start = page.parent.byteorder, _HEADER_BYTES + page.parent.filehandle.size
        segments = len(page.dataoffsets) // page.samplesperpixel
        directories, following = bytearray(), 0
        for plane in reversed(range(page.samplesperpixel)):  # a directory points to the one after it
            part = slice(plane * segments, (plane + 1) * segments)
            entries = bytearray()
            for tag, (kind, data) in sorted(_fields(page, part).items()):
                count = len(data) // (8 if kind == _LONG8 else 1)
                if len(data) > 8:
                    directories += data
                    data = struct.pack(order + "Q", start + len(directories) - len(data))
                entries += struct.pack(order + "HHQ", tag, kind, count) + data.ljust(8, b"\0")
            number = len(entries) // 20
            before, after = struct.pack(order + "Q", number), struct.pack(order + "Q", following)
            following = start + len(directories)
            directories += before + entries + after
        header = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HHHQ", 43, 8, 0, following)
        access = "random" if page.is_tiled else "sequential"
        return cls(path, page.parent.filehandle.size, header, bytes(directories), access)

    def open(self, count: int) -> tuple[pyvips.Image, ...]:
        """The first `count` planes as images of one band, opened anew; an ImageReadError as in `load`."""
        with kept_out_of_cache():
            return tuple(
                load(self.path, self.access, "warning", source=_as_source(_Reader(self)), page=plane)
                for plane in range(count)
            )


def _fields(page: Any, part: slice) -> dict[int, tuple[int, bytes]]:
    """Tags of a page of one channel, whose strips or tiles are a part of those of `page`: type and bytes of each."""
    numbers = {
        256: page.imagewidth,
        257: page.imagelength,
        258: page.bitspersample,
        259: page.compression,
        262: tifffile.PHOTOMETRIC.MINISBLACK,
        266: page.fillorder,
        277: 1,  # SamplesPerPixel
        317: page.predictor,
        339: page.sampleformat,
    }
    offsets_tag, counts_tag = (324, 325) if page.is_tiled else (273, 279)
    numbers |= {322: page.tilewidth, 323: page.tilelength} if page.is_tiled else {278: page.rowsperstrip}
    counts = np.array(page.databytecounts[part], np.int64)
    offsets = np.array(page.dataoffsets[part], np.int64) + np.where(counts > 0, _HEADER_BYTES, 0)  # 0 stays 0: no bytes
    arrays = {tag: np.array([int(number)]) for tag, number in numbers.items()} | {
        offsets_tag: offsets,
        counts_tag: counts,
    }
    fields = {tag: (_LONG8, array.astype(f"{page.parent.byteorder}u8").tobytes()) for tag, array in arrays.items()}
    return fields | ({347: (_UNDEFINED, page.jpegtables)} if page.jpegtables else {})


class _Reader:
    """Reads what libvips is shown. The file is opened for each piece: a forked process would share its position."""

    def __init__(self, planes: SeparatePlanes) -> None:
        self._planes = planes
        self._position = 0
        self._size = _HEADER_BYTES + planes.size + len(planes.directories)

    def seek(self, offset: int, whence: int) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, length: int) -> bytes:
        pieces = []
        while length and (piece := self._piece(length)):
            pieces.append(piece)
            self._position += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _piece(self, length: int) -> bytes:
        planes, position = self._planes, self._position
        if position < _HEADER_BYTES:
            return planes.header[position : position + length]
        position -= _HEADER_BYTES
        if position >= planes.size:
            return planes.directories[position - planes.size :][:length]
        try:
            with planes.path.open("rb", buffering=0) as file:
                file.seek(position)
                return file.read(min(length, planes.size - position))
        except OSError:
            return b""  # libvips takes it for the end of a truncated file


def _as_source(reader: _Reader) -> pyvips.SourceCustom:
    source = pyvips.SourceCustom()
    source.on_read(reader.read)
    source.on_seek(reader.seek)
    return source
