"""Maps that are written while they are computed: those of `forward`, without memory for the whole of them, or refused."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.streaming.exactness import plain_reference, relative_error
from widefield.streaming import StreamingCNN
from widefield.streaming.budget import parse_tile_size
from widefield.streaming.postprocess import Postprocess

IMAGE = (67, 90)


class UNet(nn.Module):
    def __init__(self, classes: int = 5, norm: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), norm(), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.out = nn.Conv2d(14, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inside(x)
        deep = F.interpolate(self.deep(first), size=x.shape[2:], mode="bilinear")
        return self.out(torch.cat([first, deep], 1))


def group_norm() -> nn.Module:
    return nn.GroupNorm(2, 6)


@cache  # with what was captured
def unet(norm: Callable[[], nn.Module] = nn.Identity) -> StreamingCNN:
    torch.manual_seed(0)
    return StreamingCNN(UNet(norm=norm).double().eval(), (16, 24), verify=False)


def image(seed: int = 1, n: int = 1) -> Tensor:
    return torch.rand(n, 2, *IMAGE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    found = torch.zeros(7, 9, dtype=torch.bool)
    found[1:3, 2:7] = found[5, 1] = True
    return found


@torch.no_grad()
def called(model: Callable[..., Any], x: Any, *maps: Any, **options: Any) -> Any:
    """The results of a call, on the CPU as arrays are."""
    return pytree.tree_map(Tensor.cpu, model(x, *maps, **options))


@pytest.mark.parametrize("tile", [(16, 24), (8, None), (200, 200), (9, 31)])
@pytest.mark.parametrize("norm", [nn.Identity, group_norm], ids=["one stage", "two stages"])
def test_a_written_map_is_bit_for_bit_that_of_forward_and_exactly_that_of_plain_pytorch(
    tile: Any, norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unet(norm)
    monkeypatch.setattr(model, "tile_size", parse_tile_size(tile))
    out = np.full((1, 5, *IMAGE), np.nan)
    assert model.write(image(), out) is out
    assert torch.equal(torch.from_numpy(out), called(model, image()))
    assert relative_error(torch.from_numpy(out), called(plain_reference(model.module), image())) <= 1e-14


def test_a_region_is_written_as_it_is_returned() -> None:
    model, region = unet(), (11, 20, 30, 41)
    out = torch.full((5, 30, 41), torch.nan, dtype=torch.float64)
    model.write(image(), out, region=region)
    assert torch.equal(out[None].cpu(), called(model, image(), region=region))
    model = unet(group_norm)
    prepared = model.prepare(image())
    model.write(prepared, out, region=region)
    assert torch.equal(out[None].cpu(), called(model, prepared, region=region))


def test_background_is_zero_whatever_the_array_held_and_whatever_is_done_with_tiles() -> None:
    model = unet()
    out = np.full((5, *IMAGE), 7.0)
    model.write(image(), out, mask=mask(), fill=0.25)
    expected = called(model, image(), mask=mask(), fill=0.25)
    assert np.array_equal(out, expected[0])
    model.write(image(), out, mask=mask(), fill=0.25, postprocess="sigmoid")
    foreground = F.adaptive_max_pool2d(mask()[None].double(), IMAGE)[0].cpu() > 0
    np.testing.assert_allclose(out, torch.where(foreground, expected.sigmoid(), 0)[0], 1e-15)
    assert not out[:, ~foreground].any()


def test_images_of_a_batch_with_masks_of_their_own_are_written_to_one_array() -> None:
    model, both = unet(), torch.stack([mask(), ~mask()])
    out = np.ones((2, 5, *IMAGE))
    model.write(image(n=2), out, mask=both)
    assert np.array_equal(out, called(model, image(n=2), mask=both))


POSTPROCESSES = {
    "argmax": ("argmax", None, lambda x: x.argmax(1).to(torch.uint8)),
    "softmax": ("softmax", None, lambda x: x.softmax(1)),
    "uint8 of sigmoid": (["sigmoid", "uint8"], None, lambda x: (x.sigmoid() * 255).float().round().to(torch.uint8)),
    "a threshold": (0.1, None, lambda x: (x > 0.1).to(torch.uint8)),
    "a function": (lambda x: x[:, 1:3].exp(), None, lambda x: x[:, 1:3].exp()),
    "a dtype": (lambda x: x * 400, "uint8", lambda x: (x * 400).round().clamp(0, 255).to(torch.uint8)),
    "torch's dtype": (None, torch.float32, lambda x: x.float()),
    "bool": (lambda x: x > 0, None, lambda x: (x > 0).to(torch.uint8)),
    "int16": ("argmax", "int16", lambda x: x.argmax(1).to(torch.int16)),
}


class Kept:
    """A target that keeps what it is told of maps, and their tiles put together."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.done: list[int] = []
        self.largest = 0

    def buffer_rows(self, written: Any) -> int:
        return 0

    @contextmanager
    def begin(self, image: Any, maps: Any) -> Any:
        self.maps, self.places = maps, self.arrays
        self.arrays += [np.zeros(each.shape, each.dtype) for each in maps]
        self.done = [0] * len(maps)
        yield self

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        assert y >= self.done[number], "a tile above rows that were said to be done"
        assert tile.dtype == self.arrays[number].dtype
        self.largest = max(self.largest, tile[..., 0, 0].size * tile.shape[-2] * tile.shape[-1])
        self.arrays[number][..., y : y + tile.shape[-2], x : x + tile.shape[-1]] = tile

    def rows_done(self, number: int, y: int) -> None:
        assert y >= self.done[number]
        self.done[number] = y


@pytest.mark.parametrize("name", POSTPROCESSES)
def test_tiles_are_processed_as_the_whole_result_would_be(name: str) -> None:
    process, dtype, expected = POSTPROCESSES[name]
    model, kept = unet(), Kept()
    model.write(image(), kept, postprocess=process, dtype=dtype)
    wanted = expected(called(model, image())).numpy()
    assert kept.arrays[0].dtype == wanted.dtype
    np.testing.assert_allclose(
        kept.arrays[0], wanted, 1e-15
    )  # exp differs in the last bit between vectors and single numbers
    assert kept.maps[0].labels == (name in ("argmax", "a threshold", "bool", "int16"))


@pytest.mark.parametrize(("classes", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_classes_are_stored_in_a_type_that_holds_them(classes: int, dtype: str) -> None:
    tile = torch.zeros(1, classes, 1, 2)
    tile[0, -1, 0, 1] = 1
    steps = [lambda x: x[:, :1].expand(1, classes, *x.shape[2:]), "argmax"]
    process = Postprocess.of(steps, None, (1, 1, 9, 9), torch.float32, torch.device("cpu"))
    found = process.cast(Postprocess.of("argmax", None, tile.shape, tile.dtype, tile.device)(tile)).numpy()
    assert process.dtype == found.dtype == dtype and process.labels
    assert found.tolist() == [[[0, classes - 1]]]


class WithLabels(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return x * F.interpolate(labels[:, None].double(), scale_factor=2), labels + 1


def test_maps_that_forward_takes_besides_the_image_are_given_behind_the_target() -> None:
    x, labels, kept = image()[..., :64, :88], torch.arange(32 * 44).reshape(1, 32, 44) % 7, Kept()
    StreamingCNN(WithLabels(), 24, verify=False).write(x, kept, labels)
    for found, expected in zip(kept.arrays, called(WithLabels(), x, labels), strict=True):
        assert np.array_equal(found, expected)
    assert [each.stride for each in kept.maps] == [(1, 1), (2, 2)]


class Pyramid(nn.Module):
    """A dictionary of maps, one of which is also an attribute, and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 4, 4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        self.features = fine
        return {"maps": (fine, coarse), "score": coarse.mean((2, 3))}


def test_several_maps_are_written_and_what_is_no_map_is_returned() -> None:
    torch.manual_seed(0)
    model, kept = StreamingCNN(Pyramid().double(), 16, verify=False), Kept()
    result = model.write(image(), kept)
    expected = called(plain_reference(model.module), image())
    assert [each.name for each in kept.maps] == ["maps.0", "maps.1"]
    assert [each.stride for each in kept.maps] == [(1.0, 1.0), (4.0, 4.0)]
    assert kept.maps[1].origin == (1.5, 1.5)
    assert result["maps"][1] is kept.arrays[1]
    assert relative_error(result["score"].cpu(), expected["score"]) <= 1e-14
    for found, wanted in zip(kept.arrays, expected["maps"], strict=True):
        assert relative_error(torch.from_numpy(found), wanted) <= 1e-14
    assert relative_error(model.module.features.cpu(), expected["maps"][0]) <= 1e-14
    arrays = [np.zeros((3, *IMAGE)), np.zeros((4, 16, 22))]
    model.write(image(), arrays)
    assert np.array_equal(arrays[1], kept.arrays[1][0])


def test_tiles_come_in_rows_and_none_is_larger_than_a_step_makes() -> None:
    model, kept = unet(), Kept()
    model.write(image(), kept, mask=mask())
    assert kept.largest < np.prod(IMAGE) * 5 / 4


def test_a_region_lies_where_its_cells_look() -> None:
    model, kept = StreamingCNN(nn.Conv2d(2, 3, 2, 2).double(), 16, verify=False), Kept()
    model.write(image(), kept, region=(20, 30, 10, 12))
    assert kept.maps[0].shape == (1, 3, 6, 6)  # rows 9 to 14 of 33, of 67 pixels
    assert kept.maps[0].origin == (18.5, 30.5)


class DownAndUp(nn.Sequential):
    """The middles of its receptive fields are 2 pixels off its entries."""

    def __init__(self) -> None:
        down = [nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1)]
        super().__init__(*down, nn.Upsample(scale_factor=4))


@pytest.mark.parametrize(
    ("net", "origin", "stride"),
    [
        (DownAndUp(), 0, 1),
        (nn.Conv2d(2, 2, 3, padding=1), 0, 1),
        (nn.Conv2d(2, 2, 9), 4, 1),
        (nn.Conv2d(2, 2, 3, 2, 1), 0.5, 2),
        (nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.PixelShuffle(2)), -0.25, 0.5),
    ],
    ids=["down and up", "padded", "unpadded", "strided", "larger"],
)
def test_entries_lie_side_by_side_where_they_cover_the_image(net: nn.Module, origin: float, stride: float) -> None:
    kept = Kept()
    StreamingCNN(net.double(), 32, verify=False).write(image()[..., :64, :88], kept)
    assert (kept.maps[0].origin, kept.maps[0].stride) == ((origin,) * 2, (stride,) * 2)


def test_the_plan_does_not_count_what_is_written_but_what_waits_to_be() -> None:
    model = StreamingCNN(UNet(), (64, None), verify=False)
    with torch.no_grad():
        whole = model.plan((2, 4096, 4096)).predicted_bytes
    array = model.plan((2, 4096, 4096), to=np.empty((5, 0, 0))).predicted_bytes
    file = model.plan((2, 4096, 4096), to="out.ome.tif").predicted_bytes
    labels = model.plan((2, 4096, 4096), to="out.ome.tif", postprocess="argmax").predicted_bytes
    assert whole["outputs"] == 5 * 4096**2 * 4
    assert array["outputs"] == 0
    assert 4096 * 5 * 4 * 256 < file["outputs"] < whole["outputs"] / 3
    assert labels["outputs"] == file["outputs"] / 20
    assert {**whole, "outputs": 0} == array


def test_a_budget_that_no_whole_map_fits_is_enough_to_write_one() -> None:
    torch.manual_seed(0)
    model = StreamingCNN(UNet(20).double(), memory_budget="10MiB", verify=False)
    x = torch.rand(1, 2, 640, 128, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match="memory_budget of 10 MiB is too small"):
        model(x)
    out = np.zeros((20, 640, 128))
    model.write(x, out)
    assert relative_error(torch.from_numpy(out)[None], called(plain_reference(model.module), x)) <= 1e-14


def test_under_autocast_a_map_is_written_in_a_type_that_arrays_have() -> None:
    model, kept = StreamingCNN(nn.Conv2d(2, 3, 3), 32, verify=False), Kept()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        model.write(image().float(), kept)
        expected = called(model, image().float())
    assert expected.dtype == torch.bfloat16 and kept.maps[0].dtype == np.float32
    assert np.array_equal(kept.arrays[0], expected.float())


def test_height_and_width_may_stand_anywhere_in_a_map() -> None:
    class Last(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 3, 1)

    model, kept = StreamingCNN(Last(2, 3, 3, padding=1).double(), 16, verify=False), Kept()
    model.write(image(), kept, mask=mask())
    assert np.array_equal(kept.arrays[0], called(model, image(), mask=mask()).permute(0, 3, 1, 2))


class Scores(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


REFUSED = {
    "an array of another shape": (
        unet,
        np.zeros((5, 3, 3)),
        {},
        r"map of shape \(1, 5, 67, 90\) is written to an array",
    ),
    "too many arrays": (unet, [np.zeros((5, *IMAGE))] * 2, {}, "has 1 maps .* and 2 arrays were given"),
    "a number": (unet, 3, {}, r"to=3; expected a path that ends in \.ome\.zarr"),
    "an ending": (unet, "out.jpg", {}, "says no format that maps are written in"),
    "no map": (lambda: StreamingCNN(Scores().double(), 16, verify=False), "out.tif", {}, "holds no map"),
    "a name": (unet, "out.tif", {"postprocess": "max"}, "postprocess='max' must be one of 'argmax', 'softmax'"),
    "a mean": (unet, "out.tif", {"postprocess": lambda x: x - x.mean()}, "function of each position alone"),
    "a blur": (unet, "out.tif", {"postprocess": lambda x: F.avg_pool2d(x, 3, 1, 1)}, "function of each position alone"),
    "pooling": (unet, "out.tif", {"postprocess": lambda x: F.max_pool2d(x, 2)}, r"it made \(1, 5, 2, 3\)"),
    "complex numbers": (unet, "out.tif", {"dtype": "complex64"}, "must be a type of real or whole numbers"),
    "text": (unet, "out.tif", {"dtype": "U3"}, "must be a type of real or whole numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, to, options, message = REFUSED[name]
    model = make()
    monkeypatch.setattr(model, "progress", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=message):
        model.write(image(), to, **options)


def test_lists_of_images_and_disabled_streaming_are_refused() -> None:
    model = unet()
    with pytest.raises(ValueError, match="takes one image"):
        model.write([image()], "out.tif")
    model = StreamingCNN(model.module, 16)
    model.disable()
    with pytest.raises(ValueError, match="call enable"):
        model.write(image(), "out.tif")


def test_writing_leaves_no_gradients_behind() -> None:
    model, x = unet(), image().requires_grad_()
    model.write(x, np.zeros((5, *IMAGE)))
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert model(x).requires_grad


def test_a_batch_is_not_written_to_a_file(tmp_path: Path) -> None:
    streamed = StreamingCNN(nn.Conv2d(3, 4, 3), 16, verify=False)
    with pytest.raises(ValueError, match="one image at a time"):
        streamed.write(torch.rand(2, 3, 40, 40), tmp_path / "classes.tif", postprocess="argmax")


def test_an_array_that_is_not_written_to_its_file_keeps_what_it_gets(tmp_path: Path) -> None:
    np.zeros((4, 38, 38), np.float32).tofile(tmp_path / "map")
    array = np.memmap(tmp_path / "map", np.float32, "c", shape=(4, 38, 38))
    module, image = nn.Conv2d(3, 4, 3), torch.rand(1, 3, 40, 40)
    StreamingCNN(module, 16, verify=False).write(image, array)
    assert relative_error(torch.from_numpy(np.array(array)), module(image).detach()[0]) < 1e-5
