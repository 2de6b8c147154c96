"""Damaged copies of files give an error of ours or pixels, never another error; what would decode to too much is refused."""

import struct
import zipfile
import zlib
from functools import partial

import h5py
import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
import zarr
from pydicom.uid import RLELossless
from pylibCZIrw import czi as pyczi

from tests.dicom_files import write_dicom
from tests.microscopy_files import write_lif, write_nd2, write_oif
from tests.slide_files import write_ndpi
from widefield.errors import WidefieldError
from widefield.images import ImageReadError, embedded, open_image, photos, zarrs
from widefield.images.formats import image_formats

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


def _czi(path):
    with pyczi.create_czi(str(path)) as file:
        file.write(np.ascontiguousarray(PIXELS[..., :1]), (0, 0), {"C": 0, "T": 0})


def _features(path):
    with h5py.File(path, "w") as file:
        file["features"] = np.arange(40, dtype=np.float32).reshape(10, 4)


WRITERS = {
    "a.tif": _palette,
    "a.svs": _svs,
    "a.zarr.zip": _zarr_zip,
    "a.nd2": lambda path: write_nd2(path, [PIXELS] * 2, loops=(("T", 2),), lossless=True),
    "a.oib": lambda path: write_oif(path, {"s_C001.tif": PIXELS[..., 0], "s_C002.tif": PIXELS[..., 1]}, ("A", "B")),
    "a.lif": lambda path: write_lif(path, {"A": {"pixels": PIXELS, "tags": [3, 2, 1], "pad": 2}}),
    "a.czi": _czi,
    "a.ndpi": lambda path: write_ndpi(path, PIXELS[:32, :32]),
    "a.dcm": lambda path: write_dicom(path, PIXELS, syntax=RLELossless),
    "a.jp2": lambda path: path.write_bytes(imagecodecs.jpeg2k_encode(PIXELS, level=0, codecformat="jp2")),
    "a.png": lambda path: path.write_bytes(imagecodecs.png_encode(PIXELS)),
    "a.gif": lambda path: path.write_bytes(imagecodecs.gif_encode(PIXELS[..., 0])),
    "a.ppm": lambda path: path.write_bytes(b"P6 75 60 255\n" + PIXELS.tobytes()),
    "a.npy": lambda path: np.save(path, PIXELS),
    "a.h5": _features,
}
"""By the name of a file, which has an ending of its format. Without an ending are a folder, and files that are refused."""


def test_damage_is_tried_of_every_format_that_is_told_by_an_ending():
    untested = [
        one.name for one in image_formats() if one.endings and not any(name.endswith(one.endings) for name in WRITERS)
    ]
    assert not untested, "WRITERS lacks a small file of each"


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


def _replace_tile(path, tile, compression, samples=1):
    """A TIFF file of one 64 x 64 tile, the bytes of which are another picture."""
    pixels = np.zeros((64, 64, samples)[: 2 + (samples > 1)], np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), compression=compression)
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        places = tags["TileOffsets"].valueoffset, tags["TileByteCounts"].valueoffset
    content = bytearray(path.read_bytes())
    for place, value in zip(places, (len(content), len(tile)), strict=True):
        struct.pack_into("<I", content, place, value)
    path.write_bytes(content + tile)


ENCODERS = {
    "jpeg": imagecodecs.jpeg8_encode,
    "jpeg2000": imagecodecs.jpeg2k_encode,
    "png": imagecodecs.png_encode,
    "webp": imagecodecs.webp_encode,
    "jpegxl": partial(imagecodecs.jpegxl_encode, effort=1),
    "jpegxr": imagecodecs.jpegxr_encode,
    "lerc": imagecodecs.lerc_encode,
}


@pytest.mark.parametrize("compression", ENCODERS)
def test_a_picture_larger_than_the_tile_that_it_lies_in_is_not_decoded(tmp_path, compression):
    samples = 3 if compression == "webp" else 1
    for height, width, fits in ((64, 64, True), (500, 400, False)):
        tile = ENCODERS[compression](np.zeros((height, width, samples)[: 2 + (samples > 1)], np.uint8))
        _replace_tile(tmp_path / "a.tif", tile, compression, samples)
        image = open_image(tmp_path / "a.tif")
        if fits:
            assert not image.read(0, 0, 64, 64).any()
            continue
        with pytest.raises(ImageReadError, match=r"a\.tif: .*a picture of 500 by 400 pixels lies in it"):
            image.read(0, 0, 1, 1)


def test_a_lerc_tile_of_many_values_for_each_pixel_is_not_decoded(tmp_path):
    one = imagecodecs.lerc_encode(np.zeros((64, 64), np.uint8))
    for tile in (imagecodecs.lerc_encode(np.zeros((64, 64, 40), np.uint8)), one * 40):
        _replace_tile(tmp_path / "a.tif", tile, "lerc")
        with pytest.raises(ImageReadError, match="a picture of 64 by 64 pixels of 40 values lies in it"):
            open_image(tmp_path / "a.tif").read(0, 0, 1, 1)


@pytest.mark.parametrize("pack", [zlib.compress, imagecodecs.zstd_encode])
def test_a_lerc_tile_within_another_compression_is_unpacked_so_far_as_it_may_be_large(tmp_path, pack):
    one = imagecodecs.lerc_encode(np.full((64, 64), 3, np.uint8))
    _replace_tile(tmp_path / "a.tif", pack(one), "lerc")
    assert np.all(open_image(tmp_path / "a.tif").read(0, 0, 64, 64) == 3)
    _replace_tile(tmp_path / "a.tif", pack(one + bytes(2**20)), "lerc")
    with pytest.raises(ImageReadError, match=r"a\.tif: truncated or corrupt data"):
        open_image(tmp_path / "a.tif").read(0, 0, 1, 1)


@pytest.mark.parametrize("compression", ENCODERS)
def test_the_size_that_a_picture_declares_is_read_from_its_header(compression):
    for shape in ((1, 1, 3), (8, 16, 3), (120, 160, 3), (300, 1100, 3)):
        data = ENCODERS[compression](np.full(shape, 7, np.uint8))
        assert embedded.declared_size(data) == (*shape[:2], 3 if compression in ("jpeg", "lerc", "jpeg2000") else 1)
        for end in (0, 5, 20):
            embedded.declared_size(data[:end])
    for options in ({"lossless": True}, {"usecontainer": True}):
        if compression == {"lossless": "webp", "usecontainer": "jpegxl"}[next(iter(options))]:
            assert embedded.declared_size(ENCODERS[compression](np.zeros((9, 700, 3), np.uint8), **options)) == (
                9,
                700,
                1,
            )


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


@pytest.mark.parametrize(("samples", "held"), [(1, 3), (3, 1)])
def test_a_jpeg_tile_of_other_colours_than_the_page_is_an_error(tmp_path, samples, held):
    tile = imagecodecs.jpeg8_encode(np.zeros((64, 64, held)[: 2 + (held > 1)], np.uint8))
    pixels = np.zeros((64, 64, samples)[: 2 + (samples > 1)], np.uint8)
    _replace_tile(tmp_path / "a.tif", tile, "jpeg", samples)
    assert open_image(tmp_path / "a.tif").shape == (samples, *pixels.shape[:2])
    with pytest.raises(ImageReadError, match=rf"a\.tif: .*a picture of {held} colours lies in it; expected"):
        open_image(tmp_path / "a.tif").read(0, 0, 9, 9)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-9] + data[-7:], lambda data: data + b"\0\1"], ids=["fewer bytes", "more bytes"]
)
def test_a_compressed_dicom_image_of_other_length_than_it_says_is_an_error(tmp_path, change):
    path = write_dicom(tmp_path / "a.dcm", PIXELS, syntax=RLELossless)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = change(dataset.PixelData)
    dataset.save_as(path)
    with pytest.raises(ImageReadError, match=r"a\.dcm: .*items of compressed pixels reach to"):
        open_image(path).read(0, 0, 9, 9)


def test_what_a_library_says_nothing_of_is_said_in_words(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    with pytest.raises(ImageReadError, match=r"a\.png: it is truncated or damaged$"):
        open_image(tmp_path / "a.png")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(PIXELS, photometric="rgb", tile=(32, 32), subifds=1, metadata=None)
        file.write(PIXELS[::2, ::2], photometric="rgb", tile=(32, 32), metadata=None)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:3000])
    with pytest.raises(ImageReadError, match=r"a\.tif: it is truncated: it lacks some of its pages"):
        open_image(tmp_path / "a.tif")
