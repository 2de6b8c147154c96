"""Tile mismatch, compared with plain PyTorch on whole images and tiles."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import widefield as wf

PAGE = Path(__file__).parents[2] / "docs" / "no-seams.md"


def convolution() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 5, padding=2).double()


def joined(module: nn.Module, image: Tensor, pieces: list[tuple[slice, slice, slice, slice]]) -> Tensor:
    """The map of `module` put together from tiles: what each reads, and where what is kept of it goes."""
    whole = module(image)
    found = torch.full_like(whole, torch.nan)
    for rows, cols, own_rows, own_cols in pieces:
        tile = torch.full_like(whole, torch.nan)
        tile[..., rows, cols] = module(image[..., rows, cols])
        found[..., own_rows, own_cols] = tile[..., own_rows, own_cols]
    return found


@torch.no_grad()
def test_numbers_are_those_of_plain_pytorch() -> None:
    module, image = convolution(), torch.rand(2, 3, 20, 24, dtype=torch.float64)
    read = {20: [(0, 12), (8, 20)], 24: [(0, 12), (8, 20), (12, 24)]}
    kept = {20: [(0, 10), (10, 20)], 24: [(0, 10), (10, 16), (16, 24)]}
    spans = {n: [(slice(*a), slice(*b)) for a, b in zip(read[n], kept[n], strict=True)] for n in read}
    pieces = [(r, c, own_r, own_c) for r, own_r in spans[20] for c, own_c in spans[24]]
    whole, tiled = module(image), joined(module, image, pieces)
    error = tiled - whole
    steps = [error[:, :, 10] - error[:, :, 9], *(error[..., x] - error[..., x - 1] for x in (10, 16))]

    found = wf.tile_mismatch(module, image, tile_size=12, overlap=4)

    assert found.tiles == 6 and found.shape == tuple(whole.shape)
    assert found.max_difference == pytest.approx(float(error.abs().max()), abs=1e-14)
    assert found.mean_difference == pytest.approx(float(error.abs().mean()), rel=1e-10)
    assert found.seam_step == pytest.approx(float(torch.cat([s.abs().flatten() for s in steps]).mean()), rel=1e-10)
    assert found.value_range == pytest.approx((float(whole.min()), float(whole.max())))
    assert found.std == pytest.approx(float(whole.std(correction=0)))
    assert found.changed == float((tiled.argmax(1) != whole.argmax(1)).double().mean())
    assert found.relative_mean == found.mean_difference / found.std


def test_differences_end_where_the_receptive_field_does() -> None:
    found = wf.tile_mismatch(convolution(), torch.rand(1, 3, 32, 32, dtype=torch.float64), tile_size=16)
    assert [(one.start, one.stop) for one in found.by_distance] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    assert [one.max_difference > 1e-3 for one in found.by_distance] == [True, True, False, False, False]
    assert max(one.max_difference for one in found.by_distance[2:]) < 1e-12


def test_an_overlap_of_the_receptive_field_leaves_no_difference() -> None:
    found = wf.tile_mismatch(convolution(), torch.rand(1, 3, 40, 32, dtype=torch.float64), tile_size=16, overlap=4)
    assert found.max_difference < 1e-12 and found.seam_step < 1e-12 and found.changed == 0


def test_norms_over_the_tile_differ_at_every_distance() -> None:
    module = nn.Sequential(convolution(), nn.InstanceNorm2d(4, dtype=torch.float64))
    found = wf.tile_mismatch(module, torch.rand(1, 3, 32, 32, dtype=torch.float64), tile_size=16, overlap=4)
    assert min(one.mean_difference for one in found.by_distance) > 1e-3


def test_one_tile_is_the_whole_image() -> None:
    found = wf.tile_mismatch(convolution(), torch.rand(1, 3, 16, 16, dtype=torch.float64))
    assert (found.tiles, found.seam_step, found.by_distance) == (1, 0.0, ())
    assert found.max_difference < 1e-12
    assert "1 tiles of 512 x 512 pixels" in str(found)


class Scaled(nn.Module):
    """A map of another size than the image, in a dictionary."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = convolution()
        self.factor = factor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x)
        return {"out": F.avg_pool2d(x, 4, ceil_mode=True) if self.factor < 1 else F.interpolate(x, scale_factor=2.0)}


@pytest.mark.parametrize("factor", [0.25, 2.0])
@torch.no_grad()
def test_maps_of_another_size_are_joined(factor: float) -> None:
    module, image = Scaled(factor), torch.rand(1, 3, 26, 32, dtype=torch.float64)
    found = wf.tile_mismatch(module, image, tile_size=16)
    whole = module(image)["out"]
    start, cut = (8, 12) if factor < 1 else (10, 13)  # the last tile begins at a whole position of the map
    rows = (image[:, :, :16], image[:, :, start:])
    upper, lower = (torch.cat([module(x)["out"] for x in row.split(16, -1)], -1) for row in rows)
    own = [int(y * factor) for y in (cut, cut - start)]
    error = torch.cat([upper[:, :, : own[0]], lower[:, :, own[1] :]], 2) - whole
    assert found.tiles == 4
    assert found.mean_difference == pytest.approx(float(error.abs().mean()), rel=1e-10)
    assert found.by_distance[0].start == 0


def test_a_single_channel_has_no_classes() -> None:
    found = wf.tile_mismatch(nn.Conv2d(3, 1, 3, padding=1), torch.rand(1, 3, 16, 16), tile_size=8)
    assert found.changed is None and "another class" not in str(found)


def test_a_streamed_model_keeps_its_normalisation_and_modes() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).double().train()
    pixels = np.random.default_rng(0).integers(0, 255, (3, 24, 24), dtype=np.uint8)
    image = wf.open_image(pixels, channel_axis="first")
    settings: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}
    found = wf.tile_mismatch(wf.stream(module, **settings), image, tile_size=12, overlap=2)
    assert module.training and int(module[1].num_batches_tracked) == 0
    assert found.max_difference < 1e-12 and found.std > 0.1


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (nn.Conv2d(3, 2, 3), {"tile_size": 16}, "has 30 positions along an axis of 32 pixels"),
        (nn.AvgPool2d(4), {"tile_size": 10}, "tile_size must be a multiple of 4 and overlap one of 8, got 10 and 0"),
        (nn.Identity(), {"tile_size": 8, "overlap": 8}, "overlap=8 a number of pixels from 0 to less than that"),
        (nn.Identity(), {"tile_size": 8.0}, "tile_size=8.0 must be a number of pixels"),
        (
            nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
            {},
            "no map that is computed tile by",
        ),
    ],
    ids=["without padding", "stride", "overlap", "float", "no map"],
)
def test_what_cannot_be_joined_is_refused(module: nn.Module, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wf.tile_mismatch(module, torch.rand(1, 3, 32, 32), **arguments)


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"needs 4096 bytes in the folder .*: No space left on device") as caught:
        wf.tile_mismatch(wf.stream(convolution(), scratch_dir=tmp_path), torch.rand(1, 3, 8, 16).double(), tile_size=8)
    assert str(tmp_path) in str(caught.value)


def test_several_maps_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"low": F.avg_pool2d(x, 2), "high": x * 2}

    with pytest.raises(ValueError, match=r"gives: low \(1, 3, 8, 8\), high \(1, 3, 16, 16\); wrap it"):
        wf.tile_mismatch(Two(), torch.rand(1, 3, 16, 16))


def test_the_page_tells_exact_overlaps_from_norms(capsys: pytest.CaptureFixture[str]) -> None:
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)[0], {})
    printed = capsys.readouterr().out
    assert "another class at    0.000% of the positions" in printed
    assert float(re.findall(r"([\d.]+)% of the standard deviation, ", printed)[0]) > 1
