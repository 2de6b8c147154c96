"""DICOM images (mammograms, radiographs, photographs), through pydicom, which the extra `dicom` brings; OpenSlide reads slides."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from widefield.images.embedded import check_picture
from widefield.images.formats import (
    MAX_SEGMENT_BYTES,
    Choice,
    Contents,
    ForkSafeLock,
    cannot_read,
    check_planes,
    check_segment,
    choose_series,
    image_format,
    known,
    optional,
)

_GREY_OR_RGB = ("MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


@image_format("DICOM", endings=(".dcm",), recognises=lambda path, start: start[128:132] == b"DICM")
def open_dicom(path: Path, choice: Choice) -> Contents:
    """Open one frame of a DICOM image. Values are as stored (no window, no rescale slope); MONOCHROME1 is inverted."""
    pydicom: Any = optional("pydicom", path, "dicom")
    decoders: Any = optional("pydicom.pixels", path, "dicom")
    _check_deflated(path)
    header = pydicom.dcmread(path, stop_before_pixels=True)
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise cannot_read(path, f"it is a DICOM file without an image ({header.get('Modality', 'of no modality')})")
    size = int(header.Rows), int(header.Columns)
    frames, samples = int(header.get("NumberOfFrames") or 1), int(header.SamplesPerPixel)
    colours = str(header.PhotometricInterpretation)
    decoder = decoders.get_decoder(header.file_meta.TransferSyntaxUID)
    kind = "f" if "PixelRepresentation" not in header else "i" if header.PixelRepresentation else "u"
    dtype = np.dtype(f"{kind}{max(8, int(header.BitsAllocated)) // 8}")
    if kind != "f" and header.get("HighBit", header.BitsStored - 1) != header.BitsStored - 1:
        bits = f"its {header.BitsStored} bits end at bit {header.HighBit} of a pixel"
        raise cannot_read(path, f"{bits}, which is not supported; expected bit {header.BitsStored - 1}")
    if not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise cannot_read(path, f"nothing decodes {header.file_meta.TransferSyntaxUID.name}: {missing}")
    if colours not in _GREY_OR_RGB:
        raise cannot_read(path, f"its colours are {colours}; convert it to RGB first")
    check_planes(path, [frames])
    check_segment(path, "frame", (*size, samples), dtype.itemsize)
    frame = choose_series(path, choice.series, [f"frame {k}" for k in range(frames)], [size] * frames)
    white = 2 ** int(header.BitsStored) - 1 if colours == "MONOCHROME1" and dtype.kind == "u" else None
    y, x = header.get("PixelSpacing") or header.get("ImagerPixelSpacing") or (float("nan"),) * 2
    pixels = FramePixels(path, (samples, *size), dtype, frame, frames == 1, white)
    return Contents(levels=(size,), pixels=lambda level: pixels, spacing=known(float(y) * 1000, float(x) * 1000))


@dataclass(frozen=True)
class FramePixels:
    """One frame of a DICOM file, decoded as a whole at the first read."""

    path: Path
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype
    frame: int
    is_alone: bool
    """True if there are no other frames."""
    white: int | None
    """Value that is shown as black, where large values are dark; None where they are bright."""
    _decoded: list[np.ndarray] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=ForkSafeLock, repr=False)

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width)."""
        with self._lock:
            if not self._decoded:
                self._decoded.append(self._decode())
        return self._decoded[0][y : y + height, x : x + width, list(channels)].transpose(2, 0, 1)

    def _decode(self) -> np.ndarray:
        decoders: Any = optional("pydicom.pixels", self.path, "dicom")
        pydicom: Any = optional("pydicom", self.path, "dicom")
        source: Any = self.path
        if self.is_alone:  # read as a whole, also deflated files and those with damaged tables of frames can be decoded
            source = pydicom.dcmread(self.path)
        self._check_packed(pydicom, source)
        decoded = decoders.pixel_array(source, index=self.frame)
        if decoded.dtype.kind != self.dtype.kind:
            raise ValueError(f"its pixels are {decoded.dtype}, where its header says {self.dtype}")
        pixels = np.asarray(decoded, self.dtype).reshape(*self.shape[1:], self.shape[0])
        return pixels if self.white is None else self.dtype.type(self.white) - pixels

    def _check_packed(self, pydicom: Any, source: Any) -> None:
        """Raise a ValueError if a compressed frame says that it has far more pixels than the header, or unpacks to them."""
        encaps: Any = optional("pydicom.encaps", self.path, "dicom")
        with self.path.open("rb") as file:
            header = source if self.is_alone else pydicom.dcmread(file, stop_before_pixels=True)
            syntax = header.file_meta.TransferSyntaxUID
            if not syntax.is_encapsulated:
                return
            if not self.is_alone:
                file.seek(_ELEMENT_BYTES, 1)
            else:
                _check_items(header.PixelData)
            tables = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
            frame = encaps.get_frame(
                header.PixelData if self.is_alone else file,
                self.frame,
                number_of_frames=int(header.get("NumberOfFrames") or 1),
                extended_offsets=tables if all(tables) else None,
            )
        samples, height, width = self.shape
        if syntax == pydicom.uid.RLELossless:
            _check_rle(frame, height * width)
        else:
            check_picture(frame, 2 * (height + 16) * (width + 16), samples)


def _check_items(data: bytes) -> None:
    """Raise a ValueError unless compressed pixels are items one behind the other to their end (PS3.5, A.4).

    pydicom decodes what it finds, also if bytes are missing or too many.
    """
    at = 0
    while at + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, at)
        if (group, element) != (0xFFFE, 0xE000):
            raise ValueError(f"({group:04X},{element:04X}) stands where an item of compressed pixels is to begin")
        at += 8 + length
    if at != len(data):
        raise ValueError(f"items of compressed pixels reach to {at} of {len(data)} bytes")


_ELEMENT_BYTES = 12
"""Bytes before the value of an element whose length takes 32 bits."""


def _check_deflated(path: Path) -> None:
    """Refuse a deflated file that inflates to too much: pydicom does so as a whole, whatever is asked for."""
    with path.open("rb") as file:
        start = file.read(144)
        (count,) = struct.unpack("<I", start[140:])
        if b"1.2.840.10008.1.2.1.99" not in file.read(min(count, 2**16)):
            return
        file.seek(144 + count)
        stream, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not stream.eof and (packed := stream.unconsumed_tail or file.read(2**20)):
            size += len(stream.decompress(packed, 2**24))
            if size > MAX_SEGMENT_BYTES:
                raise cannot_read(path, f"it inflates to more than {MAX_SEGMENT_BYTES / 2**20:.0f} MiB, the limit")


def _check_rle(frame: bytes, pixels: int) -> None:
    """Raise a ValueError if a segment of a frame of run lengths (PS3.5, annex G), a byte of each pixel, unpacks to far more."""
    count, *starts = struct.unpack_from("<16I", frame)
    ends = [*starts[1:count], len(frame)]
    limit = 2 * pixels + 2**16
    for start, end in zip(starts[:count], ends):
        try:
            imagecodecs.packbits_decode(frame[start:end], out=limit)
        except imagecodecs.PackbitsError as error:
            if "OUTPUT_TOO_SMALL" in str(error):  # else it is padded, or damaged: that is for pydicom to judge
                raise ValueError(f"a segment of run lengths unpacks to more than {limit} bytes, the limit") from error
