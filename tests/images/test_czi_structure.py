"""A CZI file whose directory, or the head of a tile, is damaged is refused when it is opened, and never read with a gap."""

import re
import struct

import imagecodecs
import numpy as np
import pytest
from pylibCZIrw import czi as pyczi

from widefield.images import ImageReadError, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 60, 1)).astype(np.uint8)


def _write(path, compression=None):
    """Three tiles side by side."""
    with pyczi.create_czi(str(path), compression_options=compression) as file:
        for k in range(3):
            file.write(np.ascontiguousarray(PIXELS[:, 20 * k : 20 * k + 20]), (20 * k, 0), {"C": 0, "T": 0})
    return path


def _tiles(content):
    """Places of the segments of tiles."""
    return [match.start() for match in re.finditer(rb"ZISRAWSUBBLOCK\0\0", content)]


def _entries(content):
    """Places of the entries of the directory."""
    start = content.index(b"ZISRAWDIRECTORY") + 32
    places, at = [], start + 128
    for _ in range(struct.unpack_from("<i", content, start)[0]):
        places.append(at)
        at += 32 + 20 * struct.unpack_from("<i", content, at + 28)[0]
    return places, at


@pytest.mark.parametrize("compression", [None, "zstd1:"])
def test_a_flipped_bit_of_what_tells_where_tiles_lie_is_an_error_or_changes_nothing(tmp_path, compression):
    path = _write(tmp_path / "a.czi", compression)
    content, random = path.read_bytes(), np.random.default_rng(0)
    entries, end = _entries(content)
    tile = _tiles(content)[1]
    refused = 0
    for place in (*range(84, 92), *range(tile, tile + 64 + 16 + 20 * 6), *range(entries[0] - 160, end, 3)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            pixels = open_image(path).read(0, 0, 20, 60)
        except ImageReadError:
            refused += 1
            continue
        np.testing.assert_array_equal(pixels[0], PIXELS[..., 0], err_msg=f"byte {place}")
    assert refused > 100


@pytest.mark.parametrize(
    ("part", "offset", "value", "problem"),
    [
        ("entry", 2, 1, "tile 1 says .* where the directory says"),
        ("entry", 18, 1, "tile 1 says .* where the directory says"),
        ("entry", 36, 2**20, "tile 1 says .* where the directory says"),
        ("tile", 40, 399, "tile 1 holds 399 of its 400 bytes"),
        ("tile", 32, 7, "tile 1 has metadata that do not end as XML does"),
        ("tile", 40, 2**20, "tile 1 has .* and 1048576 bytes, which are not there"),
        ("directory", 0, 2, "its directory has more than the 2 tiles that it says"),
        ("directory", -32, 0x20202020, "its directory does not lie where it says"),
        ("both", 18, 1, "its tiles are compressed by JPEG; expected JPEG XR, Zstandard, or none"),
        ("both", 18, 4, "tile 1 is no JPEG XR, as it says"),
        ("both", 18, 5, "tile 1 holds 0 of its 400 bytes"),
    ],
)
def test_damage_of_the_structure_is_named(tmp_path, part, offset, value, problem):
    path = _write(tmp_path / "a.czi")
    content = bytearray(path.read_bytes())
    entry, tile = _entries(content)[0][1], _tiles(content)[1]
    directory = content.index(b"ZISRAWDIRECTORY") + 32
    places = {"entry": [entry], "tile": [tile], "directory": [directory], "both": [entry, tile + 48]}[part]
    for place in places:
        struct.pack_into("<I", content, place + offset, value)
    path.write_bytes(content)
    with pytest.raises(ImageReadError, match=rf"cannot read .*a\.czi: .*{problem}"):
        open_image(path)


def test_tiles_of_jpeg_xr_are_read_and_smaller_ones_refused(tmp_path):
    path = _write(tmp_path / "a.czi")
    for rows in (20, 19):
        content = bytearray(path.read_bytes())
        for k, (tile, entry) in enumerate(zip(_tiles(content), _entries(content)[0], strict=True)):
            packed = imagecodecs.jpegxr_encode(np.full((rows, 20), 40 * k, np.uint8))
            start = tile + 32 + 256 + struct.unpack_from("<i", content, tile + 32)[0]
            assert len(packed) <= 400
            content[start : start + len(packed)] = packed
            struct.pack_into("<q", content, tile + 40, len(packed))
            for place in (entry, tile + 48):
                struct.pack_into("<i", content, place + 18, 4)
        (tmp_path / f"{rows}.czi").write_bytes(content)
    np.testing.assert_array_equal(open_image(tmp_path / "20.czi").read(0, 0, 20, 60)[0, 0], np.repeat([0, 40, 80], 20))
    with pytest.raises(ImageReadError, match=r"19\.czi: .*tile 0 holds 380 of its 400 pixels"):
        open_image(tmp_path / "19.czi")
