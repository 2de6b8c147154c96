"""A last channel that is marked as alpha is never dropped without a word, and can be kept."""

import pickle
from random import Random

import numpy as np
import pytest
import pyvips
import tifffile

from widefield.data import LabelledImages
from widefield.data.described import AnnotationFile, ImageFolder
from widefield.images import formats, open_image, thumbnail
from widefield.inference.models import info_in
from widefield.inference.prediction import as_picture
from widefield.pretraining.pixels import open_lazily, read_pixels
from widefield.pretraining.slides import SlideArgs, read_patch


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(formats, "_WARNED", set())


@pytest.fixture
def rgbn() -> np.ndarray:
    """Red, green, blue and near infrared (4, height, width)."""
    return np.random.default_rng(0).integers(0, 256, (4, 101, 133), dtype=np.uint8)


def _write(path, pixels, **options):
    colours = "minisblack" if len(pixels) == 2 else "rgb"
    options = {"planarconfig": "contig", "extrasamples": ["unassalpha"], "metadata": None, **options}
    if options["planarconfig"] == "contig":
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    tifffile.imwrite(path, pixels, photometric=colours, **options)
    return path


@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
@pytest.mark.parametrize("layout", [{}, {"compression": "deflate", "rowsperstrip": 7}, {"tile": (32, 48)}])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_of_a_tiff_is_dropped_with_a_warning_or_kept(tmp_path, rgbn, caplog, channels, layout, planarconfig):
    pixels = rgbn[-channels:]
    path = _write(tmp_path / "a.tif", pixels, planarconfig=planarconfig, **layout)
    kept = open_image(path, alpha="keep")
    np.testing.assert_array_equal(kept.read(3, 5, 90, 120), pixels[:, 3:93, 5:125])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept)).read(0, 0, 9, 9), pixels[:, :9, :9])
    assert not caplog.records
    np.testing.assert_array_equal(open_image(path).read(3, 5, 90, 120), pixels[:-1, 3:93, 5:125])
    open_image(path)
    (record,) = caplog.records
    assert f"channel {channels} of {path} is marked as alpha" in record.getMessage()
    assert 'alpha="keep"' in record.getMessage()


def test_alpha_of_a_png_is_dropped_with_a_warning_or_kept(tmp_path, rgbn, caplog):
    path = tmp_path / "a.png"
    pyvips.Image.new_from_array(rgbn.transpose(1, 2, 0)).copy(interpretation="srgb").pngsave(str(path))
    np.testing.assert_array_equal(open_image(path, alpha="keep").read(0, 0, 101, 133), rgbn)
    assert not caplog.records
    np.testing.assert_array_equal(open_image(path).read(0, 0, 101, 133), rgbn[:3])
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]


def test_alpha_that_is_neither_dropped_nor_kept_is_refused(tmp_path, rgbn):
    with pytest.raises(ValueError, match=r'alpha=.all. for .*a\.tif; expected "drop" or "keep"'):
        open_image(_write(tmp_path / "a.tif", rgbn), alpha="all")


def test_a_thumbnail_from_a_smaller_level_keeps_what_the_image_keeps(tmp_path, rgbn, caplog):
    pixels = np.ascontiguousarray(rgbn.transpose(1, 2, 0))
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for level in (pixels, pixels[:100:2, :132:2]):
            file.write(level, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32), metadata=None)
    assert thumbnail(open_image(tmp_path / "a.tif", alpha="keep"), 20).shape == (15, 20, 3)
    assert not caplog.records


def test_labelled_images_keep_alpha_where_they_are_told(tmp_path, rgbn):
    (tmp_path / "images").mkdir()
    for index in range(4):
        _write(tmp_path / "images" / f"{index}.tif", rgbn)
    (tmp_path / "labels.csv").write_text("image,label\n0,a\n1,b\n2,a\n3,b\n")
    dropped = LabelledImages(tmp_path / "images", tmp_path / "labels.csv")
    kept = LabelledImages(tmp_path / "images", tmp_path / "labels.csv", alpha="keep")
    assert (dropped.image_channels, kept.image_channels) == (3, 4)
    assert (dropped.state_dict()["alpha"], kept.state_dict()["alpha"]) == ("drop", "keep")


def test_predictions_keep_alpha_where_the_training_did(tmp_path, rgbn):
    path = _write(tmp_path / "a.tif", rgbn)
    trained = {"LabelledImages": {"class_names": ["a", "b"], "level": 0, "alpha": "keep"}}
    assert as_picture(path, info_in(trained, {})).shape[0] == 4
    assert as_picture(path, info_in({}, {"test": {"type": "ImageFolder", "alpha": "keep"}})).shape[0] == 4
    assert as_picture(path, info_in({}, {})).shape[0] == 3


def test_datasets_of_configurations_keep_alpha_where_they_are_told(tmp_path, rgbn):
    (tmp_path / "dogs").mkdir()
    _write(tmp_path / "dogs" / "a.tif", rgbn)
    (tmp_path / "list.txt").write_text("dogs/a.tif 0\n")
    for alpha, channels in (("keep", 4), ("drop", 3)):
        assert ImageFolder(tmp_path, alpha=alpha).picture(0).shape[0] == channels
        assert AnnotationFile(tmp_path, tmp_path / "list.txt", alpha=alpha).picture(0).shape[0] == channels


def test_pretraining_keeps_alpha_where_it_is_one_of_its_channels(tmp_path, rgbn, caplog):
    tiff, png = _write(tmp_path / "a.tif", rgbn, tile=(32, 32)), tmp_path / "a.png"
    pyvips.Image.new_from_array(rgbn.transpose(1, 2, 0)).copy(interpretation="srgb").pngsave(str(png))
    for path in (tiff, png):
        np.testing.assert_array_equal(read_pixels(path, 4), rgbn)
    assert open_lazily(tiff, 4).shape[0] == 4
    patch = SlideArgs(patch_size=200, foreground=False)
    np.testing.assert_array_equal(read_patch(tiff, patch, 4, Random(0)), rgbn)
    assert not caplog.records
    for path in (tiff, png):
        np.testing.assert_array_equal(read_pixels(path, 3), rgbn[:3])
    assert len(caplog.records) == 2
