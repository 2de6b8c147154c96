"""Parts of images: regions and masks agree with plain PyTorch, and what is not needed is neither read nor computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from tests.streaming.exactness import TOLERANCE, plain_reference, randomise, relative_error
from tests.streaming.masked import OverForeground, foreground, masked
from tests.streaming.test_random_networks import Drawn, layer
from widefield.streaming import Local, StreamingCNN
from widefield.streaming.budget import parse_tile_size

Region = tuple[int, int, int, int]


def cropped(result: Any, region: Region | None, image: tuple[int, int]) -> Any:
    """The cells of each map (N, C, H, W) of a result that a region of the image touches."""

    def crop(x: Tensor) -> Tensor:
        if region is None or x.ndim != 4:
            return x
        (y, y_end), (x0, x_end) = (
            (start * n // size, -(-(start + length) * n // size))
            for start, length, n, size in zip(region[:2], region[2:], x.shape[2:], image, strict=True)
        )
        return x[:, :, y:y_end, x0:x_end]

    return pytree.tree_map(crop, result)


def assert_part_is_exact(
    module: nn.Module | StreamingCNN,
    image: Tensor,
    tile: Any,
    region: Region | None = None,
    mask: Tensor | None = None,
    gather: bool = False,
) -> None:
    """Results, the image's gradient and all parameter gradients of a part are those of the plain module."""
    streamed = module if isinstance(module, StreamingCNN) else StreamingCNN(module.double(), verify=False)
    streamed.tile_size = parse_tile_size(tile)
    exact = streamed.batch_statistics == "exact"
    reference = streamed.module if exact else plain_reference(streamed.module)
    image = image.double().requires_grad_()
    expected = reference(image) if mask is None else masked(reference, image, mask, fill=0.25)
    expected = cropped(expected, region, (image.shape[2], image.shape[3]))
    found = streamed(image, region=region, mask=mask, fill=0.25, gather=gather)
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    for f, e in pairs:
        assert relative_error(f, e) <= TOLERANCE
    torch.manual_seed(1)
    weights = [torch.randn_like(e) for _, e in pairs]
    names = ["image", *(name for name, _ in streamed.module.named_parameters())]
    grads = []
    for k, owner in ((0, streamed.module), (1, reference)):
        loss = sum((pair[k] * w).sum() for pair, w in zip(pairs, weights, strict=True))
        grads.append(torch.autograd.grad(loss, [image, *owner.parameters()], allow_unused=True, materialize_grads=True))
    scale = max(g.abs().max().item() for g in grads[1])
    for name, f, e in zip(names, *grads, strict=True):
        assert (f - e).abs().max().item() <= TOLERANCE * max(e.abs().max().item(), 1e-4 * scale, 1e-9), name


def trunk(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), *more)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).flatten(2).softmax(-1)
        return (x.flatten(2) @ weights.mT).flatten(1)


class GrowingCells(nn.Module):
    def __init__(self, pool: Callable[[Tensor, tuple[int, int]], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x, (x.shape[2] - 13, x.shape[3] // 2))


class GoesRound(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x.roll((-3, 2), (2, 3)), 3, 1, 1).roll((3, -2), (2, 3)) * x
        return torch.cat([x.mean((2, 3)), x.roll(2, 2).amax((2, 3))], 1)


class Statistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        space = (2, 3)
        over = x.mean(space), x.amax(space), x.amin(space), x.var(space), x.logsumexp(space), x.sum(space)
        return torch.cat(over, 1)


NETWORKS = {
    "map": trunk(nn.Conv2d(6, 2, 3, 2, 1)),
    "decoder": trunk(nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, padding=1), nn.Upsample(scale_factor=4, mode="bilinear")),
    "squeeze-and-excite": trunk(SqueezeExcite(), nn.Conv2d(6, 4, 3, 2, 1)),
    "group norm": trunk(nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1)),
    "pooling": trunk(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    "cells": trunk(nn.AdaptiveAvgPool2d((3, 2)), nn.Flatten(), nn.Linear(36, 2)),
    "cells that grow with the image": trunk(GrowingCells(F.adaptive_avg_pool2d), nn.Conv2d(6, 3, 3)),
    "maxima of cells": trunk(nn.AdaptiveMaxPool2d((2, 3)), nn.Flatten(), nn.Linear(36, 2)),
    "maxima of cells that grow": trunk(GrowingCells(F.adaptive_max_pool2d), nn.Conv2d(6, 3, 3)),
    "attention": trunk(Attention()),
    "rolled": trunk(GoesRound()),
    "statistics": trunk(Statistics()),
    "windows": trunk(Local(nn.Sequential(nn.Flatten(), nn.Linear(54, 4), nn.Tanh()), 3, 2), nn.Conv2d(4, 2, 2)),
}
STREAMED = {name: StreamingCNN(network.double(), verify=False) for name, network in NETWORKS.items()}
MASKS = {
    "blobs": lambda: F.pad(torch.ones(1, 2, 3, dtype=torch.bool), (2, 4, 1, 5)),
    "full": lambda: torch.ones(1, 5, 4, dtype=torch.bool),
    "two pixels": lambda: F.pad(torch.ones(1, 1, 2, dtype=torch.bool), (40, 32, 30, 31)),
    "checkerboard": lambda: ((torch.arange(10)[:, None] + torch.arange(12)) % 2).bool()[None],
    "each its own": lambda: torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(3)) > 0.7,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_are_exact(name: str, mask: str) -> None:
    image = torch.randn(2, 3, 62, 74, generator=torch.Generator().manual_seed(0))
    cells = MASKS[mask]()
    if name == "statistics" and mask == "two pixels":
        cells[:, 32:36, 40:48] = True  # one position has no variance
    if name == "attention" and mask == "each its own":
        with pytest.raises(ValueError, match="pass one image at a time"):
            STREAMED[name](image.double(), mask=cells)
        return
    assert_part_is_exact(STREAMED[name], image, (16, 24), mask=cells)


def test_batch_statistics_are_those_of_the_foreground() -> None:
    net = randomise(trunk(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1))).train()
    streamed = StreamingCNN(net.double(), batch_statistics="exact", verify=False)
    assert_part_is_exact(streamed, torch.randn(2, 3, 60, 72), 16, mask=MASKS["each its own"]())


@pytest.mark.parametrize("region", [(0, 0, 60, 72), (20, 31, 18, 9), (59, 71, 1, 1), (0, 60, 7, 12)], ids=str)
@pytest.mark.parametrize("name", ["map", "decoder", "squeeze-and-excite", "group norm", "pooling", "windows"])
def test_regions_are_exact(name: str, region: Region) -> None:
    assert_part_is_exact(STREAMED[name], torch.randn(1, 3, 60, 72), (16, 24), region=region)


def test_a_region_with_a_mask_is_exact() -> None:
    for region in ((0, 0, 9, 9), (10, 10, 40, 30), (50, 60, 10, 12)):
        assert_part_is_exact(
            STREAMED["squeeze-and-excite"], torch.randn(1, 3, 60, 72), 16, region=region, mask=MASKS["blobs"]()
        )


PARTS = st.fixed_dictionaries(
    {
        "layers": st.lists(layer, min_size=2, max_size=7),
        "size": st.tuples(st.integers(4, 45), st.integers(4, 45)),
        "tile": st.tuples(st.integers(3, 30), st.one_of(st.none(), st.integers(5, 30))),
        "corner": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1)),
        "cells": st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 2**16 - 1))),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(part=PARTS)
def test_parts_of_drawn_networks_are_exact(part: dict[str, Any]) -> None:
    assert_drawn_part_is_exact(**part)


def assert_drawn_part_is_exact(
    layers: list[tuple[Any, ...]],
    size: tuple[int, int],
    tile: Any,
    corner: Any,
    cells: Any,
    group: distributed.ProcessGroup | None = None,
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), randomise(Drawn(layers)))
    y, x = int(corner[0] * size[0]), int(corner[1] * size[1])
    region = y, x, 1 + int(corner[2] * (size[0] - y - 1)), 1 + int(corner[3] * (size[1] - x - 1))
    mask = None
    if cells is not None:
        rows, cols, bits = cells
        mask = torch.tensor([bool(bits >> k & 1) for k in range(rows * cols)]).view(1, rows, cols)
        mask = mask if mask.any() else ~mask
    streamed = StreamingCNN(module.double(), verify=False, process_group=group)
    assert_part_is_exact(streamed, torch.randn(1, 2, *size), tile, region, mask, gather=group is not None)


class Counting:
    """An image that is read lazily and notes what is read."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.shape, self.dtype = pixels, tuple(pixels.shape), pixels.dtype
        self.read_from = torch.zeros(pixels.shape[1:], dtype=torch.int64)

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        self.read_from[y : y + height, x : x + width] += 1
        return self.pixels[:, y : y + height, x : x + width]


def test_nothing_is_read_beyond_the_receptive_field() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 5, padding=2)).double()  # 3 pixels to each side
    image = Counting(torch.randn(1, 300, 400, dtype=torch.float64))
    with torch.no_grad():
        StreamingCNN(net, 50)(image, region=(100, 200, 50, 60))
    touched = torch.zeros(300, 400, dtype=torch.int64)
    touched[97:153, 197:263] = 1
    assert torch.equal(image.read_from, touched)


def test_background_is_neither_read_nor_computed_in_training() -> None:
    net = trunk(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)).double()
    image = Counting(torch.randn(3, 320, 320, dtype=torch.float64))
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:4, 5] = True
    streamed = StreamingCNN(net, 32)
    steps: list[tuple[str, int, int]] = []
    streamed.progress = lambda *args: steps.append(args)
    streamed(image, mask=mask).sum().backward()
    assert int(image.read_from.max()) <= 2  # forward and backward
    assert float((image.read_from > 0).double().mean()) < 0.2
    plan = streamed.plan((3, 320, 320), mask=mask)
    assert steps[-1][1:] == (plan.steps, plan.steps)
    assert plan.computed_fraction < 0.2
    assert plan.predicted_bytes["carries"] < streamed.plan((3, 320, 320)).predicted_bytes["carries"]


def test_prepared_images_give_regions_without_looking_at_the_whole_again() -> None:
    net = NETWORKS["group norm"].double()
    image = Counting(torch.randn(3, 200, 240, dtype=torch.float64))
    streamed = StreamingCNN(net, 40, verify=False)
    with torch.no_grad():
        expected = net(image.pixels[None])
    prepared = streamed.prepare(image)
    image.read_from.zero_()
    for region in ((40, 60, 20, 30), (0, 0, 200, 240)):
        if region[0]:
            with torch.no_grad():
                found = streamed(prepared, region=region)
            assert relative_error(found, cropped(expected, region, (200, 240))) < TOLERANCE
            assert float((image.read_from > 0).double().mean()) < 0.25
    with pytest.raises(ValueError, match="without their gradients"):
        streamed(prepared, region=(0, 0, 9, 9))
    with torch.no_grad():
        net[0].bias.add_(1)
        with pytest.raises(ValueError, match="prepare it again"):
            streamed(prepared, region=(0, 0, 9, 9))


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_a_map_of_which_nothing_is_needed_has_no_bytes(place: Any) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) * self.a(x).mean((2, 3), keepdim=True)

    net, image = Gated().double(), torch.randn(1, 3, 40, 36, dtype=torch.float64)
    streamed = StreamingCNN(net, 16, maps=place, verify=False)
    prepared = streamed.prepare(image)
    with torch.no_grad():
        found = streamed(prepared, region=(8, 8, 16, 12))
        assert relative_error(found, net(image)[:, :, 8:24, 8:20]) < TOLERANCE


def test_a_plan_for_a_part_counts_the_maps_that_are_there_at_a_time() -> None:
    layers = [layer for _ in range(6) for layer in (nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1))]
    streamed = StreamingCNN(nn.Sequential(nn.Conv2d(3, 8, 1), *layers).double(), 16, verify=False)
    mask, one = torch.zeros(96, 96, dtype=torch.bool), 8 * 96 * 96 * 8
    mask[:48] = True
    with torch.no_grad():
        sizes = [streamed.plan((3, 96, 96), **part).predicted_bytes["maps"] for part in ({}, {"mask": mask})]
    assert sizes == [2 * one, one]


class Scaled(nn.Module):
    """A map divided by its mean, which depends on a setting too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), 2.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) + self.scale
        return x / x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("changed", ["image", "setting", "mode", "autocast", "normalisation"])
def test_a_prepared_image_is_refused_once_anything_has_changed(changed: str) -> None:
    net, image = Scaled().eval(), torch.rand(1, 1, 20, 20)
    streamed = StreamingCNN(net, 10, verify=False, mean=0.5, std=0.5)
    prepared = streamed.prepare(image)
    with torch.no_grad():
        streamed(prepared, region=(2, 2, 4, 4))
        if changed == "image":
            image.mul_(2)
        elif changed == "setting":
            net.scale = 3.0
        elif changed == "mode":
            net.train()
            streamed.batch_statistics = "exact"
        elif changed == "normalisation":
            streamed = StreamingCNN(net, 10, verify=False)
        with (
            torch.autocast(torch.get_default_device().type, enabled=changed == "autocast"),
            pytest.raises(ValueError, match="prepare it again"),
        ):
            streamed(prepared, region=(2, 2, 4, 4))


def test_prepare_updates_no_running_statistics() -> None:
    streamed = StreamingCNN(Scaled().train(), 10, verify=False, batch_statistics="exact")
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        streamed.prepare(torch.rand(1, 1, 20, 20))
    assert int(streamed.module.norm.num_batches_tracked) == 0


def test_masks_of_images_and_functions_of_the_image() -> None:
    class WithCells:
        cells = np.eye(4, dtype=bool)

    net, image = NETWORKS["pooling"].double(), torch.randn(1, 3, 60, 72, dtype=torch.float64)
    streamed = StreamingCNN(net, 16, verify=False)
    expected = masked(net, image, torch.eye(4, dtype=torch.bool)[None])
    for mask in (WithCells(), np.eye(4, dtype=bool), torch.eye(4, dtype=torch.bool), lambda _: WithCells()):
        assert relative_error(streamed(image, mask=mask), expected) < TOLERANCE
    both = streamed([image, image], mask=[WithCells(), np.ones((2, 2), dtype=bool)])
    assert relative_error(both[0], expected) < TOLERANCE
    assert relative_error(both[1], net(image)) < TOLERANCE


def test_the_background_is_filled_before_pixels_are_normalised() -> None:
    net = NETWORKS["pooling"].double()
    image = torch.randint(0, 255, (1, 3, 62, 74), dtype=torch.uint8)
    streamed = StreamingCNN(net, 16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), verify=False)
    cells = MASKS["blobs"]()
    filled = torch.where(
        foreground(cells, (62, 74)), image, torch.tensor([255, 250, 0], dtype=torch.uint8).view(3, 1, 1)
    )
    with OverForeground(cells):
        expected = net(streamed.normalisation.apply(filled, torch.float64))
    assert relative_error(streamed(image, mask=cells, fill=(255, 250, 0)), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"region": (0, 0, 61, 5)}, "must lie within the image of 60 x 72"),
        ({"region": (0, 0, 0, 5)}, "hold at least a pixel"),
        ({"region": (0, 0, 5)}, "four ints"),
        ({"region": (0.0, 0, 5, 5)}, "four ints"),
        ({"mask": np.zeros((4, 4), dtype=bool)}, "no foreground"),
        ({"mask": np.ones((4, 4))}, "boolean array"),
        ({"mask": "a file"}, "boolean array"),
        ({"mask": lambda _: None}, "boolean array"),
        ({"mask": np.ones((3, 4, 4), dtype=bool)}, "boolean array"),
        ({"mask": np.ones((61, 4), dtype=bool)}, "more than the image has pixels"),
        ({"mask": np.ones((4, 4), dtype=bool), "fill": (1, 2)}, "each of the 3 channels"),
        ({"mask": np.ones((4, 4), dtype=bool), "fill": "white"}, "must be a number"),
    ],
)
def test_wrong_parts_are_refused(arguments: dict[str, Any], message: str) -> None:
    streamed = StreamingCNN(NETWORKS["map"].double(), 16, verify=False)
    with pytest.raises(ValueError, match=message):
        streamed(torch.randn(1, 3, 60, 72, dtype=torch.float64), **arguments)


def test_a_plan_needs_the_mask_itself() -> None:
    with pytest.raises(ValueError, match="no image to make a mask of"):
        StreamingCNN(NETWORKS["map"], 16).plan((3, 60, 72), mask=lambda image: image > 0)


@pytest.mark.parametrize(("dtype", "fill"), [(torch.uint8, np.uint8(200)), (torch.uint64, np.uint64(1 << 62))])
def test_a_fill_may_be_a_number_of_numpy(dtype: torch.dtype, fill: np.integer[Any]) -> None:
    streamed = StreamingCNN(NETWORKS["map"].double(), 16, verify=False)
    image, mask = torch.zeros(1, 3, 60, 72, dtype=dtype), np.eye(2, dtype=bool)
    with torch.no_grad():
        expected = streamed(image, mask=mask, fill=int(fill))
        assert torch.equal(streamed(image, mask=mask, fill=fill), expected)
        assert not torch.equal(streamed(image, mask=mask), expected)


def test_a_fill_that_pixels_cannot_have_is_refused() -> None:
    streamed = StreamingCNN(NETWORKS["map"].double(), 16, verify=False)
    for fill in (300, 10**30):
        with pytest.raises(ValueError, match=r"torch\.uint8 does not have them"):
            streamed(torch.zeros(1, 3, 60, 72, dtype=torch.uint8), mask=np.eye(2, dtype=bool), fill=fill)


def test_operations_on_whole_maps_are_refused_by_name() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).sort(-1).values

    streamed = StreamingCNN(trunk(Sorted()).double(), 16, unsupported="run_whole", verify=False)
    with pytest.raises(ValueError, match="sort"):
        streamed(torch.randn(1, 3, 60, 72, dtype=torch.float64), region=(0, 0, 9, 9))


def test_dropout_of_a_gate_is_the_same_in_all_regions_of_a_prepared_image() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x * self.drop(x.mean((2, 3), keepdim=True).sigmoid())

    streamed = StreamingCNN(Gated().double(), 16)
    prepared = streamed.prepare(torch.randn(1, 3, 40, 36, dtype=torch.float64))
    with torch.no_grad():
        one, other = (streamed(prepared, region=(y, 8, 16, 12)) for y in (8, 16))
    assert relative_error(one[:, :, 8:], other[:, :, :8]) < TOLERANCE
    assert len((one == 0).all(2).all(2).unique()) == 2  # some channels are dropped


def test_a_mask_leaves_booleans_what_they_are() -> None:
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[:9] = True
    found = StreamingCNN(nn.Sequential(nn.Conv2d(3, 4, 1), Positive()), 8)(torch.randn(1, 3, 24, 24), mask=mask)
    assert found.dtype == torch.bool and found[:, :, :9].any() and not found[:, :, 9:].any()


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x > 0
