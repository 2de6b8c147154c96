"""Pixels of one TIFF page: its tiles or strips, decoded one by one as they are needed."""

import math
import os
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import imagecodecs
import numpy as np
import pyvips
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, TIFF

from widefield.images.arrays import ArrayPixels, MappedArray
from widefield.images.embedded import check_picture, declared_size
from widefield.images.formats import ForkSafeLock, Palette, PerProcess, Pixels, Size, cannot_read, check_segment
from widefield.images.lzw import lzw_decoder
from widefield.images.photos import MEMORY_BYTES, fetch, temporary_file

CACHE_BYTES = 16 * 2**20
"""Decoded segments are kept up to so many bytes, or those of one row of tiles where that is more: what strips lower than a tile
read twice."""

_WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_POOL = PerProcess(lambda: ThreadPoolExecutor(_WORKERS, "widefield-segments"))
_PARALLEL_BYTES = 2**15
"""Segments that decode to fewer bytes are decoded one after the other: handing them to a thread would take as long."""

_JPEG = (COMPRESSION.JPEG, COMPRESSION.JPEG_LOSSY)
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
"""A marker that says how the colours of a JPEG are stored; the last byte, 0 for RGB and 1 for YCbCr, is to follow."""

Page = Any
"""tifffile's TiffPage, or the TiffFrame that stands for a page like the one before it and lacks some of its types."""


@dataclass(frozen=True)
class _Colours:
    """Channels that stored samples become: how many channels, of which type, and by which function of (height, width, samples)."""

    channels: int
    dtype: np.dtype
    convert: Callable[[np.ndarray], np.ndarray] | None = None


def page_pixels(path: Path, page: Page, blank: float, palette: Palette = "colours") -> Pixels:
    """Open the pixels of a page, while its file is open.

    Args:
        path: The file that the pixels lie in.
        page: The page.
        blank: Stored value of tiles that have no bytes; the nearest one that their type holds, as in GDAL.
        palette: What becomes of the indices of a palette.

    Raises:
        ImageReadError: Something of it is not supported.
    """
    frame = page.keyframe
    colours = _colours(path, frame, palette)
    size, samples = (frame.imagelength, frame.imagewidth), frame.samplesperpixel
    is_planar = samples > 1 and frame.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    if colours.convert is None and frame.is_memmappable:
        shape, axes = ((samples, *size), "CYX") if is_planar else ((*size, samples), "YXC")
        stored = frame.dtype.newbyteorder(frame.parent.byteorder)
        return ArrayPixels(MappedArray(path, page.dataoffsets[0], shape, stored), axes)
    if frame.is_tiled:
        segment = frame.tilelength, frame.tilewidth
    else:
        segment = min(frame.rowsperstrip, size[0]), size[1]
    grid = math.ceil(size[0] / segment[0]), math.ceil(size[1] / segment[1])
    planes = samples if is_planar else 1
    if len(page.dataoffsets) < math.prod(grid) * planes or len(page.databytecounts) < math.prod(grid) * planes:
        raise cannot_read(path, "its TIFF structure is damaged: it names fewer tiles or strips than the page has")
    check_segment(path, "tile" if frame.is_tiled else "strip", segment, samples // planes * frame.dtype.itemsize)
    return SegmentPixels(
        path=path,
        shape=(colours.channels, *size),
        dtype=colours.dtype,
        segment=segment,
        grid=grid,
        planes=planes,
        offsets=np.array(page.dataoffsets, np.int64),
        counts=np.array(page.databytecounts, np.int64),
        decode=_decoder(path, page, segment),
        convert=colours.convert,
        blank=_blank_pixel(blank, frame, colours),
    )


def _blank_pixel(value: float, page: Page, colours: _Colours) -> np.ndarray:
    """The channels of a pixel whose samples are all `value`."""
    dtype = page.dtype
    if dtype.kind in "ui":
        nearest = math.floor(value + 0.5) if math.isfinite(value) else value
        value = 0 if math.isnan(value) else min(max(nearest, np.iinfo(dtype).min), np.iinfo(dtype).max)
    pixel = np.full((1, 1, page.samplesperpixel), value, dtype)
    return np.ravel(pixel if colours.convert is None else colours.convert(pixel))


def _colours(path: Path, page: Page, palette: Palette) -> _Colours:
    """Tell what becomes of the samples of a page, or refuse colours that would pass for RGB."""
    if page.dtype is None or page.dtype.kind not in "uifb":
        stored = page.dtype or f"{page.bitspersample} bits of sample format {page.sampleformat}"
        raise cannot_read(path, f"its pixels are of type {stored}; expected integers or floats")
    if not isinstance(page.photometric, PHOTOMETRIC):
        raise cannot_read(path, f"its colours are of the unknown kind {page.photometric}")
    if page.imagedepth > 1:
        raise cannot_read(
            path, f"a page of it is {page.imagedepth} planes deep, which is not supported; save each as a page"
        )
    photometric, samples = page.photometric, page.samplesperpixel
    dtype = np.dtype("u1") if page.dtype.kind == "b" else page.dtype.newbyteorder("=")
    is_index = photometric == PHOTOMETRIC.PALETTE and palette == "indices"
    if is_index or photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.MASK, PHOTOMETRIC.CFA):
        return _Colours(samples, dtype, None if page.dtype == dtype else lambda pixels: pixels.astype(dtype))
    if photometric == PHOTOMETRIC.MINISWHITE:
        if dtype.kind != "u":
            return _Colours(samples, dtype)
        white = dtype.type(2**page.bitspersample - 1)
        return _Colours(samples, dtype, lambda pixels: white - pixels.astype(dtype))
    if photometric == PHOTOMETRIC.PALETTE and page.colormap is not None and samples == 1:
        table = np.asarray(page.colormap).T  # 16 bits, of which some writers fill the lower 8 only
        colours = (table if table.max() < 256 else table >> 8).astype("u1")
        return _Colours(3, colours.dtype, lambda pixels: colours[pixels[..., 0].astype(np.intp)])
    if photometric == PHOTOMETRIC.YCBCR and page.compression in _JPEG:
        return _Colours(samples, dtype)
    if photometric == PHOTOMETRIC.SEPARATED and samples == 4 and dtype == "u1":
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            reason = "SEPARATED colours in separate planes (PlanarConfiguration 2) are not supported"
            raise cannot_read(path, f"{reason}; save it pixel-interleaved")
        return _Colours(3, dtype, _cmyk_to_rgb)
    if photometric == PHOTOMETRIC.YCBCR:
        raise cannot_read(path, "its colours are YCbCr, which is read from JPEG only; convert it to RGB first")
    raise cannot_read(path, f"its colours are {photometric.name}; convert it to RGB first")


def _cmyk_to_rgb(pixels: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    image = pyvips.Image.new_from_memory(np.ascontiguousarray(pixels), width, height, 4, "uchar")
    rgb = image.copy(interpretation="cmyk").colourspace("srgb")
    return fetch(pyvips.Region.new(rgb), np.dtype("u1"), 0, 0, height, width)


Decode = Callable[[bytes, int], np.ndarray]
"""The samples (height, width, samples) of the segment of an index."""


def _decoder(path: Path, page: Page, segment: Size) -> Decode:
    """Return what decodes a segment of `page`, of (height, width) pixels; the file must be open now, but not later.

    Raises:
        ImageReadError: There is no decoder for it.
    """
    frame = page.keyframe
    compression, tables = frame.compression, page.jpegtables
    if frame.decode.__name__.startswith("decode_raise"):
        try:
            frame.decode()
        except (ValueError, NotImplementedError) as error:
            codec = "none" if compression == 1 else getattr(compression, "name", str(compression))
            raise cannot_read(path, f"it cannot be decoded (compression {codec}): {error}") from error
    height, width = segment
    samples = 1 if frame.planarconfig == tifffile.PLANARCONFIG.SEPARATE else frame.samplesperpixel
    if compression == COMPRESSION.LZW and (lzw := lzw_decoder(frame, samples)):
        strips = math.ceil(frame.imagelength / height)

        def decode_lzw(data: bytes, index: int) -> np.ndarray:
            return lzw(data, height if frame.is_tiled else min(height, frame.imagelength - index % strips * height))

        return decode_lzw
    is_lerc, is_jpeg = compression == COMPRESSION.LERC, compression in _JPEG
    colours = {1: "GRAY", 3: "RGB"}.get(samples) if is_jpeg and frame.bitspersample == 8 else None
    most = 2 * (height + 16) * (width + 16)  # encoders may fill up a segment

    def decode(data: bytes, index: int) -> np.ndarray:
        if is_lerc:
            data = _unpacked_lerc(data, 2**16 + 2 * most * frame.samplesperpixel * frame.dtype.itemsize)
        if is_lerc or compression in TIFF.IMAGE_COMPRESSIONS:
            check_picture(data, most, frame.samplesperpixel)
        if is_lerc and frame.predictor == 1:  # another one is of tifffile's own
            return _decoded_lerc(data, samples, frame.dtype)
        if colours is not None:
            return _decoded_jpeg(data, tables, colours, frame.photometric == PHOTOMETRIC.YCBCR)
        whole = _ended(data) if is_jpeg else data
        return frame.decode(whole, index, jpegtables=tables, jpegheader=frame.jpegheader)[0][0]

    return decode


def _decoded_jpeg(data: bytes, tables: bytes | None, colours: str, is_ycbcr: bool) -> np.ndarray:
    """The samples of a JPEG; an error where it is damaged, for which the bare decoder of the format gives grey."""
    if (found := declared_size(data)) and found[2] != (1 if colours == "GRAY" else 3):
        raise ValueError(f"a picture of {found[2]} colours lies in it; expected {colours}")
    marker = b"" if colours == "GRAY" or data[6:10] == b"JFIF" else _ADOBE + bytes([is_ycbcr])
    whole = b"".join((tables[:-2] if tables else data[:2], marker, data[2:]))
    return simplejpeg.decode_jpeg(_ended(whole), colours, fastdct=False, fastupsample=False)


def _unpacked_lerc(data: bytes, most: int) -> bytes:
    """LERC data without the deflate or ZSTD that GDAL may put around them, which imagecodecs would unpack as far as they go."""
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return bytes(imagecodecs.zstd_decode(data, out=most))
    if data.startswith((b"Lerc2 ", b"CntZImage ")):
        return data
    unpacking = zlib.decompressobj()
    unpacked = unpacking.decompress(data, most)
    if unpacking.unconsumed_tail:
        raise ValueError(f"it unpacks to more than {most} bytes")
    return unpacked


def _decoded_lerc(data: bytes, samples: int, dtype: np.dtype) -> np.ndarray:
    """The samples (height, width, samples) of LERC data.

    As libtiff writes and reads them, and tifffile does not: NaN are left out by a mask, so is alpha of 0 and 255 only, and bands
    with masks of their own are blobs of their own.
    """
    decoded = imagecodecs.lerc_decode(data, masks=True)
    values, mask = decoded if isinstance(decoded, tuple) else (decoded, None)
    if values.ndim == 3 and data.count(b"Lerc2 ") > 1:
        values = np.moveaxis(values, 0, -1)
        mask = mask if mask is None or mask.ndim == 2 else np.moveaxis(mask, 0, -1)
    height, width = values.shape[:2]
    values = values.reshape(height, width, -1)
    if mask is not None:
        mask = np.reshape(mask, (height, width, -1)).astype(bool)
        if values.shape[2] == samples - 1 and dtype == np.uint8:
            values = np.concatenate([values, mask[..., :1] * np.uint8(255)], axis=2)
        elif dtype.kind == "f":
            values = np.where(mask, values, np.nan).astype(values.dtype)
    if values.shape[2] != samples or values.dtype != dtype.newbyteorder("="):
        stored = f"{values.shape[2]} samples of {values.dtype}"
        raise ValueError(f"{stored} lie in it in place of {samples} of {dtype}")
    return values


def _ended(data: bytes) -> bytes:
    """`data`, if it ends as a JPEG does."""
    if b"\xff\xd9" not in data[-64:]:
        raise ValueError("premature end of JPEG data")
    return data


@dataclass(frozen=True)
class SegmentPixels:
    """The tiles or strips of a page; see `page_pixels`.

    Nothing stays open between reads, so that it survives a fork.
    """

    path: Path
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype
    segment: tuple[int, int]
    """(height, width) of a tile, or of a strip."""
    grid: tuple[int, int]
    """Rows and columns of segments."""
    planes: int
    """More than 1 if each channel has segments of its own, one channel's after the other's."""
    offsets: np.ndarray
    """Place of each segment in the file, in bytes."""
    counts: np.ndarray
    """Bytes of each segment; 0 for one that was never written."""
    decode: Decode
    convert: Callable[[np.ndarray], np.ndarray] | None
    blank: np.ndarray
    """The channels of a pixel that was never written."""
    _cache: "OrderedDict[int, np.ndarray]" = field(default_factory=OrderedDict, repr=False)
    _held: list[int] = field(default_factory=lambda: [0], repr=False)
    """Bytes of the segments in the cache."""
    _spooled: dict[int, tuple[Any, int, tuple[int, ...]]] = field(default_factory=dict, repr=False)
    """Temporary file, place in it and shape of segments that narrow reads of wide strips came for again and again."""
    _left: set[int] = field(default_factory=set, repr=False)
    """Segments that left the cache during narrow reads."""
    _page: list[Any] = field(default_factory=list, repr=False)
    """A page that is kept as a whole, (planes, height, width, samples), and which of its strips it has."""
    _spool: dict[int, Any] = field(default_factory=dict, repr=False)
    """The temporary file of each process, when there is one; None in its place if it is full."""
    _lock: Any = field(default_factory=ForkSafeLock, repr=False)

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width)."""
        planar = self.planes > 1
        if self._is_kept(width):
            return self._read_kept(y, x, height, width, channels)
        pixels = np.empty((len(channels), height, width) if planar else (height, width, len(channels)), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            if not planar:
                self._read_planes(file, [0], [pixels], y, x, channels)
                return pixels.transpose(2, 0, 1)
            self._read_planes(file, channels, [target[..., None] for target in pixels], y, x, [0])
            return pixels

    def _is_kept(self, width: int) -> bool:
        """True if parts of strips are read, of a page that is small enough to be kept as a whole when it is decoded."""
        is_narrow = self.grid[1] == 1 < self.grid[0] and 2 * width <= self.shape[2]
        return is_narrow and math.prod(self.shape) * self.dtype.itemsize <= MEMORY_BYTES

    def _read_kept(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """As `read`, from strips that are decoded once, each into its place in the page."""
        with self._lock:
            if not self._page:
                shape = (self.planes, *self.shape[1:], self.shape[0] // self.planes)
                self._page[:] = np.empty(shape, self.dtype), np.zeros((self.planes, self.grid[0]), bool)
        page, known = self._page
        samples, rows = range(page.shape[3]), self.segment[0]
        strips = range(y // rows, (y + height - 1) // rows + 1)
        for plane in channels if self.planes > 1 else [0]:
            missing = [row for row in strips if not known[plane, row]]
            if missing:
                top, bottom = missing[0] * rows, min((missing[-1] + 1) * rows, self.shape[1])
                with self.path.open("rb", buffering=0) as file:
                    self._read_planes(file, [plane], [page[plane, top:bottom]], top, 0, samples)
                known[plane, missing] = True
        region = page[:, y : y + height, x : x + width]
        if self.planes > 1:
            return region[list(channels), ..., 0]
        pixels = region[0] if list(channels) == list(samples) else region[0][..., list(channels)]
        return np.array(pixels).transpose(2, 0, 1)

    def _read_planes(
        self, file: Any, planes: Sequence[int], targets: Sequence[np.ndarray], y: int, x: int, channels: Sequence[int]
    ) -> None:
        """Fill each of `targets` (height, width, channels) from the segments of its plane, several segments at a time."""
        height, width, _ = targets[0].shape
        rows, columns = self.segment
        is_narrow = self.grid[1] == 1 and 2 * width <= self.shape[2]
        every = self.planes > 1 or list(channels) == list(range(self.shape[0]))

        def fill(place: tuple[int, int, int]) -> None:
            k, row, column = place
            index = self._index(planes[k], row, column)
            top, left = row * rows, column * columns
            first = max(y, top), max(x, left)
            end = min(y + height, top + rows), min(x + width, left + columns)
            inside = targets[k][first[0] - y : end[0] - y, first[1] - x : end[1] - x]
            if not self.counts[index]:
                inside[...] = self.blank[[planes[k]] if self.planes > 1 else list(channels)]
                return
            segment = self._decoded(index, file, is_narrow)
            part = segment[first[0] - top : end[0] - top, first[1] - left : end[1] - left]
            if part.shape[:2] != inside.shape[:2]:
                raise ValueError(f"a tile or strip of {part.shape[0]}x{part.shape[1]} pixels is too small")
            inside[...] = part if every else part[..., channels]

        places = [
            (k, row, column)
            for k in range(len(planes))
            for row in range(y // rows, (y + height - 1) // rows + 1)
            for column in range(x // columns, (x + width - 1) // columns + 1)
        ]
        apart = []
        if _WORKERS > 1 and self._segment_bytes() >= _PARALLEL_BYTES:
            apart = [place for place in places if self._index(planes[place[0]], *place[1:]) not in self._cache]
        if len(apart) > 1:
            for _ in _POOL.get().map(fill, apart):
                pass  # raises what a thread raised
            places = list(set(places).difference(apart))
        for place in places:
            fill(place)

    def _index(self, plane: int, row: int, column: int) -> int:
        """Number of a segment."""
        return (plane * self.grid[0] + row) * self.grid[1] + column

    def _segment_bytes(self) -> int:
        """Bytes of a decoded segment."""
        return math.prod(self.segment) * (1 if self.planes > 1 else self.shape[0]) * self.dtype.itemsize

    def _decoded(self, index: int, file: Any, is_narrow: bool) -> np.ndarray:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
            spooled = self._spooled.get(index)
            if spooled is None:
                file.seek(int(self.offsets[index]))
                count = int(self.counts[index])
                data = file.read(count)
        if spooled is not None:
            temporary, place, shape = spooled
            segment = np.array(np.memmap(temporary, self.dtype, "r", place, shape))
        elif len(data) < count:
            raise ValueError("the file ends before")
        else:
            segment = self.decode(data, index)
            if self.convert is not None:
                segment = self.convert(segment)
            if segment.nbytes > MEMORY_BYTES:
                segment = self._spilled(segment)
        with self._lock:
            if index not in self._cache:  # another thread may have decoded it, too
                self._held[0] += segment.nbytes
            self._cache[index] = segment
            self._shrink_cache(is_narrow)
        return segment

    def _shrink_cache(self, is_narrow: bool) -> None:
        """Drop the segments that were used longest ago; strips that narrow reads will come for again go to a file."""
        limit = max(CACHE_BYTES, self.grid[1] * self.planes * self._segment_bytes())
        if is_narrow:
            limit = max(limit, MEMORY_BYTES)
        while self._held[0] > limit and len(self._cache) > 1:
            index, segment = self._cache.popitem(last=False)
            self._held[0] -= segment.nbytes
            if is_narrow and index not in self._spooled:
                if index in self._left:
                    self._write(index, segment)
                self._left.add(index)

    def _write(self, index: int, segment: np.ndarray) -> None:
        """Keep a segment in the temporary file, while there is room."""
        process = os.getpid()
        try:
            if process not in self._spool:
                file: Any = TemporaryFile(prefix="widefield-", buffering=0)  # noqa: SIM115 - closed with this object
                weakref.finalize(self, file.close)
                self._spool[process] = file
            if (file := self._spool[process]) is not None:
                place = file.seek(0, os.SEEK_END)
                if file.write(np.ascontiguousarray(segment, self.dtype).data) < segment.nbytes:
                    raise OSError("the disk is full")
                self._spooled[index] = file, place, segment.shape
        except OSError:
            self._spool[process] = None

    def _spilled(self, segment: np.ndarray) -> np.ndarray:
        """A segment too large for memory (a file of one compressed strip), as a map of a temporary file."""
        file = temporary_file(self.path, iter(np.array_split(segment, math.ceil(segment.nbytes / MEMORY_BYTES))))
        weakref.finalize(self, file.close)
        return np.memmap(file, segment.dtype, "r", 0, segment.shape)
