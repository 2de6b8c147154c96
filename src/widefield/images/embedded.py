"""Sizes that compressed pictures declare in their headers, read before anything is decoded."""

import struct

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG that begin a frame."""

_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height, by their numbers in JPEG XL from 1 on."""


def declared_size(data: bytes) -> tuple[int, int, int] | None:
    """Return (height, width, values per pixel) of a picture in JPEG, JPEG 2000, PNG, WebP, JPEG XL, JPEG XR or LERC.

    Values per pixel are counted for LERC only, else 1: it may hold any number, where the others have few. None if it is none of
    these, or its header is damaged so that no decoder would go on.
    """
    try:
        return _declared_size(data)
    except struct.error:  # it ends within the header
        return None


def _declared_size(data: bytes) -> tuple[int, int, int] | None:
    if data.startswith(b"\x89PNG"):
        width, height = struct.unpack_from(">II", data, 16)
        return height, width, 1
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    if data.startswith((b"Lerc2 ", b"CntZImage ")):
        return _lerc(data)
    if data.startswith(b"\xff\x0a"):
        return _jpeg_xl(data, 0)
    if data[4:8] == b"JXL ":
        whole, part = data.find(b"jxlc", 0, 4096), data.find(b"jxlp", 0, 4096)
        return _jpeg_xl(data, whole + 4 if whole >= 0 else part + 8)
    if data.startswith(b"II\xbc"):
        return _jpeg_xr(data)
    if (start := data[:4096].find(b"\xff\x4f\xff\x51")) >= 0:  # JPEG 2000: SIZ follows the start of the codestream
        right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
        return max(bottom - top, 0), max(right - left, 0), 1
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _JPEG_FRAMES:
            return *struct.unpack_from(">HH", data, at + 5), 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp(data: bytes) -> tuple[int, int, int] | None:
    """By RFC 9649, sections 2.5 to 2.7: the canvas, or the only picture."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[27:30], "little"), 1 + int.from_bytes(data[24:27], "little"), 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF), 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF, 1


def _lerc(data: bytes) -> tuple[int, int, int]:
    """Each band may be a blob of its own; of LERC 2 a pixel of a blob has several values since its version 4."""
    if data.startswith(b"CntZImage "):
        height, width = struct.unpack_from("<II", data, 18)
        return height, width, data.count(b"CntZImage ")
    (version,) = struct.unpack_from("<i", data, 6)
    height, width, values = struct.unpack_from("<III", data, 10 if version < 3 else 14)
    return height, width, data.count(b"Lerc2 ") * (values if version > 3 else 1)


def _jpeg_xl(data: bytes, start: int) -> tuple[int, int, int]:
    """The SizeHeader of ISO/IEC 18181-1, section D.2, whose bits come from the lowest of each byte on."""
    bits, at = int.from_bytes(data[start + 2 : start + 14], "little"), 0

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> at - count & (1 << count) - 1

    is_small = take(1)

    def side() -> int:
        return 8 * (1 + take(5)) if is_small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), take(3)
    if ratio == 0:
        return height, side(), 1
    over, under = _RATIOS[ratio - 1]
    return height, height * over // under, 1


def _jpeg_xr(data: bytes) -> tuple[int, int, int] | None:
    """The tags of width and height of ITU-T T.832, annex A, a container like TIFF."""
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    tags = {}
    for k in range(count):
        tag, kind, _, value = struct.unpack_from("<HHII", data, place + 2 + 12 * k)
        tags[tag] = value & (0xFF, 0xFFFF, 0xFFFFFFFF)[{1: 0, 3: 1}.get(kind, 2)]
    return (tags[0xBC81], tags[0xBC80], 1) if {0xBC80, 0xBC81} <= tags.keys() else None
