"""What would unpack to far more than its pixels is refused with the limit, before it is unpacked."""

import bz2
import gzip
import json
import lzma
import struct
import zlib

import imagecodecs
import numcodecs
import numpy as np
import pydicom
import pytest
import tifffile
import zarr
from pydicom.encaps import encapsulate
from zarr.codecs import BytesCodec, ShardingCodec, ZstdCodec
from zarr.codecs import numcodecs as others

from tests.dicom_files import write_dicom
from widefield.images import ImageReadError, dicom, open_image

BOMB = bytes(2**22)

V2 = {
    "blosc": (numcodecs.Blosc(), numcodecs.Blosc().encode),
    "zstd": (numcodecs.Zstd(), imagecodecs.zstd_encode),
    "gzip": (numcodecs.GZip(), gzip.compress),
    "zlib": (numcodecs.Zlib(), zlib.compress),
    "lz4": (numcodecs.LZ4(), numcodecs.LZ4().encode),
    "bz2": (numcodecs.BZ2(), bz2.compress),
    "lzma": (numcodecs.LZMA(), lzma.compress),
}
V3 = {
    "blosc": (zarr.codecs.BloscCodec(), numcodecs.Blosc().encode),
    "zstd": (ZstdCodec(), imagecodecs.zstd_encode),
    "gzip": (zarr.codecs.GzipCodec(), gzip.compress),
}


def _zarr(path, version, codec, shards=None):
    pixels = np.random.default_rng(0).integers(0, 9, (40, 50)).astype(np.uint16)
    options = {"chunks": (32, 32), "zarr_format": version, "compressors": codec, "shards": shards}
    zarr.create_array(str(path), shape=pixels.shape, dtype=pixels.dtype, **options)[:] = pixels
    return pixels


@pytest.mark.parametrize(
    ("version", "name"), [*((2, name) for name in V2), *((3, name) for name in V3)], ids=lambda value: str(value)
)
def test_a_chunk_of_zarr_is_unpacked_so_far_as_its_pixels_go(tmp_path, version, name):
    codec, pack = (V2 if version == 2 else V3)[name]
    pixels = _zarr(tmp_path / "a.zarr", version, codec)
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").read(0, 0, 40, 50)[0], pixels)
    (tmp_path / "a.zarr" / ("1.1" if version == 2 else "c/1/1")).write_bytes(pack(BOMB))
    image = open_image(tmp_path / "a.zarr")
    np.testing.assert_array_equal(image.read(0, 0, 32, 50)[0], pixels[:32])
    with pytest.raises(ImageReadError, match=r"a\.zarr: .*y=33, x=33.*unpacks to more than 69632 bytes, the limit"):
        image.read(33, 33, 2, 2)


def test_a_zstandard_chunk_that_does_not_tell_its_size_or_has_two_parts_is_limited(tmp_path):
    pixels = _zarr(tmp_path / "a.zarr", 3, ZstdCodec())
    place = tmp_path / "a.zarr" / "c/0/0"
    packed = imagecodecs.zstd_encode(pixels[:32, :32].tobytes())
    for content in (_zstd_of_unknown_size(), packed + imagecodecs.zstd_encode(BOMB)):
        place.write_bytes(content)
        with pytest.raises(ImageReadError, match=r"a\.zarr: truncated or corrupt data in the region y=0, x=0"):
            open_image(tmp_path / "a.zarr").read(0, 0, 8, 8)


def _zstd_of_unknown_size():
    """16 MiB of zeros in blocks of runs, as a stream that is written before its size is known (RFC 8878, section 3.1.1)."""
    run = [(2**17 << 3 | 1 << 1 | is_last).to_bytes(3, "little") + b"\0" for is_last in (0, 1)]
    return b"\x28\xb5\x2f\xfd\0\x58" + run[0] * 127 + run[1]


def test_a_chunk_within_a_shard_is_limited_too(tmp_path):
    sharding = ShardingCodec(chunk_shape=(32, 32), codecs=[BytesCodec(), ZstdCodec()], index_codecs=[BytesCodec()])
    options = {"shape": (32, 64), "dtype": "u2", "chunks": (32, 64), "serializer": sharding, "compressors": None}
    zarr.create_array(str(tmp_path / "a.zarr"), **options)[:] = 3
    assert np.all(open_image(tmp_path / "a.zarr").read(0, 0, 32, 64) == 3)
    bomb = imagecodecs.zstd_encode(BOMB)
    index = struct.pack("<4Q", 0, len(bomb), 0, len(bomb))
    (tmp_path / "a.zarr" / "c/0/0").write_bytes(bomb + index)
    with pytest.raises(ImageReadError, match="unpacks to more than 69632 bytes, the limit"):
        open_image(tmp_path / "a.zarr").read(0, 0, 1, 1)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
def test_codecs_of_numcodecs_are_limited_in_zarr_3(tmp_path):
    pixels = _zarr(tmp_path / "a.zarr", 3, others.LZMA())
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").read(0, 0, 40, 50)[0], pixels)
    (tmp_path / "a.zarr" / "c/0/0").write_bytes(lzma.compress(BOMB))
    with pytest.raises(ImageReadError, match="unpacks to more than 69632 bytes, the limit"):
        open_image(tmp_path / "a.zarr").read(0, 0, 1, 1)


def test_gzip_chunks_of_several_parts_and_padding_are_read(tmp_path):
    pixels = _zarr(tmp_path / "a.zarr", 2, numcodecs.GZip())
    data = pixels[:32, :32].tobytes()
    place = tmp_path / "a.zarr" / "0.0"
    place.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]) + bytes(20))
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").read(0, 0, 40, 50)[0], pixels)
    place.write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(ImageReadError, match="a chunk ends before its pixels do"):
        open_image(tmp_path / "a.zarr").read(0, 0, 1, 1)


def test_a_shard_of_too_many_chunks_is_refused_when_opened(tmp_path):
    _zarr(tmp_path / "a.zarr", 3, None, (64, 64))
    place = tmp_path / "a.zarr" / "zarr.json"
    described = json.loads(place.read_text(encoding="utf-8"))
    described["chunk_grid"]["configuration"]["chunk_shape"] = [2**20, 2**20]
    place.write_text(json.dumps(described), encoding="utf-8")
    with pytest.raises(ImageReadError, match=r"a\.zarr: a single index of a shard of it has .* the limit is 4096 MiB"):
        open_image(tmp_path / "a.zarr")


FRAMES = {
    "jpeg": (pydicom.uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode),
    "jpeg-ls": (pydicom.uid.JPEGLSLossless, imagecodecs.jpegls_encode),
    "jpeg 2000": (
        pydicom.uid.JPEG2000Lossless,
        lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True),
    ),
    "rle": (
        pydicom.uid.RLELossless,
        lambda pixels: struct.pack("<16I", 1, 64, *[0] * 14) + bytes([129, 7]) * (pixels.size // 128),  # runs of 128
    ),
}


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_of_dicom_that_is_larger_than_the_image_is_not_decoded(tmp_path, name, frames):
    syntax, encode = FRAMES[name]
    pixels = np.full((frames, 64, 60), 7, np.uint8)
    small, large = encode(pixels[0]), encode(np.full((2000, 900), 7, np.uint8))
    write_dicom(tmp_path / "a.dcm", pixels, encapsulate([small] * frames), syntax=syntax)
    assert np.all(open_image(tmp_path / "a.dcm", series=0).read(0, 0, 64, 60) == 7)
    write_dicom(tmp_path / "a.dcm", pixels, encapsulate([small] * (frames - 1) + [large]), syntax=syntax)
    expected = "unpacks to more than 73216 bytes, the limit" if name == "rle" else "2000 by 900 pixels lies in it"
    with pytest.raises(ImageReadError, match=rf"a\.dcm: .*{expected}"):
        open_image(tmp_path / "a.dcm", series=frames - 1).read(0, 0, 1, 1)


def test_a_deflated_file_that_inflates_to_too_much_is_refused_when_opened(tmp_path, monkeypatch):
    pixels = np.full((64, 60), 7, np.uint8)
    write_dicom(tmp_path / "a.dcm", pixels, pixels.tobytes(), syntax=pydicom.uid.DeflatedExplicitVRLittleEndian)
    assert np.all(open_image(tmp_path / "a.dcm").read(0, 0, 64, 60) == 7)
    monkeypatch.setattr(dicom, "MAX_SEGMENT_BYTES", 2000)
    with pytest.raises(ImageReadError, match=r"a\.dcm: it inflates to more than 0 MiB, the limit"):
        open_image(tmp_path / "a.dcm")


def test_an_image_of_dicom_of_absurd_size_is_refused_when_opened(tmp_path):
    write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16), Rows=65535, Columns=65535)
    with pytest.raises(ImageReadError, match=r"a single frame of it has 8192 MiB when decoded; the limit is 4096 MiB"):
        open_image(tmp_path / "a.dcm")


@pytest.mark.parametrize("shape", [(9, 64, 64, 3), (9, 64, 64, 1)])
def test_an_animation_in_a_tile_is_not_decoded(tmp_path, shape):
    tile = imagecodecs.jpegxl_encode(np.zeros(shape, np.uint8))
    samples = shape[-1]
    pixels = np.zeros((64, 64, samples)[: 2 + (samples > 1)], np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), compression="jpegxl")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tags = file.pages[0].tags
        places = tags["TileOffsets"].valueoffset, tags["TileByteCounts"].valueoffset
    content = bytearray((tmp_path / "a.tif").read_bytes())
    for place, value in zip(places, (len(content), len(tile)), strict=True):
        struct.pack_into("<I", content, place, value)
    (tmp_path / "a.tif").write_bytes(content + tile)
    with pytest.raises(ImageReadError, match=r"a\.tif: .*it is an animation; expected one picture"):
        open_image(tmp_path / "a.tif").read(0, 0, 1, 1)
