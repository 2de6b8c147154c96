"""Sizes that compressed pictures declare in their headers, read before anything is decoded."""

import struct

_JPEG_FRAMES = frozenset((*range(0xC0, 0xD0), 0xF7)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG, or JPEG-LS, that begin a frame."""

_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
"""Width to height, by their numbers in JPEG XL from 1 on."""


def declared_size(data: bytes) -> tuple[int, int, int] | None:
    """Return (height, width, values per pixel) of a picture in JPEG, JPEG-LS, JPEG 2000, PNG, WebP, JPEG XL, JPEG XR or LERC.

    Values per pixel are counted for JPEG, LERC, JPEG 2000 and JPEG XL (one and its extra channels); else 1, the others have few.
    None if it is none of these, or its header is damaged so that no decoder would go on.

    Raises:
        ValueError: It is an animation in JPEG XL, whose header does not tell the number of pictures.
    """
    try:
        return _declared_size(data)
    except struct.error:  # it ends within the header
        return None


def check_picture(data: bytes, most: int, samples: int) -> None:
    """Look at the size that a picture in a tile, strip or frame declares, before it is decoded.

    Args:
        data: The compressed picture.
        most: Pixels that it may have.
        samples: Values of a pixel that is expected.

    Raises:
        ValueError: It is larger.
    """
    height, width, values = declared_size(data) or (0, 0, 1)
    if height * width * values > most * (samples if values > 1 else 1):
        each = f" of {values} values" if values > 1 else ""
        raise ValueError(f"a picture of {height} by {width} pixels{each} lies in it, which can hold {most} pixels")


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
        right, bottom, left, top, values = struct.unpack_from(">IIII16xH", data, start + 8)
        return max(bottom - top, 0), max(right - left, 0), values
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _JPEG_FRAMES:
            return struct.unpack_from(">HHB", data, at + 5)
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


class _Bits:
    """Numbers of JPEG XL's headers, whose bits come from the lowest of each byte on."""

    def __init__(self, data: bytes) -> None:
        self._bits, self._at, self._size = int.from_bytes(data, "little"), 0, 8 * len(data)

    def take(self, count: int) -> int:
        self._at += count
        if self._at > self._size:
            raise struct.error
        return self._bits >> self._at - count & (1 << count) - 1

    def one_of(self, *ways: tuple[int, int]) -> int:
        """U32 of the standard: two bits choose a way, the least number and the bits of what is added to it."""
        least, count = ways[self.take(2)]
        return least + self.take(count)

    def size(self, small: int, *ways: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of a SizeHeader or PreviewHeader; sides that are multiples of 8 may be `small`."""
        is_small = self.take(1)

        def side() -> int:
            if not is_small:
                return self.one_of(*ways)
            return 8 * (1 + self.take(small) if small else self.one_of((16, 0), (32, 0), (1, 5), (33, 9)))

        height, ratio = side(), self.take(3)
        if ratio == 0:
            return height, side()
        over, under = _RATIOS[ratio - 1]
        return height, height * over // under


_SIDES = (5, (1, 9), (1, 13), (1, 18), (1, 30))
_PREVIEW_SIDES = (0, (1, 6), (65, 8), (321, 10), (1345, 12))


def _jpeg_xl(data: bytes, start: int) -> tuple[int, int, int] | None:
    """By ISO/IEC 18181-1, annex D: SizeHeader, and of ImageMetadata the mark of an animation and the number of extra channels."""
    bits = _Bits(data[start + 2 : start + 64])
    height, width = bits.size(*_SIDES)
    if bits.take(1):  # all else is as usual
        return height, width, 1
    if bits.take(1):
        bits.take(3)  # orientation
        if bits.take(1):
            bits.size(*_SIDES)
        if bits.take(1):
            bits.size(*_PREVIEW_SIDES)
        if bits.take(1):
            raise ValueError("it is an animation; expected one picture")
    if bits.take(1):  # floats
        bits.one_of((32, 0), (16, 0), (24, 0), (1, 6))
        bits.take(4)
    else:
        bits.one_of((8, 0), (10, 0), (12, 0), (1, 6))
    bits.take(1)
    return height, width, 1 + bits.one_of((0, 0), (1, 0), (2, 4), (1, 12))


def _jpeg_xr(data: bytes) -> tuple[int, int, int] | None:
    """The tags of width and height of ITU-T T.832, annex A, a container like TIFF."""
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    tags = {}
    for k in range(count):
        tag, kind, _, value = struct.unpack_from("<HHII", data, place + 2 + 12 * k)
        tags[tag] = value & (0xFF, 0xFFFF, 0xFFFFFFFF)[{1: 0, 3: 1}.get(kind, 2)]
    return (tags[0xBC81], tags[0xBC80], 1) if {0xBC80, 0xBC81} <= tags.keys() else None


def zstd_content_size(data: bytes) -> int | None:
    """Return the number of bytes that a Zstandard frame unpacks to, by its header (RFC 8878, section 3.1.1.1).

    None if it does not say, or is no such frame.
    """
    if not data.startswith(b"\x28\xb5\x2f\xfd") or len(data) < 5:
        return None
    flags = data[4]
    is_single, kind = flags >> 5 & 1, flags >> 6
    count = (is_single, 2, 4, 8)[kind]
    start = 6 - is_single + (0, 1, 2, 4)[flags & 3]
    if not count or len(data) < start + count:
        return None
    return int.from_bytes(data[start : start + count], "little") + 256 * (count == 2)
