"""TIFF files of every structure that a writer can make are read as tifffile reads them as a whole."""

import dataclasses
import sys
from collections import Counter

import numpy as np
import pytest
import tifffile
from hypothesis import assume, given
from hypothesis import strategies as st

from widefield.images import ImageReadError, formats, open_image, segments

BYTES = [None, "deflate", "lzw", "packbits", "zstd", "lzma"]
"""Compressions of bytes, of whatever type the pixels are; those of pictures follow."""
PICTURES = ["lerc", "png", "webp", "jpegxl", "jpeg2000", "jpeg"]
DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "?"]


@st.composite
def structures(draw):
    """Pixels and the options of tifffile to write them."""
    height, width, samples = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 3, 4, 5]))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    planar = samples > 1 and draw(st.booleans())
    shape = (height, width) if samples == 1 else (samples, height, width) if planar else (height, width, samples)
    pixels = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 100, shape).astype(dtype)
    layout = draw(
        st.sampled_from([{}, {"rowsperstrip": 1}, {"rowsperstrip": 7}, {"tile": (16, 32)}, {"tile": (128, 128)}])
    )
    compression = draw(st.sampled_from(BYTES + PICTURES))
    options = {
        "photometric": draw(st.sampled_from(["minisblack", "miniswhite"] if samples < 3 else ["minisblack", "rgb"])),
        "planarconfig": ("separate" if planar else "contig") if samples > 1 else None,
        "compression": compression,
        "predictor": draw(st.sampled_from([None, True])),
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
        "bitspersample": draw(st.sampled_from([None, 4, 12])) if compression in BYTES else None,
        "metadata": None,
        **layout,
    }
    return pixels, {key: value for key, value in options.items() if value is not None}


@given(structures(), st.data())
def test_a_tiff_of_any_structure_is_read_as_its_reference_does(tmp_path_factory, structure, data):
    pixels, options = structure
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    try:
        tifffile.imwrite(path, pixels, **options)
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            reference = page.asarray(squeeze=False)[:, 0]
            white = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    except Exception:  # no writer for it
        assume(False)
    expected = reference.transpose(0, 3, 1, 2).reshape(-1, *reference.shape[1:3])
    expected = expected.astype("u1") if expected.dtype.kind == "b" else expected
    if white and expected.dtype.kind == "u":
        expected = expected.dtype.type(2**page.bitspersample - 1) - expected
    image = open_image(path, alpha="keep")
    assert (image.shape, image.dtype) == (expected.shape, expected.dtype)
    _, height, width = image.shape
    np.testing.assert_array_equal(image.read(0, 0, height, width), expected)
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    rows, columns = data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
    np.testing.assert_array_equal(image.read(y, x, rows, columns), expected[:, y : y + rows, x : x + columns])
    one = data.draw(st.integers(0, len(expected) - 1))
    np.testing.assert_array_equal(
        open_image(path, channels=[one]).read(y, x, rows, columns),
        expected[one : one + 1, y : y + rows, x : x + columns],
    )


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 16}])
@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_has_the_colours_of_its_reference(tmp_path, rgb, photometric, layout, subsampling):
    options = {"subsampling": subsampling} if photometric == "ycbcr" else {}
    tifffile.imwrite(
        tmp_path / "a.tif", rgb, photometric=photometric, compression="jpeg", metadata=None, **layout, **options
    )
    expected = tifffile.imread(tmp_path / "a.tif").transpose(2, 0, 1)
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif").read(0, 0, 201, 333), expected)


def test_tiles_that_were_never_written_hold_the_value_for_missing_data_or_0(tmp_path):
    tile = np.full((64, 64), 9, np.uint8)
    for nodata, blank in ((None, 0), ("7", 7)):
        tags = [(42113, "s", 0, nodata, True)] if nodata else []
        tiles = iter([tile, None, None, tile])
        tifffile.imwrite(
            tmp_path / "a.tif",
            tiles,
            shape=(128, 128),
            dtype="u1",
            tile=(64, 64),
            extratags=tags,
            compression="deflate",
        )
        image = open_image(tmp_path / "a.tif")
        pixels = image.read(0, 0, 128, 128)[0]
        assert image.nodata == (None if nodata is None else 7)
        assert (pixels[:64, :64] == 9).all() and (pixels[64:, :64] == blank).all()


@pytest.mark.parametrize("axes", ["TZCYX", "TCYX", "ZYX", "TZYXS"])
@pytest.mark.parametrize("writer", [{"imagej": True}, {"ome": True}, {"photometric": None}])
def test_every_position_of_a_stack_is_an_image(tmp_path, axes, writer):
    if writer == {"imagej": True} and axes == "TZYXS":
        pytest.skip("ImageJ's colours are of 8 bits")
    sizes = {"T": 2, "Z": 3, "C": 4, "Y": 20, "X": 30, "S": 3}
    shape = [sizes[axis] for axis in axes]
    stack = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    colours = "rgb" if axes.endswith("S") else "minisblack"
    options = {key: value for key, value in writer.items() if value is not None}
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata={"axes": axes}, photometric=colours, **options)
    planes = stack.reshape(-1, *stack.shape[-3 if "C" in axes or "S" in axes else -2 :])
    for index, plane in enumerate(planes):
        image = open_image(tmp_path / "a.tif", series=index)
        expected = plane[None] if plane.ndim == 2 else plane.transpose(2, 0, 1) if axes.endswith("S") else plane
        np.testing.assert_array_equal(image.read(0, 0, 20, 30), expected)
    last = " ".join(f"{axis}={sizes[axis] - 1}" for axis in axes if axis not in "CSYX")
    with pytest.raises(ImageReadError, match=last):
        open_image(tmp_path / "a.tif")


def test_channels_of_an_ome_tiff_in_several_files_are_one_image(tmp_path):
    planes = np.random.default_rng(0).integers(0, 4000, (2, 64, 64), dtype=np.uint16)
    data = "".join(
        f'<TiffData IFD="0" FirstC="{channel}" PlaneCount="1"><UUID FileName="{channel}.ome.tif">urn:uuid:{channel}</UUID>'
        "</TiffData>"
        for channel in (0, 1)
    )
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{}">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="64" SizeY="64" SizeC="2" '
        'SizeZ="1" SizeT="1">'
        f'<Channel ID="Channel:0:0" Name="DAPI"/><Channel ID="Channel:0:1" Name="CD3"/>{data}</Pixels></Image></OME>'
    )
    for channel in (0, 1):
        tifffile.imwrite(
            tmp_path / f"{channel}.ome.tif", planes[channel], description=xml.format(channel), metadata=None, ome=False
        )
    image = open_image(tmp_path / "0.ome.tif")
    np.testing.assert_array_equal(image.read(0, 0, 64, 64), planes)
    assert image.channel_names == ("DAPI", "CD3")
    np.testing.assert_array_equal(open_image(tmp_path / "0.ome.tif", channels=["CD3"]).read(0, 0, 64, 64), planes[1:])
    (tmp_path / "1.ome.tif").unlink()
    with pytest.raises(ImageReadError, match="lie in other files, which are missing"):
        open_image(tmp_path / "0.ome.tif")


def test_one_large_compressed_strip_goes_through_a_temporary_file(tmp_path, rgb, chw, monkeypatch):
    monkeypatch.setattr(segments, "MEMORY_BYTES", 1000)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", compression="deflate", rowsperstrip=201)
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif").read(3, 4, 150, 200), chw[:, 3:153, 4:204])
    monkeypatch.setattr(formats, "MAX_SEGMENT_BYTES", 2**17)
    with pytest.raises(ImageReadError, match=r"a single strip of it has 0 MiB when decoded; the limit is"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "disk", ["room", pytest.param("full", marks=pytest.mark.skipif(sys.platform != "linux", reason="/dev/full"))]
)
def test_tiles_out_of_strips_decode_no_strip_more_than_twice(tmp_path, monkeypatch, disk):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression="deflate", rowsperstrip=8)
    monkeypatch.setattr(segments, "CACHE_BYTES", 20_000)
    monkeypatch.setattr(segments, "MEMORY_BYTES", 20_000)
    if disk == "full":
        monkeypatch.setattr(segments, "TemporaryFile", lambda **_: open("/dev/full", "r+b", 0))  # noqa: PTH123, SIM115
    source, decoded = open_image(tmp_path / "a.tif")._pixels, Counter()

    def decode(data, index):
        decoded[index] += 1
        return source.decode(data, index)

    counted = dataclasses.replace(source, decode=decode)
    tiles = [(y, x) for y in range(0, 256, 64) for x in range(0, 300, 50)]
    np.random.default_rng(1).shuffle(tiles)
    for y, x in tiles:
        found = counted.read(y, x, 64, 50, [0, 1, 2])
        np.testing.assert_array_equal(found, pixels[y : y + 64, x : x + 50].transpose(2, 0, 1))
    assert (max(decoded.values()) <= 2) == (disk == "room")
