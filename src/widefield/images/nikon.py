"""Nikon ND2 files: their structure through the package nd2, which the extra `microscopy` brings, their pixels from the file."""

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from widefield.images.arrays import ArrayPixels, DeferredArray, MappedArray, stacked
from widefield.images.formats import (
    Choice,
    Contents,
    PerProcess,
    Pixels,
    all_named,
    cannot_read,
    check_segment,
    choose_series,
    image_format,
    known,
    optional,
)
from widefield.images.nikon_legacy import frame_name, open_legacy

_MAGIC = b"\xda\xce\xbe\x0a"
"""The first bytes of every part ("chunk") of an ND2 file, and so of the file."""

_CHUNK = struct.Struct("<4sIQ")
"""Header of a chunk: magic, bytes of its name with what pads it, bytes of its content."""

_TIME_BYTES = 8
"""Bytes of the time stamp before the pixels of a frame."""


def _is_nd2(path: Path | str, start: bytes) -> bool:
    return start.startswith(_MAGIC) or (start[4:8] == b"jP  " and str(path).lower().endswith(".nd2"))


@image_format("Nikon ND2", endings=(".nd2",), recognises=_is_nd2, before=("JPEG 2000, VRT, NITF, Imagine",))
def open_nd2(path: Path, choice: Choice) -> Contents:
    """Open one frame of an ND2 file: all its channels at one position of the stage, in time, depth and the like; BGR comes as RGB.

    Frames that were planned and not taken are none of the images.
    """
    with path.open("rb") as header:
        if header.read(4) != _MAGIC:
            return open_legacy(path, choice)
    nd2: Any = optional("nd2", path, "microscopy")
    with nd2.ND2File(path) as file:
        said, loops, chunks = file.attributes, file.experiment, file._rdr.chunkmap
        written = "ImageMetadataSeqLV|0" if b"ImageMetadataSeqLV|0!" in chunks else "ImageMetadataSeq|0"
        picture = file.unstructured_metadata(strip_prefix=False, include={written})[written]
    picture = picture.get("SLxPictureMetadata", picture)
    planes = picture["sPicturePlanes"].get("sPlaneNew") or picture["sPicturePlanes"]["sPlane"]
    if said.compressionType == "lossy":
        raise cannot_read(path, "its frames are compressed with loss, which is not read; save it uncompressed")
    scale = float(picture["dCalibration"]) if picture.get("bCalibrated") else math.nan
    components, itemsize = said.componentCount, said.bitsPerComponentInMemory // 8
    dtype = np.dtype(f"<{'f' if said.pixelDataType == 'float' else 'u'}{itemsize}")
    height, width = size = said.heightPx, said.widthPx
    frames = sorted(int(name[13:-1]) for name in chunks if name.startswith(b"ImageDataSeq|"))
    if not frames:
        raise cannot_read(path, "it is an ND2 file without an image")
    names = [frame_name(frame, loops) for frame in frames]
    frame = frames[choose_series(path, choice.series, names, [size] * len(frames))]
    start, count = _place(path, frame, chunks[b"ImageDataSeq|%d!" % frame][0])
    row = said.widthBytes or width * components * itemsize
    is_packed, nbytes = said.compressionType == "lossless", row * height
    check_segment(path, "frame", (height, row), 1 if is_packed else 0)
    if not is_packed and count < nbytes:
        raise cannot_read(path, f"its frame {frame} is damaged: it has {count} bytes, its pixels have {nbytes}")
    unpacked = PerProcess(lambda: _unpacked(path, start, count, nbytes))
    bands = 3 if components == 3 * len(planes) else 1
    shape, strides = (height, width, bands), (row, components * itemsize, -itemsize)

    def part(first: int) -> Pixels:
        """One channel, of which the last of three bands, red, comes first."""
        end = (first + bands - 1) * itemsize
        if not is_packed:
            return ArrayPixels(MappedArray(path, start + end, shape, dtype, strides), "YXC")
        opened = PerProcess(lambda: np.ndarray(shape, dtype, unpacked.get(), end, strides))
        return ArrayPixels(DeferredArray(opened, shape, dtype), "YXC")

    parts = tuple(part(first) for first in range(0, components, bands))
    named = ["red", "green", "blue"] if bands == components else [one.get("sDescription") for one in planes.values()]
    return Contents(
        levels=(size,),
        pixels=lambda level: stacked(parts),
        spacing=known(scale, scale),
        channel_names=all_named(named, components),
    )


def _place(path: Path, frame: int, offset: int) -> tuple[int, int]:
    """Offset and number of bytes of the pixels of a frame, of which the chunk begins at `offset`.

    The package nd2 gives zeros for frames that lie elsewhere than the map of the file says, so the map is not believed.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(offset)
        header = file.read(_CHUNK.size + 32)
    magic, name_length, length = _CHUNK.unpack(header[: _CHUNK.size])
    start = offset + _CHUNK.size + name_length
    if magic != _MAGIC or not header[_CHUNK.size :].startswith(b"ImageDataSeq|%d!" % frame) or start + length > size:
        raise cannot_read(path, f"its frame {frame} is damaged or missing: it does not lie where the file says")
    return start + _TIME_BYTES, length - _TIME_BYTES


def _unpacked(path: Path, start: int, count: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        pixels = zlib.decompressobj().decompress(file.read(count), nbytes)
    if len(pixels) < nbytes:
        raise ValueError(f"a frame of {len(pixels)} bytes is too small, its pixels have {nbytes}")
    return pixels
