"""What cannot be read is said, with the file and the reason, and never comes back as grey."""

import numpy as np
import pytest
import pyvips
import tifffile

from widefield.images import ImageReadError, open_image


def _read_all_levels(path):
    for level in range(len(open_image(path).levels)):
        image = open_image(path, level)
        image.read(0, 0, *image.shape[1:])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.tif: there is no such file"):
        open_image(tmp_path / "nothing.tif")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"FLIF....", "none of BMP, GIF, .*slides .*, TIFF, Zeiss CZI;")]
)
def test_an_unsupported_file_is_named_with_the_reason(tmp_path, content, reason):
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ImageReadError, match=rf"a\.tif: .*{reason}"):
        open_image(tmp_path / "a.tif")
    with pytest.raises(ImageReadError, match="folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9, 0.995])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.jpg", {}),
        ("a.tif", {}),
        ("a.tif", {"compression": "lzw"}),
        ("a.tif", {"tile": True, "tile_width": 64}),
        ("a.tif", {"tile": True, "tile_width": 64, "pyramid": True, "bigtiff": True}),
        ("a.tif", {"tile": True, "tile_width": 64, "pyramid": True, "subifd": True, "compression": "jpeg"}),
    ],
)
def test_a_truncated_file_is_found_at_the_latest_when_it_is_read(tmp_path, rgb, name, options, keep):
    path = tmp_path / name
    pyvips.Image.new_from_array(rgb).write_to_file(str(path), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    for _ in range(2):
        with pytest.raises(ImageReadError, match=rf"cannot read .*{name}: .*(truncated|corrupt|damaged)"):
            _read_all_levels(path)


@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_a_truncated_tiff_with_its_header_in_front_is_found_when_opened(tmp_path, rgb, keep):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", tile=(64, 64), compression="zlib")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ImageReadError, match=r"a\.tif: .*(truncated|damaged)"):
        open_image(path)


def test_a_corrupt_tile_fails_where_it_lies_and_only_there(tmp_path, rgb, chw):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[7], file.pages[0].databytecounts[7]  # tile row 1, column 1
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    image = open_image(path)
    np.testing.assert_array_equal(image.read(0, 0, 64, 333), chw[:, :64])
    for _ in range(2):
        with pytest.raises(ImageReadError, match=r"a\.tif: .*corrupt data in the region y=60, x=0, height=10"):
            image.read(60, 0, 10, 333)
    np.testing.assert_array_equal(image.read(128, 0, 73, 333), chw[:, 128:])


def test_a_truncated_npy_and_an_array_that_is_no_image_are_found(tmp_path, rgb):
    path = tmp_path / "a.npy"
    np.save(path, rgb)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ImageReadError, match=r"a\.npy: .*truncated"):
        open_image(path)
    for array, reason in [(np.zeros(5), "shape"), (np.zeros((5, 5), complex), "complex128"), (np.array(["a"]), "")]:
        np.save(path, array)
        with pytest.raises(ImageReadError, match=rf"a\.npy: .*{reason}"):
            open_image(path)


def test_a_stack_of_pages_is_refused_until_one_is_chosen(tmp_path, chw):
    tifffile.imwrite(tmp_path / "a.tif", chw, photometric="minisblack", metadata={"axes": "ZYX"})
    with pytest.raises(ImageReadError, match=r"several images.*0: .*Z=0 201x333, 1: .*Z=1 201x333.*series="):
        open_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(open_image(tmp_path / "a.tif", series=1).read(0, 0, 201, 333), chw[1:2])
    with pytest.raises(ValueError, match=r"series=3 of .*a\.tif does not exist; its images are 0: "):
        open_image(tmp_path / "a.tif", series=3)


@pytest.mark.parametrize("name", ["CIELAB", "ICCLAB", "YCbCr"])
def test_colours_that_would_pass_for_rgb_are_refused(tmp_path, rgb, name):
    options = {"subsampling": (1, 1)} if name == "YCbCr" else {}
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric=name.lower(), metadata=None, **options)
    with pytest.raises(ImageReadError, match=f"colours are {name}.*convert it to RGB"):
        open_image(tmp_path / "a.tif")


def test_a_message_has_no_words_about_files_that_were_read_well(tmp_path, rgb):
    data = pyvips.Image.new_from_array(rgb).jpegsave_buffer()
    (tmp_path / "warns.jpg").write_bytes(data[:-300] + data[-2:])
    open_image(tmp_path / "warns.jpg").read(0, 0, 201, 333)
    assert b"Corrupt JPEG data" in pyvips.ffi.string(pyvips.vips_lib.vips_error_buffer())
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(ImageReadError) as caught:
        open_image(tmp_path / "bad.png")
    assert "JPEG" not in str(caught.value)


def test_the_axis_of_channels_is_refused_where_it_means_nothing(tmp_path, rgb):
    pyvips.Image.new_from_array(rgb).pngsave(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"only \.npy"):
        open_image(tmp_path / "a.png", channel_axis="last")


@pytest.mark.parametrize("region", [(-1, 0, 5, 5), (0, 0, 0, 5), (0, 330, 5, 4), (200, 0, 2, 5), (0, -1, 1, 1)])
def test_a_region_outside_of_the_image_names_both(tmp_path, rgb, region):
    np.save(tmp_path / "a.npy", rgb)
    y, x, height, width = region
    expected = rf"y={y}, x={x}, height={height}, width={width}.*a\.npy.*height 201 and width 333"
    with pytest.raises(ValueError, match=expected):
        open_image(tmp_path / "a.npy").read(*region)
