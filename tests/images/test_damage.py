"""Damaged copies of files give an error of ours or pixels, never another error; what would decode to too much is refused."""

import struct
import zipfile
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr

from tests.microscopy_files import write_lif, write_nd2
from widefield.errors import WidefieldError
from widefield.images import ImageReadError, open_image, photos, zarrs

PIXELS = (np.indices((60, 75)).sum(0)[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)


def _palette(path):
    table = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)
    tifffile.imwrite(path, PIXELS[..., 0], photometric="palette", colormap=table, compression="lzw", tile=(32, 32))


def _svs(path):
    described = {"description": "Aperio Image Library v1\r\n75x60|AppMag = 20|MPP = 0.5", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(PIXELS, photometric="rgb", compression="jpeg", tile=(32, 32), **described)
        file.write(PIXELS[::4, ::4], photometric="rgb", **described)
        label = {"description": "Aperio\r\nlabel 30x30", "metadata": None, "subfiletype": 1}
        file.write(PIXELS[:30, :30], photometric="rgb", compression="lzw", **label)


def _zarr_zip(path):
    with zarr.storage.ZipStore(path, mode="w") as store:
        levels = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [0.5, 0.5]}]}]
        described = {"multiscales": [{"axes": [{"name": "y"}, {"name": "x"}], "datasets": levels}]}
        group = zarr.create_group(store, zarr_format=2, attributes=described)
        group.create_array("0", shape=(60, 75), dtype="u1", chunks=(32, 32))[:] = PIXELS[..., 0]


WRITERS = {
    "a.tif": _palette,
    "a.svs": _svs,
    "a.zarr.zip": _zarr_zip,
    "a.nd2": lambda path: write_nd2(path, [PIXELS] * 2, loops=(("T", 2),), lossless=True),
    "a.lif": lambda path: write_lif(path, {"A": {"pixels": PIXELS, "tags": [3, 2, 1], "pad": 2}}),
}


def _damaged(content, random):
    """A copy with a byte, a number or the end changed, more often near the start, where headers are."""
    copy = bytearray(content)
    place = int(random.integers(len(copy) if random.random() < 0.4 else min(len(copy), 600)))
    match int(random.integers(5)):
        case 0:
            copy[place] = random.integers(256)
        case 1:
            copy[place : place + 4] = random.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"])
        case 2:
            del copy[place : place + int(random.integers(1, 9))]
        case 3:
            copy[place:place] = random.bytes(2)
        case 4:
            del copy[place:]
    return bytes(copy)


@pytest.mark.filterwarnings("ignore")  # of the libraries, about what they find damaged
@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_copy_gives_an_error_of_ours_or_pixels(tmp_path, name):
    path, random = tmp_path / name, np.random.default_rng(0)
    WRITERS[name](path)
    content, opened = path.read_bytes(), 0
    for _ in range(60):
        path.write_bytes(_damaged(content, random))
        try:
            image = open_image(path, series=0)
            _, height, width = image.shape
            image.read(0, 0, min(height, 60), min(width, 75))
            for read in image.associated_images.values():
                read()
            opened += 1
        except WidefieldError as error:
            assert str(path) in str(error)
    assert opened < 60


def test_a_damaged_picture_beside_a_slide_is_named(tmp_path):
    _svs(tmp_path / "a.svs")
    content = (tmp_path / "a.svs").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.svs") as file:
        place = file.pages[2].dataoffsets[0]
    (tmp_path / "a.svs").write_bytes(content[: place + 50] + bytes(300) + content[place + 350 :])
    with pytest.raises(ImageReadError, match=r"a\.svs: its picture 'label' is truncated or corrupt"):
        open_image(tmp_path / "a.svs").associated_images["label"]()


def _replace_tile(path, tile, compression):
    """A TIFF file of one 64 x 64 tile, the bytes of which are another picture."""
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(64, 64), compression=compression)
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        places = tags["TileOffsets"].valueoffset, tags["TileByteCounts"].valueoffset
    content = bytearray(path.read_bytes())
    for place, value in zip(places, (len(content), len(tile)), strict=True):
        struct.pack_into("<I", content, place, value)
    path.write_bytes(content + tile)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "png"])
def test_a_picture_larger_than_the_tile_that_it_lies_in_is_not_decoded(tmp_path, compression):
    encode = {"jpeg": imagecodecs.jpeg8_encode, "jpeg2000": imagecodecs.jpeg2k_encode, "png": imagecodecs.png_encode}
    for side, fits in ((64, True), (500, False)):
        _replace_tile(tmp_path / "a.tif", encode[compression](np.zeros((side, side), np.uint8)), compression)
        image = open_image(tmp_path / "a.tif")
        if fits:
            assert not image.read(0, 0, 64, 64).any()
            continue
        with pytest.raises(ImageReadError, match=r"a\.tif: .*a picture of 500 by 500 pixels lies in it"):
            image.read(0, 0, 1, 1)


def test_a_picture_of_absurd_size_is_refused_with_the_limit(tmp_path):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", 300_000, 300_000, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    limit = photos.MAX_DECODED_BYTES // 2**30
    with pytest.raises(ImageReadError, match=rf"a\.png: it has 300000x300000 pixels, 84 GiB.* limit is {limit} GiB"):
        open_image(tmp_path / "a.png")


def test_parts_of_a_zip_file_that_unpack_to_too_much_or_lie_within_themselves_are_refused(tmp_path, monkeypatch):
    _zarr_zip(tmp_path / "a.zarr.zip")
    with zipfile.ZipFile(tmp_path / "a.zarr.zip") as archive:
        largest = max(member.file_size for member in archive.infolist() if member.filename.endswith(".zattrs"))
    monkeypatch.setattr(zarrs, "MAX_METADATA_BYTES", largest - 1)
    with pytest.raises(ImageReadError, match=r"a\.zarr\.zip: \.zattrs in it has .* the limit is"):
        open_image(tmp_path / "a.zarr.zip")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "a") as archive:
        archive.writestr("/.zgroup", '{"zarr_format": 2}')
    with pytest.raises(ImageReadError, match=r"a\.zarr\.zip: it is damaged: it holds a part of the name '/\.zgroup'"):
        open_image(tmp_path / "a.zarr.zip")
