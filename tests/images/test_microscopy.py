"""CZI, ND2, LIF, OIF and OIB files come as they were written and as their libraries read them; others are refused by name."""

import re
import struct
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import liffile
import nd2
import numpy as np
import oiffile
import openslide
import pytest
import tifffile
from PIL import Image
from pylibCZIrw import czi as pyczi

from tests.microscopy_files import write_legacy_nd2, write_lif, write_nd2, write_oif, write_xlef
from widefield.images import ImageReadError, open_image

CORNER = (-13, -7)
"""(x, y) of the upper left tile."""

TYPES = [("u1", 1), ("u2", 1), ("f4", 1), ("u1", 3), ("u2", 3)]
"""Types and bands that the writer knows: Gray8, Gray16, Gray32Float, Bgr24, Bgr48."""


def _noise(height, width, dtype="u1", bands=1, seed=0):
    values = np.random.default_rng(seed).random((height, width, bands))
    return (values * (1 if dtype == "f4" else np.iinfo(dtype).max)).astype(dtype)


def _write(path, parts, compression=None, **metadata):
    """Write parts (pixels (H, W, bands), (x, y), scene, plane), each as a tile."""
    with pyczi.create_czi(str(path), compression_options=compression) as file:
        for pixels, corner, scene, plane in parts:
            file.write(np.ascontiguousarray(pixels), corner, plane, scene=scene)
        file.write_metadata(**metadata)
    return path


def _mosaic(pixels, scene=0, plane=None, tile=64):
    """Tiles of an image, but the one in its middle."""
    height, width, _ = pixels.shape
    corners = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile) if (y, x) != (tile, tile)]
    return [(pixels[y : y + tile, x : x + tile], (CORNER[0] + x, CORNER[1] + y), scene, plane) for y, x in corners]


def _enlarge_last(path, factor):
    """Make the last tile one of a level of a pyramid: it covers `factor` times as many pixels as it holds.

    The writer writes the largest level only. An entry of an axis is its name, start, size, a float, and the size as stored.
    """
    content = bytearray(path.read_bytes())
    entries = list(re.finditer(rb"[XY]\0\0\0.{16}", content, re.DOTALL))
    directory = content.index(b"ZISRAWDIRECTORY")
    before = [one.start() for one in entries if one.start() < directory]
    for offset in (*before[-2:], *(one.start() for one in entries[-2:])):  # beside the pixels, and in the directory
        (size,) = struct.unpack_from("<i", content, offset + 8)
        struct.pack_into("<i", content, offset + 8, size * factor)
    path.write_bytes(content)


@pytest.mark.parametrize(("dtype", "bands"), TYPES)
@pytest.mark.parametrize("compression", [None, "zstd1:"])
def test_a_czi_file_is_read_as_it_was_written_and_as_pylibczirw_reads_it(tmp_path, dtype, bands, compression):
    if dtype == "f4" and compression:
        compression = "zstd0:"
    pixels = _noise(150, 200, dtype, bands)
    path = _write(tmp_path / "ä b.czi", _mosaic(pixels), compression, scale_x=5e-7, scale_y=2.5e-7)
    image = open_image(path)
    assert (image.shape, image.dtype, image.levels) == ((bands, 150, 200), np.dtype(dtype), ((150, 200),))
    assert image.spacing == pytest.approx((0.25, 0.5))
    assert image.channel_names == (("red", "green", "blue") if bands == 3 else None)
    expected = pixels[..., ::-1].transpose(2, 0, 1).copy()
    expected[:, 64:128, 64:128] = np.iinfo(dtype).max if bands == 3 else 0
    np.testing.assert_array_equal(image.read(0, 0, 150, 200), expected)
    np.testing.assert_array_equal(image.read(60, 61, 70, 80), expected[:, 60:130, 61:141])
    with pyczi.open_czi(str(path)) as file:
        theirs = file.read(roi=(CORNER[0], CORNER[1], 200, 60), scene=0)
    np.testing.assert_array_equal(image.read(0, 0, 60, 200), theirs[..., ::-1].transpose(2, 0, 1))


def test_channels_are_in_the_order_of_the_file_and_can_be_chosen_by_name(tmp_path):
    one, two = _noise(40, 50, "u2"), _noise(40, 50, "u2", seed=1)
    parts = [(two, (5, 9), 0, {"C": 1}), (one, (5, 9), 0, {"C": 0})]
    path = _write(tmp_path / "a.czi", parts, channel_names={0: "DAPI", 1: "GFP"})
    assert open_image(path).channel_names == ("DAPI", "GFP") and open_image(path).spacing is None
    np.testing.assert_array_equal(open_image(path).read(0, 0, 40, 50), np.stack([one[..., 0], two[..., 0]]))
    chosen = open_image(path, channels=["GFP", 0])
    np.testing.assert_array_equal(chosen.read(3, 2, 30, 40), np.stack([two, one])[:, 3:33, 2:42, 0])


def test_three_bands_can_be_chosen_by_name(tmp_path):
    pixels = _noise(40, 50, bands=3)
    path = _write(tmp_path / "a.czi", [(pixels, (0, 0), 0, None)])
    np.testing.assert_array_equal(
        open_image(path, channels=["blue", "green"]).read(0, 0, 40, 50), pixels[..., :2].transpose(2, 0, 1)
    )


def test_channels_of_different_types_are_refused(tmp_path):
    parts = [(_noise(40, 50), (0, 0), 0, {"C": 0}), (_noise(40, 50, "u2"), (0, 0), 0, {"C": 1})]
    with pytest.raises(ImageReadError, match=r"a\.czi: its channels are of type Gray16, Gray8; expected one of Gray8"):
        open_image(_write(tmp_path / "a.czi", parts))


def test_scenes_are_images_though_they_overlap(tmp_path):
    one, two = _noise(40, 50), _noise(60, 70, seed=1)
    path = _write(tmp_path / "a.czi", [(one, (-30, -20), 0, None), (two, (-10, 5), 1, None)])
    with pytest.raises(ImageReadError, match=r"several images.*0: scene 0 40x50, 1: scene 1 60x70"):
        open_image(path)
    np.testing.assert_array_equal(open_image(path, series=0).read(0, 0, 40, 50)[0], one[..., 0])
    np.testing.assert_array_equal(open_image(path, series="scene 1").read(0, 0, 60, 70)[0], two[..., 0])
    first = _write(tmp_path / "b.czi", [(two, (-10, 5), 0, None), (one, (-30, -20), 1, None)])
    assert open_image(first).shape == (1, 60, 70)


def test_every_position_in_time_and_depth_is_an_image(tmp_path):
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    planes = {place: _noise(30, 40, seed=seed) for seed, place in enumerate(places)}
    parts = [(pixels, (0, 0), 0, {"T": t, "Z": z}) for (t, z), pixels in planes.items()]
    path = _write(tmp_path / "a.czi", parts)
    with pytest.raises(ImageReadError, match=r"several images.*0: scene 0 T=0 Z=0 30x40.* 4: scene 0 T=1 Z=1 30x40"):
        open_image(path)
    for index, (t, z) in enumerate(places):
        for series in (index, f"scene 0 T={t} Z={z}"):
            np.testing.assert_array_equal(open_image(path, series=series).read(0, 0, 30, 40)[0], planes[t, z][..., 0])
    with pytest.raises(ValueError, match=r"series='scene 0 T=1 Z=2' of .* does not exist"):
        open_image(path, series="scene 0 T=1 Z=2")


@pytest.mark.parametrize("factor", [2, 3])
def test_levels_are_those_that_the_file_stores(tmp_path, factor):
    pixels = _noise(128, 193, bands=3)
    small = _noise(128 // factor, 193 // factor, bands=3, seed=1)  # another picture, so that pixels made up would show
    path = _write(tmp_path / "a.czi", [*_mosaic(pixels), (small, CORNER, 0, None)], scale_x=5e-7, scale_y=5e-7)
    _enlarge_last(path, factor)
    image, expected = open_image(path, 1), small[..., ::-1].transpose(2, 0, 1)
    height, width = expected.shape[1:]
    assert image.levels == ((128, 193), (height, width)) and image.shape == (3, height, width)
    np.testing.assert_array_equal(image.read(0, 0, height, width), expected)
    for y, x, h, w in ((1, 3, 20, 17), (7, 11, 1, 1), (height - 5, width - 9, 5, 9)):
        np.testing.assert_array_equal(image.read(y, x, h, w), expected[:, y : y + h, x : x + w])
    np.testing.assert_array_equal(open_image(path, spacing=0.5 * factor).read(0, 0, height, width), expected)
    np.testing.assert_array_equal(open_image(path).read(0, 0, 64, 193), pixels[:64, :, ::-1].transpose(2, 0, 1))


@pytest.mark.parametrize("keep", [0.005, 0.3, 0.9, 0.99])
def test_a_truncated_czi_file_is_named_when_it_is_opened(tmp_path, keep):
    path = _write(tmp_path / "a.czi", _mosaic(_noise(150, 200)))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ImageReadError, match=r"cannot read .*a\.czi: its structure is truncated or damaged"):
        open_image(path)


def test_a_damaged_tile_is_an_error_where_it_lies_and_only_there(tmp_path):
    pixels = _noise(64, 128)
    path = _write(tmp_path / "a.czi", _mosaic(pixels))
    content = path.read_bytes()
    start = content.rindex(b"ZISRAWSUBBLOCK")
    path.write_bytes(content[:start] + b"X" * 14 + content[start + 14 :])
    image = open_image(path)
    for _ in range(2):
        with pytest.raises(ImageReadError, match=r"a\.czi: truncated or corrupt data in the region y=0, x=60"):
            image.read(0, 60, 10, 10)
        np.testing.assert_array_equal(image.read(0, 0, 64, 64)[0], pixels[:, :64, 0])


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
def test_an_image_of_which_nothing_was_read_holds_no_file_open(tmp_path):
    path = _write(tmp_path / "a.czi", [(_noise(40, 50), (0, 0), 0, None)])
    open_image(path).read(0, 0, 1, 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    images = [open_image(path) for _ in range(5)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before and len(images) == 5


def test_the_pictures_beside_a_czi_slide_are_those_of_openslide(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.czi", [(_noise(40, 50, bands=3), (0, 0), 0, None)])
    assert open_image(path).associated_images == {}  # OpenSlide does not take files of this writer for slides
    label = _noise(20, 30, bands=3)
    slide = SimpleNamespace(associated_images={"label": Image.fromarray(label)})
    monkeypatch.setattr(openslide, "OpenSlide", lambda name: nullcontext(slide))
    np.testing.assert_array_equal(open_image(path).associated_images["label"](), label)


def test_the_extra_that_reads_czi_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = _write(tmp_path / "a.czi", [(_noise(40, 50), (0, 0), 0, None)])
    monkeypatch.delitem(sys.modules, "pylibCZIrw.czi")
    monkeypatch.setitem(sys.modules, "pylibCZIrw", None)
    needed = r"a\.czi: pylibCZIrw.* is needed for it; install it with pip install 'widefield\[microscopy\]'"
    with pytest.raises(ImageReadError, match=needed):
        open_image(path)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("pad", [0, 4])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_frames_of_an_nd2_file_are_those_that_were_written_and_that_the_package_nd2_reads(
    tmp_path, dtype, pad, lossless
):
    frames = [_noise(30, 41, dtype, 2, seed) for seed in range(6)]
    given = {"loops": (("T", 2), ("Z", 3)), "names": ("DAPI", "GFP"), "spacing": 0.25}
    path = write_nd2(tmp_path / "ä b.nd2", frames, pad=pad, lossless=lossless, **given)
    with nd2.ND2File(path) as file:
        np.testing.assert_array_equal(file.asarray().reshape(6, 2, 30, 41), np.stack(frames).transpose(0, 3, 1, 2))
    for index, frame in enumerate(frames):
        for series in (index, f"image T={index // 3} Z={index % 3}"):
            image = open_image(path, series=series)
            np.testing.assert_array_equal(image.read(3, 1, 20, 40), frame[3:23, 1:].transpose(2, 0, 1))
    assert (image.shape, image.dtype, image.spacing) == ((2, 30, 41), np.dtype(dtype), (0.25, 0.25))
    assert image.channel_names == ("DAPI", "GFP")
    np.testing.assert_array_equal(open_image(path, series=0, channels=["GFP"]).read(0, 0, 30, 41)[0], frames[0][..., 1])


@pytest.mark.parametrize("lossless", [False, True])
def test_colours_of_an_nd2_file_are_red_green_blue_as_nis_elements_shows_them(tmp_path, lossless):
    pixels = _noise(30, 41, bands=6)
    path = write_nd2(tmp_path / "a.nd2", [pixels[..., :3]], names=("Brightfield",), lossless=lossless, pad=1)
    image = open_image(path)
    assert image.channel_names == ("red", "green", "blue") and image.spacing is None
    np.testing.assert_array_equal(image.read(0, 0, 30, 41), pixels[..., 2::-1].transpose(2, 0, 1))
    two = open_image(write_nd2(tmp_path / "b.nd2", [pixels], names=("A", "B"), lossless=lossless))
    assert two.channel_names is None
    np.testing.assert_array_equal(two.read(0, 0, 30, 41), pixels[..., [2, 1, 0, 5, 4, 3]].transpose(2, 0, 1))


def test_frames_that_were_planned_and_not_taken_are_no_images(tmp_path):
    path = write_nd2(tmp_path / "a.nd2", [None, _noise(30, 40), None], loops=(("P", 3),))
    assert open_image(path, series="image P=1").shape == open_image(path).shape
    with pytest.raises(ValueError, match=r"series=1 of .* does not exist; its images are 0: image P=1 30x40"):
        open_image(path, series=1)


def _replaced(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (b"ImageDataSeq|0!\0", b"ImageDataSeq|7!\0", "its frame 0 is damaged or missing"),
        (
            b'uiHeight runtype="lx_int32" value="30',
            b'uiHeight runtype="lx_int32" value="99',
            "its frame 0 is damaged: it has",
        ),
        (
            b'eCompression runtype="lx_int32" value="2',
            b'eCompression runtype="lx_int32" value="1',
            "compressed with loss",
        ),
        (b"\xda\xce\xbe\x0a", b"\0\0\0\x0cjP  ", "its structure is truncated or damaged"),
        (b"<sPicturePlanes>", b"<sPicturePlanet>", "its structure is truncated or damaged"),
    ],
)
def test_an_nd2_file_that_would_be_misread_is_refused_when_it_is_opened(tmp_path, old, new, problem):
    path = _replaced(write_nd2(tmp_path / "a.nd2", [_noise(30, 40)]), old, new)
    with pytest.raises(ImageReadError, match=rf"cannot read .*a\.nd2: .*{problem}"):
        open_image(path)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_an_old_nd2_file_of_jpeg_2000_is_read_as_the_package_nd2_reads_it(tmp_path, dtype):
    frames = [_noise(30, 40, dtype, 2, seed) for seed in range(3)]
    path = write_legacy_nd2(tmp_path / "ä b.nd2", frames, ("DAPI", "GFP"), 0.25)
    with nd2.ND2File(path) as file:
        theirs = [file._rdr.read_frame(k) for k in range(3)]
    for k, frame in enumerate(frames):
        image = open_image(path, series=f"image T={k}")
        np.testing.assert_array_equal(theirs[k], frame)
        np.testing.assert_array_equal(image.read(3, 4, 20, 30), frame.transpose(2, 0, 1)[:, 3:23, 4:34])
    assert (image.dtype, image.spacing, image.channel_names) == (np.dtype(dtype), (0.25, 0.25), ("DAPI", "GFP"))
    plain = open_image(write_legacy_nd2(tmp_path / "b.nd2", [frames[0][..., :1]]))
    assert (plain.shape, plain.spacing, plain.channel_names) == ((1, 30, 40), None, None)


def test_a_damaged_frame_of_an_old_nd2_file_is_found_when_it_is_opened_or_read(tmp_path):
    path = write_legacy_nd2(tmp_path / "a.nd2", [_noise(30, 40)])
    content = path.read_bytes()
    start = content.index(b"\xff\x4f\xff\x51")
    path.write_bytes(content[: start + 10] + b"\x09" + content[start + 11 :])
    with pytest.raises(
        ImageReadError, match=r"a\.nd2: its frame 0 is damaged or missing: no picture of 30x40 lies there"
    ):
        open_image(path)
    path.write_bytes(content[: start + 120] + bytes(60) + content[start + 180 :])
    with pytest.raises(ImageReadError, match=r"a\.nd2: truncated or corrupt data in the region"):
        open_image(path).read(0, 0, 30, 40)


def test_a_damaged_packed_frame_is_an_error_when_it_is_read(tmp_path):
    path = write_nd2(tmp_path / "a.nd2", [_noise(30, 40)], lossless=True)
    path = _replaced(path, b"\x78\x9c", b"\x78\x00")
    with pytest.raises(ImageReadError, match=r"a\.nd2: truncated or corrupt data in the region"):
        open_image(path).read(0, 0, 3, 3)


def test_planes_of_a_lif_file_are_those_that_were_written_and_that_liffile_reads(tmp_path):
    stack = np.stack([_noise(30, 41, "u2", 2, seed) for seed in range(6)]).reshape(2, 3, 30, 41, 2)
    lengths = {"X": 40e-6, "Y": 14.5e-6}
    stored = {"pixels": stack, "axes": "TZYX", "planar": True, "luts": ["Green", "Red"], "lengths": lengths}
    path = write_lif(tmp_path / "ä b.lif", {"Series001": stored})
    with liffile.LifFile(path) as file:
        np.testing.assert_array_equal(file.images[0].asarray(), np.moveaxis(stack, -1, 2))
    for t, z in np.ndindex(2, 3):
        image = open_image(path, series=f"Series001 T={t} Z={z}")
        np.testing.assert_array_equal(image.read(3, 1, 20, 40), stack[t, z, 3:23, 1:].transpose(2, 0, 1))
    assert image.spacing == pytest.approx((0.5, 1.0)) and image.channel_names == ("Green", "Red")
    np.testing.assert_array_equal(
        open_image(path, series=4, channels=["Red"]).read(0, 0, 30, 41)[0], stack[1, 1, ..., 1]
    )


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_colours_of_a_lif_file_are_red_green_blue_though_rows_are_padded(tmp_path, pad):
    pixels, small = _noise(30, 41, bands=3), _noise(20, 10, "f4")
    images = {"Big": {"pixels": pixels, "tags": [3, 2, 1], "pad": pad}, "Small": {"pixels": small}}
    path = write_lif(tmp_path / "a.lif", images)
    if pad != 1:  # liffile refuses rows of no whole number of pixels
        with liffile.LifFile(path) as file:
            assert (
                file.images[0].shape == pixels.shape
            )  # and forgets the padding unless it is asked for the shape first
            np.testing.assert_array_equal(file.images[0].asarray(), pixels[..., ::-1])
    image = open_image(path)
    assert image.channel_names == ("red", "green", "blue") and image.spacing is None
    np.testing.assert_array_equal(image.read(0, 0, 30, 41), pixels[..., ::-1].transpose(2, 0, 1))
    np.testing.assert_array_equal(open_image(path, series="Small").read(0, 0, 20, 10), small.transpose(2, 0, 1))


def test_what_is_no_picture_or_has_lost_its_pixels_is_said(tmp_path):
    line = write_lif(tmp_path / "line.lif", {"xt": {"pixels": _noise(30, 40), "axes": "TX"}})
    with pytest.raises(ImageReadError, match=r"line\.lif: it holds no picture of rows and columns"):
        open_image(line)
    path = write_lif(tmp_path / "a.lif", {"One": {"pixels": _noise(30, 40)}, "Two": {"pixels": _noise(20, 20)}})
    path.write_bytes(path.read_bytes()[:-1])
    assert open_image(path).shape == (1, 30, 40)
    with pytest.raises(ImageReadError, match=r"a\.lif: it is truncated: it lacks the pixels of Two"):
        open_image(path, series="Two")


@pytest.mark.parametrize(("old", "new"), [('NumberOfElements="40"', 'NumberOfElements="90"'), ('Inc="40"', 'Inc="-4"')])
def test_a_lif_file_whose_pixels_do_not_fit_is_refused_when_it_is_opened(tmp_path, old, new):
    path = write_lif(tmp_path / "a.lif", {"One": {"pixels": _noise(30, 40)}})
    with pytest.raises(ImageReadError, match=r"cannot read .*a\.lif: its structure is damaged"):
        open_image(_replaced(path, old.encode("utf-16-le"), new.encode("utf-16-le")))


def test_an_xlef_gives_the_images_of_the_lof_files_that_it_names(tmp_path):
    one, two = _noise(30, 40, bands=2), np.stack([_noise(20, 25, "u2", seed=z) for z in range(3)])
    path = write_xlef(tmp_path / "a b.xlef", {"One": {"pixels": one}, "Two": {"pixels": two, "axes": "ZYX"}})
    with liffile.LifFile(path) as file:
        names = [image.path for image in file.images]
        np.testing.assert_array_equal(file.images[1].asarray(), two[..., 0])
    np.testing.assert_array_equal(open_image(path, series=names[0]).read(0, 0, 30, 40), one.transpose(2, 0, 1))
    np.testing.assert_array_equal(
        open_image(path, series=f"{names[1]} Z=2").read(3, 4, 10, 9)[0], two[2, 3:13, 4:13, 0]
    )
    (tmp_path / "image 1.lof").unlink()
    with pytest.raises(
        ImageReadError, match=r"a b\.xlef: .*image 1\.lof, in which the pixels of .*Two lie, is missing"
    ):
        open_image(path)


@pytest.mark.parametrize("name", ["ä b.oif", "ä b.oib"])
def test_planes_of_an_olympus_file_are_those_that_were_written_and_that_oiffile_reads(tmp_path, name):
    planes = {
        f"s_C00{c}Z00{z}.tif": _noise(20, 30, "u2", seed=10 * c + z)[..., 0] for c in (1, 2, 3) for z in (1, 2, 3, 4)
    }
    path = write_oif(tmp_path / name, planes, ("CH1", "CH2", "TD1"))
    with pytest.raises(ImageReadError, match=r"it holds several images.*0: image Z=0 20x30, 1: image Z=1 20x30"):
        open_image(path)
    read = oiffile.imread(path)
    for z in range(4):
        image = open_image(path, series=f"image Z={z}")
        expected = np.stack([planes[f"s_C00{c}Z00{z + 1}.tif"] for c in (1, 2, 3)])
        np.testing.assert_array_equal(image.read(0, 0, 20, 30), expected)
        np.testing.assert_array_equal(read[:, z], expected)
    assert (image.channel_names, image.spacing, image.dtype) == (("CH1", "CH2", "TD1"), (0.25, 0.5), np.uint16)
    chosen = open_image(path, series=1, channels=["TD1"]).read(3, 4, 5, 6)
    np.testing.assert_array_equal(chosen, read[2:, 1, 3:8, 4:10])


def test_an_olympus_file_without_its_planes_is_refused_with_the_reason(tmp_path):
    path = write_oif(tmp_path / "a.oif", {"s_C001.tif": _noise(9, 9)[..., 0]})
    path.with_name("a.oif.files").rename(tmp_path / "elsewhere")
    with pytest.raises(ImageReadError, match=r"a\.oif: it holds no plane; the folder beside it.* may be missing"):
        open_image(path)
    both = {"s_C001.tif": _noise(9, 9)[..., 0], "s_C002.tif": _noise(9, 8)[..., 0]}
    with pytest.raises(ImageReadError, match="its channels have different sizes or types"):
        open_image(write_oif(tmp_path / "b.oib", both))


@pytest.mark.parametrize("name", ["a.VSI", "a.oir", "a.ims", "a.zvi"])
def test_microscopy_files_that_are_not_read_are_refused_with_what_to_do(tmp_path, name):
    tifffile.imwrite(tmp_path / name, _noise(40, 50)[..., 0])  # a VSI file is a TIFF file, of an overview
    with pytest.raises(ImageReadError, match=rf"{name}: .* files .* are not read; convert it to OME-TIFF or OME-Zarr"):
        open_image(tmp_path / name)


def test_what_is_refused_is_not_among_the_formats_that_a_message_lists(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"nothing known")
    with pytest.raises(
        ImageReadError, match="Leica LIF, LOF, XLEF, Nikon ND2, npy, Olympus OIF, OIB, OME-Zarr and Zarr, PNG"
    ):
        open_image(tmp_path / "a.bin")
