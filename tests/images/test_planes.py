"""TIFF files whose channels lie in separate planes, or under one directory, give the pixels that were written."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pyvips
import tifffile

from widefield.images import ImageReadError, open_image

HEIGHT, WIDTH = 101, 133
REGIONS = [(0, 0, HEIGHT, WIDTH), (100, 132, 1, 1), (31, 0, 2, WIDTH), (60, 47, 41, 86)]


def _pixels(channels, dtype):
    return (np.random.default_rng(0).random((channels, HEIGHT, WIDTH)) * 60_000).astype(dtype)


def _assert_regions_agree(image, expected):
    assert (image.shape, image.dtype) == (expected.shape, expected.dtype)
    for y, x, height, width in REGIONS:
        np.testing.assert_array_equal(image.read(y, x, height, width), expected[:, y : y + height, x : x + width])


def _write(path, pixels, **options):
    options = {"photometric": "minisblack", "planarconfig": "separate", "metadata": None, **options}
    tifffile.imwrite(path, pixels, **options)
    return path


def _write_lzw(path, pixels, **layout):
    """Planes compressed by LZW, which tifffile cannot write: the strips or tiles of files of one band that libvips wrote."""
    segments = []
    for band in pixels:
        pyvips.Image.new_from_array(band).tiffsave(str(path), compression="lzw", **layout)
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            read = file.filehandle.read_segments(page.dataoffsets, page.databytecounts)
            segments += [data for data, _ in read]
    options = {"tile": (page.tilelength, page.tilewidth)} if page.is_tiled else {"rowsperstrip": page.rowsperstrip}
    options["predictor"] = page.predictor
    _write(path, iter(segments), dtype=pixels.dtype, shape=pixels.shape, compression="deflate", **options)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(tifffile.COMPRESSION.LZW)


@pytest.mark.parametrize(
    "layout", [{"rowsperstrip": 1}, {"rowsperstrip": 7}, {"rowsperstrip": 200}, {"tile": (32, 48)}]
)
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize(
    ("channels", "dtype", "options"),
    [(2, "u1", {}), (3, "u2", {"byteorder": ">"}), (3, "u1", {"photometric": "rgb"}), (8, "f4", {"bigtiff": True})],
)
def test_planes_are_read_in_every_layout(tmp_path, channels, dtype, options, compression, layout):
    pixels = _pixels(channels, dtype)
    _write(tmp_path / "a.tif", pixels, compression=compression, **options, **layout)
    _assert_regions_agree(open_image(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize("layout", [{"predictor": "none"}, {"tile": True, "tile_width": 32, "tile_height": 16}])
def test_planes_compressed_by_lzw_are_read(tmp_path, layout):
    pixels = _pixels(4, "u2")
    _write_lzw(tmp_path / "a.tif", pixels, **layout)
    _assert_regions_agree(open_image(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize("subifds", [0, 1])
def test_every_level_of_planes_is_read(tmp_path, subifds):
    pixels = _pixels(4, "u2")
    options = {"photometric": "minisblack", "planarconfig": "separate", "metadata": None, "compression": "deflate"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(pixels, subifds=subifds, rowsperstrip=7, **options)
        file.write(pixels[:, :100:2, :132:2], subfiletype=1, tile=(32, 32), **options)
    image = open_image(tmp_path / "a.tif", 1)
    assert image.levels == ((HEIGHT, WIDTH), (50, 66))
    np.testing.assert_array_equal(image.read(5, 20, 45, 46), pixels[:, 10:100:2, 40:132:2])


@pytest.mark.parametrize("layout", [{"rowsperstrip": 7}, {"tile": (32, 48)}])
def test_a_damaged_plane_is_an_error_each_time(tmp_path, layout):
    path = _write(tmp_path / "a.tif", _pixels(4, "u2"), compression="deflate", **layout)
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    image = open_image(path)
    for _ in range(2):
        with pytest.raises(ImageReadError, match=r"a\.tif: .*corrupt"):
            image.read(0, 0, HEIGHT, WIDTH)


def test_planes_that_vanish_after_opening_are_an_error(tmp_path):
    path = _write(tmp_path / "a.tif", _pixels(4, "u2"), compression="deflate", tile=(32, 32))
    image = open_image(path)
    path.unlink()
    with pytest.raises(ImageReadError, match=r"a\.tif"):
        image.read(0, 0, HEIGHT, WIDTH)


def test_planes_of_other_colours_are_refused(tmp_path):
    _write(tmp_path / "a.tif", _pixels(4, "u1"), photometric="separated")
    with pytest.raises(ImageReadError, match=r"SEPARATED colours in separate planes .*pixel-interleaved"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("imagej", [False, True])
def test_channels_under_one_directory_are_all_read(tmp_path, imagej):
    pixels = _pixels(3, "u2")
    options = {"imagej": True} if imagej else {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, truncate=True, metadata={"axes": "CYX"}, **options)
    _assert_regions_agree(open_image(tmp_path / "a.tif"), pixels)
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: -2 * HEIGHT * WIDTH])
    with pytest.raises(ImageReadError, match="truncated"):
        open_image(tmp_path / "a.tif")


FORK = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
from widefield.images import open_image
used, unused = open_image(sys.argv[1]), open_image(sys.argv[1])
before = used.read(0, 0, 101, 133).sum()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if all(image.read(0, 0, 101, 133).sum() == before for image in (used, unused)) else 1)
same = used.read(0, 0, 101, 133).sum() == before
raise SystemExit(os.waitpid(child, 0)[1] or not same)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_reads_planes(tmp_path):
    path = _write(tmp_path / "a.tif", _pixels(4, "u2"), compression="deflate", tile=(32, 32))
    subprocess.run([sys.executable, "-c", FORK, path], check=True, timeout=60)


def test_threads_read_the_same_planes_at_the_same_time(tmp_path):
    pixels = _pixels(4, "u2")
    image = open_image(_write(tmp_path / "a.tif", pixels, compression="deflate", tile=(32, 32)))
    tops = [7 * (k % 13) for k in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for y, read in zip(tops, pool.map(lambda y: image.read(y, 3, 9, 120), tops), strict=True):
            np.testing.assert_array_equal(read, pixels[:, y : y + 9, 3:123])
