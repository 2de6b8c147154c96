"""LZW tiles and strips by libtiff, which decodes them faster than imagecodecs' own decoder: each as a TIFF file of one strip."""

import struct
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np

_SHORT, _LONG = 3, 4
"""Types of the values of tags."""


def lzw_decoder(page: Any, samples: int) -> Callable[[bytes, int], np.ndarray] | None:
    """Return a function of LZW bytes and a number of rows that decodes (rows, width, samples); None where it would not be right.

    Args:
        page: tifffile's page.
        samples: Samples of a pixel that lie side by side.
    """
    kind, bits = page.dtype.kind, page.bitspersample
    if (
        kind != "u"
        or bits not in (8, 16, 32)
        or not 1 <= samples <= 4
        or page.predictor not in (1, 2)
        or page.fillorder != 1
    ):
        return None
    order = page.parent.byteorder
    width = page.tilewidth if page.is_tiled else page.imagewidth
    dtype = page.dtype.newbyteorder("=")

    def decode(data: bytes, rows: int) -> np.ndarray:
        pixels: np.ndarray = imagecodecs.tiff_decode(_strip(data, order, rows, width, samples, bits, page.predictor))
        return pixels.astype(dtype, copy=False).reshape(rows, width, samples)

    return decode


def _strip(data: bytes, order: str, rows: int, width: int, samples: int, bits: int, predictor: int) -> bytes:
    """A TIFF file of one LZW strip (TIFF 6.0, sections 2, 13 and 14)."""
    extra = max(0, samples - 3) if samples >= 3 else samples - 1
    tags = [
        (256, _LONG, [width]),
        (257, _LONG, [rows]),
        (258, _SHORT, [bits] * samples),
        (259, _SHORT, [5]),
        (262, _SHORT, [2 if samples >= 3 else 1]),
        (273, _LONG, [0]),  # where the strip begins, which is known below
        (277, _SHORT, [samples]),
        (278, _LONG, [rows]),
        (279, _LONG, [len(data)]),
        (317, _SHORT, [predictor]),
        *([(338, _SHORT, [0] * extra)] if extra else []),
    ]
    place = 8 + 2 + 12 * len(tags) + 4
    entries, beyond = b"", b""
    for tag, kind, values in tags:
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == _SHORT else 'I'}", *values)
        if len(packed) > 4:
            packed, beyond = struct.pack(f"{order}I", place + len(beyond)), beyond + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    start = place + len(beyond)
    at = 12 * 5 + 8
    entries = entries[:at] + struct.pack(f"{order}I", start) + entries[at + 4 :]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + beyond + data
