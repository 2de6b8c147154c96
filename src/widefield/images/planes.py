"""TIFF pages whose channels lie in separate planes (PlanarConfiguration 2), decoded by libvips plane by plane.

libvips reads most such pages wrongly, without an error: each row of a strip comes back as the first row of the strip. So it is
shown another file: the bytes of the real one, between a header and directories that make a page of one channel of each plane.
"""

import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import tifffile

from widefield.images.vips import OpenPlanes, kept_out_of_cache, load

_LONG8, _UNDEFINED = 16, 7
_HEADER_BYTES = 16
"""Bytes of the header of a BigTIFF file, by which the bytes of the real file are shifted."""


def separate_planes(path: Path, page: Any, count: int) -> OpenPlanes:
    """Return a function that opens the first `count` planes of a page of tifffile as images of one band.

    It raises ImageReadError as `load` does.
    """
    order, start = page.parent.byteorder, _HEADER_BYTES + page.parent.filehandle.size
    segments = len(page.dataoffsets) // page.samplesperpixel
    directories, following = bytearray(), 0
    for plane in reversed(range(page.samplesperpixel)):  # a directory points to the one after it
        part = slice(plane * segments, (plane + 1) * segments)
        entries = bytearray()
        for tag, (kind, data) in sorted(_fields(page, part).items()):
            number = len(data) // (8 if kind == _LONG8 else 1)
            if len(data) > 8:
                directories += data
                data = struct.pack(order + "Q", start + len(directories) - len(data))
            entries += struct.pack(order + "HHQ", tag, kind, number) + data.ljust(8, b"\0")
        before, after = struct.pack(order + "Q", len(entries) // 20), struct.pack(order + "Q", following)
        following = start + len(directories)
        directories += before + entries + after
    header = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HHHQ", 43, 8, 0, following)
    shown = partial(_Reader, path, page.parent.filehandle.size, header, bytes(directories))
    access = "random" if page.is_tiled else "sequential"

    def open_planes() -> tuple[pyvips.Image, ...]:
        with kept_out_of_cache():
            return tuple(
                load(path, access, "warning", source=_as_source(shown()), page=plane) for plane in range(count)
            )

    return open_planes


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


@dataclass
class _Reader:
    """Reads what libvips is shown: the bytes of the real file, of `size`, between a header and the directories.

    The file is opened for each piece: a forked process would share its position.
    """

    path: Path
    size: int
    header: bytes
    directories: bytes
    position: int = 0

    def seek(self, offset: int, whence: int) -> int:
        end = _HEADER_BYTES + self.size + len(self.directories)
        self.position = offset + (0, self.position, end)[whence]
        return self.position

    def read(self, length: int) -> bytes:
        pieces = []
        while length and (piece := self._piece(length)):
            pieces.append(piece)
            self.position += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _piece(self, length: int) -> bytes:
        if self.position < _HEADER_BYTES:
            return self.header[self.position : self.position + length]
        position = self.position - _HEADER_BYTES
        if position >= self.size:
            return self.directories[position - self.size :][:length]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(position)
                return file.read(min(length, self.size - position))
        except OSError:
            return b""  # libvips takes it for the end of a truncated file


def _as_source(reader: _Reader) -> pyvips.SourceCustom:
    source = pyvips.SourceCustom()
    source.on_read(reader.read)
    source.on_seek(reader.seek)
    return source
