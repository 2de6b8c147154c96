"""Building a pipeline reads no pixels, and a tensor of a crop reads the crop alone."""

import io
import tracemalloc

import numpy as np
import pytest
import pyvips

import widefield.transforms as A
from tests.transforms.pictures import noise, vips
from widefield.images import ImageReadError

SIDE = 4096


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A tiled TIFF of 48 MB."""
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    x = np.arange(SIDE)
    pixels = np.stack(np.broadcast_arrays(x[:, None] % 256, x % 251, (x[:, None] + x) % 241), -1).astype(np.uint8)
    vips(pixels).tiffsave(str(path), tile=True, tile_width=256, tile_height=256)
    return path, pixels


class CountingFile:
    """A file that libvips reads through Python."""

    def __init__(self, path):
        self.file = io.BytesIO(path.read_bytes())
        self.bytes = 0
        self.source = pyvips.SourceCustom()
        self.source.on_read(self.read)
        self.source.on_seek(self.seek)

    def read(self, size):
        data = self.file.read(size)
        self.bytes += len(data)
        return data

    def seek(self, offset, whence):
        return self.file.seek(offset, whence)

    def open(self):
        return pyvips.Image.new_from_source(self.source, "")


EVERYTHING = [
    A.Flip(p=1),
    A.RandomRotate90(p=1),
    A.Transpose(p=1),
    A.Rotate(p=1),
    A.Affine(p=1),
    A.ElasticTransform(p=1),
    A.Resize(3000, 2000),
    A.RandomScale(p=1),
    A.PadIfNeeded(5000, 5000),
    A.RandomBrightnessContrast(p=1),
    A.RandomGamma(p=1),
    A.HueSaturationValue(p=1),
    A.HEDShift(p=1),
    A.Blur(p=1),
    A.MedianBlur(p=1),
    A.GaussianBlur(2, p=1),
    A.Sharpen(p=1),
    A.GaussNoise(p=1),
    A.CoarseDropout(p=1),
    A.ChannelDropout(p=1),
    A.ToDtype("float", scale=True),
    A.HueSaturationValue(p=1),
    A.Normalize([0.5] * 3, [0.2] * 3),
    A.CropOrPad(512, 512),
]


def test_building_a_pipeline_of_everything_reads_no_pixels(slide):
    file = CountingFile(slide[0])
    image = file.open()
    header = file.bytes
    assert header < 200_000
    out = A.Compose(EVERYTHING)(image=image)["image"]
    assert (out.height, out.width) == (512, 512)
    assert file.bytes == header


@pytest.mark.parametrize(
    "colours", [[], [A.HueSaturationValue(p=1), A.GaussianBlur(1, p=1)]], ids=["plain", "coloured"]
)
def test_a_tensor_of_a_crop_reads_the_tiles_under_it(slide, colours):
    path, _ = slide
    file = CountingFile(path)
    image = file.open()
    header = file.bytes
    transforms = A.Compose([A.CropOrPad(600, 600), A.Flip(p=1), *colours, A.ToDtype("float", scale=True), A.ToTensor()])
    tensor = transforms(image=image)["image"]
    assert tensor.shape == (3, 600, 600)
    tiles = 5 * 5 * 256 * 256 * 3  # the crop touches 4 x 4; a blur at its rim could touch one more
    assert 600 * 600 * 3 <= file.bytes - header <= tiles < path.stat().st_size / 8


def test_the_tensor_of_a_crop_is_right(slide):
    path, pixels = slide
    image = pyvips.Image.new_from_file(str(path))
    tensor = A.Compose([A.Crop(1000, 2000, 1700, 2100), A.HorizontalFlip(p=1), A.ToTensor()])(image=image)["image"]
    np.testing.assert_array_equal(tensor.numpy(), pixels[2000:2100, 1000:1700][:, ::-1].transpose(2, 0, 1))


def test_a_tensor_takes_little_memory_beside_itself(slide):
    image = pyvips.Image.new_from_file(str(slide[0]))
    tracemalloc.start()
    tensor = A.ToTensor()(image=image)["image"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < tensor.numpy().nbytes * 1.1


def test_sequential_files_are_read_from_top_to_bottom_and_not_otherwise(tmp_path):
    pixels = noise("uint8", 3, 700, 900)
    vips(pixels).write_to_file(str(tmp_path / "a.png"))
    image = pyvips.Image.new_from_file(str(tmp_path / "a.png"), access="sequential")
    tensor = A.Compose([A.HorizontalFlip(p=1), A.HueSaturationValue(0, 0, 0, p=1), A.ToTensor()])(image=image)["image"]
    assert tensor.shape == (3, 700, 900)
    image = pyvips.Image.new_from_file(str(tmp_path / "a.png"), access="sequential")
    with pytest.raises(ImageReadError, match='opened with access="sequential", leave that out'):
        A.Compose([A.VerticalFlip(p=1), A.ToTensor()])(image=image)


def test_a_damaged_file_is_an_error_of_reading(tmp_path):
    path = tmp_path / "cut.png"
    vips(noise("uint8", 3, 700, 900)).write_to_file(str(path))
    path.write_bytes(path.read_bytes()[:100_000])
    image = pyvips.Image.new_from_file(str(path), fail_on="error")
    with pytest.raises(ImageReadError, match="cannot read the pixels"):
        A.ToTensor()(image=image)
