"""Images from files, slides and datasets; their order."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import pyvips
import rasterio
import torch
import zarr
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader, Dataset

from tests.pretraining.tiny import TinyWrapper, assert_same, exported, train, write_images
from tests.small_images import write_tiff
from widefield.images import ImageReadError, open_image
from widefield.pretraining import METHODS
from widefield.pretraining.arguments import auto_workers
from widefield.pretraining.dataset import EpochOrder, Index, ViewDataset, collate
from widefield.pretraining.pixels import as_tensor, read_pixels
from widefield.pretraining.slides import SlideArgs, draw_region, foreground_cells, read_patch
from widefield.pretraining.source import Files, Items, Slides, find_images, make_source
from widefield.pretraining.transform_args import RandomResize, RandomRotation, TransformArgs
from widefield.pretraining.views import Views

SMALL = Views(TransformArgs(image_size=16))


def test_folders_are_searched_in_sorted_order_links_and_upper_case_included(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/10.jpg", "a/9.jpeg", "b/notes.txt", "z.tif", "other/deep/c.webp", "b/.hidden.png"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "root" / "other", target_is_directory=True)
    (tmp_path / "root" / "other" / "up").symlink_to(tmp_path / "root", target_is_directory=True)
    found = [path.relative_to(tmp_path / "root").as_posix() for path in find_images(tmp_path / "root")]
    assert found == ["a/10.jpg", "a/9.jpeg", "b/2.PNG", "linked/deep/c.webp", "other/deep/c.webp", "z.tif"]
    mixed = find_images([tmp_path / "root" / "z.tif", str(tmp_path / "root" / "a")])
    assert [path.name for path in mixed] == ["z.tif", "10.jpg", "9.jpeg"]


def test_wrong_paths_are_named_a_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "image.png").write_text("x")
    with pytest.raises(
        ValueError, match=r"nowhere does not exist; name .*\ndata: .*text\.txt has no extension of an image"
    ):
        find_images([tmp_path / "nowhere", tmp_path / "text.txt", tmp_path / "image.png"])
    with pytest.raises(ValueError, match=r"there are no images in .*empty; images end in \.bif"):
        find_images(tmp_path / "empty")
    assert find_images([tmp_path / "empty", tmp_path / "image.png"]) == [tmp_path / "image.png"]
    assert "empty holds no images" in caplog.text


def test_formats_and_types(tmp_path: Path) -> None:
    colours = data.astronaut()[:20, :30]
    grey16 = (np.arange(600).reshape(20, 30) * 100).astype(np.uint16)
    for name in ("a.png", "b.bmp", "c.ppm", "d.webp", "e.tif"):
        Image.fromarray(colours).save(tmp_path / name, **({"lossless": True} if name == "d.webp" else {}))
        assert torch.equal(read_pixels(tmp_path / name, 3), torch.from_numpy(colours.copy()).permute(2, 0, 1)), name
    Image.fromarray(np.dstack([colours, colours[..., :1]])).save(tmp_path / "rgba.png")
    assert torch.equal(read_pixels(tmp_path / "rgba.png", 3), torch.from_numpy(colours.copy()).permute(2, 0, 1))
    assert read_pixels(tmp_path / "rgba.png", 4).shape == (4, 20, 30)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_pixels(tmp_path / "cmyk.jpg", 3).shape == (3, 20, 30)
    Image.fromarray(colours).convert("P").save(tmp_path / "palette.png")
    assert read_pixels(tmp_path / "palette.png", 3).shape == (3, 20, 30)
    Image.fromarray(colours[..., 0] > 100).save(tmp_path / "bits.png")
    assert read_pixels(tmp_path / "bits.png", 3).max() == 255
    for name in ("grey16.png", "grey16.tif"):
        Image.fromarray(grey16).save(tmp_path / name)
        pixels = read_pixels(tmp_path / name, 3)
        assert pixels.dtype == torch.uint16 and pixels.shape == (3, 20, 30)
        assert torch.equal(pixels[0].int(), torch.from_numpy(grey16.astype(np.int32)))
    rgb16 = pyvips.Image.new_from_array(np.dstack([grey16] * 3))
    rgb16.pngsave(str(tmp_path / "rgb16.png"))
    assert read_pixels(tmp_path / "rgb16.png", 3).dtype == torch.uint16
    np.save(tmp_path / "seven.npy", np.random.default_rng(0).random((7, 20, 30), dtype=np.float32))
    assert read_pixels(tmp_path / "seven.npy", 7).dtype == torch.float32
    with pytest.raises(ImageReadError, match=r"has 7 channels and 3 are expected; say .*\"num_channels\": 7"):
        read_pixels(tmp_path / "seven.npy", 3)
    Image.fromarray(colours).convert("RGBA").save(tmp_path / "alpha.png")
    assert read_pixels(tmp_path / "alpha.png", 3).shape == (3, 20, 30)
    np.save(tmp_path / "four.npy", np.zeros((4, 20, 30), np.float32))  # the last one is no alpha channel
    with pytest.raises(ImageReadError, match="has 4 channels and 3 are expected"):
        read_pixels(tmp_path / "four.npy", 3)


def test_large_photos_are_decoded_as_small_as_the_views_allow(tmp_path: Path) -> None:
    whole = np.tile(data.astronaut(), (3, 4, 1))
    Image.fromarray(whole).save(tmp_path / "large.jpg", quality=95)
    off = dict.fromkeys(("color_jitter", "random_gray_scale", "gaussian_blur"))
    views = Views(TransformArgs(image_size=96, random_resize=RandomResize(0.25, 1.0), **off))
    assert views.reduction(1536, 2048) == pytest.approx(0.5 * (1536 * 2048 * 0.75) ** 0.5 / 96)
    assert views.reduction(90, 90) == 1
    small = read_pixels(tmp_path / "large.jpg", 3, views.reduction)
    assert small.shape == (3, 192, 256)
    large = read_pixels(tmp_path / "large.jpg", 3)
    for k in range(5):  # up to the rounding of a crop to whole pixels
        of_large, of_small, other = (
            views(image, Random(seed))[0].float() for image, seed in ((large, k), (small, k), (large, k + 1))
        )
        assert (of_small - of_large).abs().mean() < 0.25 * (other - of_large).abs().mean()


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (4, np.uint16), (7, np.float32)])
def test_images_of_any_number_of_channels_and_type_train(channels: int, dtype: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(8):
        pixels = generator.random((channels, 24, 32))
        scaled = pixels if dtype == np.float32 else pixels * np.iinfo(dtype).max
        np.save(tmp_path / "images" / f"{k}.npy", scaled.astype(dtype))
    train(tmp_path / "out", tmp_path / "images", model=TinyWrapper(channels), transform_args={"num_channels": channels})


def test_floats_of_another_range_need_to_be_explained(tmp_path: Path) -> None:
    images = [torch.rand(3, 24, 24) * 4000 for _ in range(8)]
    with pytest.raises(
        ValueError, match=r"item 0 of list has float values .* transform_args=\{\"value_range\": \(low, high\)\}"
    ):
        train(tmp_path / "out", images)
    train(tmp_path / "out", images, transform_args={"value_range": (0, 4000)})


def test_pictures_of_fewer_bits_than_their_type_get_a_hint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = [(torch.rand(1, 24, 24) * 4095).to(torch.uint16) for _ in range(4)]
    pictures[0][0, 0, 0] = 4095
    options: dict[str, Any] = {"model": TinyWrapper(1), "epochs": 0}
    train(tmp_path / "a", pictures, transform_args={"num_channels": 1}, **options)
    assert "is 4095, of 65535 that its type has" in caplog.text and '{"value_range": (0, 4095)}' in caplog.text
    caplog.clear()
    train(tmp_path / "b", pictures, transform_args={"num_channels": 1, "value_range": (0, 4095)}, **options)
    assert "dark" not in caplog.text


def test_16_bits_of_a_pgm_and_booleans_fill_the_range_of_their_type(tmp_path: Path) -> None:
    values = np.array([[0, 1000, 65535]], dtype=">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5\n3 1\n65535\n" + values.tobytes())
    pixels = read_pixels(tmp_path / "a.pgm", 1)
    assert pixels.dtype == torch.uint16 and pixels.flatten().tolist() == [0, 1000, 65535]
    assert as_tensor(np.array([[True, False]])).tolist() == [[[255, 0]]]


def test_items_that_are_no_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: item 0 of list has 'pixels' and needs an entry \"image\""):
        train(tmp_path / "out", [{"pixels": 1}] * 4)
    with pytest.raises(ValueError, match=r"data: an image must be a tensor .* got int"):
        train(tmp_path / "out", [7] * 4)


class Noisy(Dataset):
    """Draws from every generator that a dataset may use."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.rand(3, 24, 24) * float(np.random.rand()), index


def test_a_dataset_trains_reproducibly_whatever_it_draws_from(tmp_path: Path) -> None:
    for name, workers in (("a", 0), ("b", 1)):
        train(tmp_path / name, Noisy(), num_workers=workers)
    assert_same(dict(exported(tmp_path / "a")), dict(exported(tmp_path / "b")))
    source = Items([{"image": np.zeros((5, 6), np.uint8)}, Image.new("RGB", (6, 5)), (np.zeros((5, 6, 3)), "label")], 3)
    assert [tuple(source.read(k, Random(0)).shape) for k in range(3)] == [(3, 5, 6)] * 3


def test_samples_depend_on_seed_epoch_and_number_alone(tmp_path: Path) -> None:
    dataset = ViewDataset(Files(tuple(find_images(write_images(tmp_path, 4))), 3), SMALL, seed=3)
    state = torch.get_rng_state()
    first = dataset[Index(2, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert_same(list(dataset[Index(2, 1)].views), list(first.views))
    others = [dataset[Index(3, 1)], dataset[Index(2, 2)], ViewDataset(dataset.source, SMALL, seed=4)[Index(2, 1)]]
    assert all(not torch.equal(other.views[0], first.views[0]) for other in others)


def test_batches_are_dealt_to_processes_and_go_on_where_they_were() -> None:
    def batches(**options: Any) -> list[list[Index]]:
        order = EpochOrder(11, 4, seed=1, **{k: v for k, v in options.items() if k in ("rank", "processes")})
        order.resume(options.get("after", 0))
        out = []
        for epoch in range(order.epoch, 3):
            order.set_epoch(epoch)
            out += list(order)
        return out

    whole = batches()
    assert len(whole) == 6 and all(len({index.image for index in batch}) == 4 for batch in whole)
    assert [index.epoch for batch in whole for index in batch] == [0] * 8 + [1] * 8 + [2] * 8
    images = [[index.image for batch in whole[2 * k : 2 * k + 2] for index in batch] for k in range(3)]
    assert len(set(map(tuple, images))) == 3, "every epoch has an order of its own"
    parts = [batches(rank=rank, processes=2) for rank in range(2)]
    assert [left + right for left, right in zip(*parts, strict=True)] == whole
    for after in range(6):
        assert batches(after=after) == whole[after:]


def test_a_batch_of_bytes_and_floats_is_of_floats() -> None:
    items = [torch.full((3, 20, 20), 255, dtype=torch.uint8), torch.ones(3, 20, 20)]
    dataset = ViewDataset(Items(items, 3), Views(TransformArgs(image_size=8, solarize=None)), 0)
    (batch,) = DataLoader(dataset, batch_sampler=[[Index(0, 0), Index(0, 1)]], collate_fn=collate)
    assert batch.views[0].dtype == torch.float32 and batch.views[0].max() <= 1


def slide(path: Path, dtype: Any = np.uint8) -> Path:
    """A pyramid of 512 x 768 with tissue in a quarter of it, half a micrometre per pixel."""
    pixels = np.full((512, 768, 3), 240, np.uint8)
    pixels[256:, 384:] = data.immunohistochemistry()[:256, :384]
    write_tiff(path, pixels.astype(dtype))
    return path


def test_patches_lie_on_tissue_and_are_drawn_by_the_generator(tmp_path: Path) -> None:
    path, args = slide(tmp_path / "slide.tif"), SlideArgs(64)
    image = open_image(path)
    regions = [draw_region(image, args, Random(k)) for k in range(50)]
    assert all(r.y > 180 and r.x > 300 for r in regions)
    assert all(r.y + 64 <= 512 and r.x + 64 <= 768 for r in regions)
    assert len({(r.y, r.x) for r in regions}) > 40
    assert draw_region(image, args, Random(7)) == regions[7]
    anywhere = [draw_region(image, SlideArgs(64, foreground=False), Random(k)) for k in range(50)]
    assert min(r.y for r in anywhere) < 100
    rows, columns, cells = foreground_cells(path)
    assert 0.1 < len(cells) / (rows * columns) < 0.3


def test_levels_and_spacings_of_patches(tmp_path: Path) -> None:
    path = slide(tmp_path / "slide.tif")
    for args, scale in ((SlideArgs(64, level=1), 2), (SlideArgs(64, spacing=1.5), 3)):
        patch = read_patch(path, args, 3, Random(0))
        assert patch.shape == (3, 64, 64)
        image = open_image(path, args.level, spacing=args.spacing)
        assert image.shape == (3, round(512 / scale), 768 // scale)
        region = draw_region(image, args, Random(0))
        assert torch.equal(patch, torch.from_numpy(image.read(region.y, region.x, 64, 64)))
    assert read_patch(path, SlideArgs(2000), 3, Random(0)).shape == (3, 512, 768)
    with pytest.raises(ImageReadError, match=r"cannot use .*slide\.tif: level 9 .* does not exist; its levels"):
        read_patch(path, SlideArgs(64, level=9), 3, Random(0))
    Image.fromarray(data.astronaut()).save(tmp_path / "photo.png")
    with pytest.raises(ImageReadError, match=r"photo\.png.* does not say its own"):
        read_patch(tmp_path / "photo.png", SlideArgs(64, spacing=1.0), 3, Random(0))


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_every_format_of_open_image_is_read(tmp_path: Path) -> None:
    pixels = np.ascontiguousarray(data.astronaut()[:40, :50].transpose(2, 0, 1))
    zarr.create_array(str(tmp_path / "a.zarr"), data=pixels)
    with rasterio.open(
        tmp_path / "a.jp2", "w", "JP2OpenJPEG", 50, 40, 3, dtype="uint8", QUALITY=100, REVERSIBLE="YES"
    ) as file:
        file.write(pixels)
    for name in ("a.zarr", "a.jp2"):
        np.testing.assert_array_equal(read_pixels(tmp_path / name, 3), pixels)


def test_slides_train(tmp_path: Path) -> None:
    for k in range(2):
        slide(tmp_path / f"slides/{k}.tif") if (tmp_path / "slides").mkdir(exist_ok=True) is None else None
    for name, workers in (("a", 0), ("b", 1)):
        train(
            tmp_path / name, tmp_path / "slides", slides={"patch_size": 48, "patches_per_slide": 4}, num_workers=workers
        )
    assert_same(dict(exported(tmp_path / "a")), dict(exported(tmp_path / "b")))
    assert len(Slides((Path("a"), Path("b")), 3, SlideArgs())) == 128


@pytest.mark.parametrize(("cpus", "devices", "workers"), [(4, 1, 3), (4, 2, 1), (4, 3, 0), (16, 1, 8), (None, 1, 8)])
def test_workers_by_cores(cpus: int | None, devices: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert auto_workers(cpus, devices) == workers
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    assert auto_workers(cpus, devices) == 15


@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_changes_that_wait_for_the_batch_are_those_of_the_views(method: str, tmp_path: Path) -> None:
    args = replace(METHODS.get(method).transforms, image_size=40, random_rotation=RandomRotation(0.3, 40))
    dataset = ViewDataset(make_source(write_images(tmp_path), 3, None, None), Views(args), seed=1)
    indices = [Index(epoch, image) for epoch in range(3) for image in range(10)]
    made, waiting = (collate([one[index] for index in indices]) for one in (dataset, replace(dataset, deferred=True)))
    for done, cut, finished in zip(made.finished(), waiting.views, waiting.finished(), strict=True):
        assert done.dtype == finished.dtype == torch.uint8
        assert (done.int() - finished.int()).abs().max() <= 1  # sums of a batch are rounded otherwise
        assert (cut.int() - finished.int()).abs().max() > 50


@pytest.mark.gpu
def test_a_run_on_cuda(tmp_path: Path) -> None:
    train(tmp_path / "out", write_images(tmp_path / "images"), "dino", accelerator="cuda")
    assert exported(tmp_path / "out")["0.weight"].isfinite().all()


def test_pictures_of_every_common_ending_are_read_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = Image.fromarray(data.astronaut()[:20, :24])
    for name, kind in (("a.gif", "GIF"), ("b.jfif", "JPEG"), ("c.JPE", "JPEG"), ("d.pnm", "PPM"), ("e.tga", "TGA")):
        picture.save(tmp_path / name, format=kind)
    (tmp_path / "f.heic").write_bytes(b"x")
    found = find_images(tmp_path)
    assert [path.name for path in found] == ["a.gif", "b.jfif", "c.JPE", "d.pnm"]
    assert "left out: 1 .heic, 1 .tga; convert them to PNG" in caplog.text
    for path in found:
        assert read_pixels(path, 3).shape == open_image(path).shape == (3, 20, 24)
