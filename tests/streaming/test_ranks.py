"""One image over several processes: results and gradients are those of one process."""

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from tests.streaming.exactness import TOLERANCE, relative_error
from tests.streaming.masked import masked
from tests.streaming.test_parts import NETWORKS, PARTS, assert_drawn_part_is_exact, trunk
from widefield.images import open_image
from widefield.streaming import StreamingCNN

NAMES = {  # the numbers of processes with which each network is tried
    "map": (2, 3, 4),
    "squeeze-and-excite": (2, 3, 4),
    "maxima of cells": (2, 3),
    "decoder": (3,),
    "group norm": (3, 4),
    "pooling": (3,),
    "cells": (3,),
    "statistics": (3,),
    "windows": (2, 3),
    "rolled": (2, 3),
}


def network(name: str) -> nn.Module:
    """One of the networks, with the same weights in all processes."""
    net = copy.deepcopy(NETWORKS[name]).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return net


def gradients(loss: Tensor, image: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [image, *net.parameters()], allow_unused=True, materialize_grads=True))


def assert_same(found: Any, expected: Tensor, image: Tensor, net: nn.Module) -> None:
    assert relative_error(found, expected) <= TOLERANCE
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pairs = zip(
        gradients((found * weights).sum(), image, net), gradients((expected * weights).sum(), image, net), strict=True
    )
    scale = 0.0
    for f, e in pairs:
        scale = max(scale, e.abs().max().item())
        assert (f - e).abs().max().item() <= TOLERANCE * max(e.abs().max().item(), 1e-4 * scale, 1e-9)


class Short(nn.Module):
    """A map of whole numbers of 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return (99 * x).to(torch.int16)


def run(rank: int, ranks: int, port_file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=ranks)
    group = distributed.group.WORLD
    torch.manual_seed(rank + 7)  # random masks must be the same all the same
    size = (101, 74)
    image = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for name in (name for name, counts in NAMES.items() if ranks in counts):
        net = network(name)
        streamed = StreamingCNN(net, (16, 24), verify=False, process_group=group)
        assert_same(streamed(image, gather=True), net(image), image, net)
    mask = np.zeros((10, 7), dtype=bool)
    mask[1:4, 2:5] = mask[8, 6] = True
    for name in ("squeeze-and-excite", "pooling"):
        net = network(name)
        streamed = StreamingCNN(net, 16, verify=False, process_group=group)
        expected = masked(net, image, torch.from_numpy(mask)[None])
        assert_same(streamed(image, mask=mask, gather=True), expected, image, net)
    net = network("map")
    one = StreamingCNN(net, 8, verify=False)
    several = StreamingCNN(net, 8, verify=False, process_group=group)
    region = (20, 11, 50, 60)
    assert_same(several(image, region=region, gather=True), one(image, region=region), image, net)
    band = several(image)  # each process has its rows
    rows = several.ranks.everywhere(band.shape[2])
    start = sum(rows[:rank])
    assert relative_error(band, one(image)[:, :, start : start + rows[rank]]) <= TOLERANCE
    assert sum(rows) == one(image).shape[2]

    short = nn.Sequential(network("map"), Short())
    assert torch.equal(StreamingCNN(short, 16, verify=False, process_group=group)(image, gather=True), short(image))

    maps_are_written_as_one_process_writes_them(Path(port_file).parent, image, mask, group)

    torch.manual_seed(0)
    net = trunk(nn.BatchNorm2d(6), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    net = net.double().train()
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(rank)
    streamed = StreamingCNN(net, 16, verify=False, batch_statistics="exact", process_group=group)
    found = streamed.ranks.everywhere(streamed(image))
    assert all(torch.equal(each, found[0]) for each in found)
    running = net[3].running_var.clone()
    net.load_state_dict(state)
    StreamingCNN(net, 16, verify=False, batch_statistics="exact")(image)
    assert relative_error(running, net[3].running_var) < 1e-12

    circular = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Tanh()).double()
    circular.append(nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular").double())
    with pytest.raises(ValueError, match="rolls its map, which begins with row"):
        StreamingCNN(circular, 16, verify=False, process_group=group)(image)

    planned = StreamingCNN(network("pooling"), process_group=group)  # all agree on tiles
    assert relative_error(planned(image), planned.module(image)) < TOLERANCE
    with pytest.raises(ValueError, match="must be given the same one"):
        streamed(image[:, :, rank:])
    moved = np.roll(mask, rank, 0)
    for other in ({"gather": rank == 0}, {"mask": moved}, {"mask": mask, "fill": rank}):
        with pytest.raises(ValueError, match="must be given the same one"):
            streamed(image, **other)
    with pytest.raises(ValueError, match="must be given the same one"):
        streamed(image.detach().requires_grad_(rank == 0))
    streamed.disable()
    streamed.module.eval()
    assert torch.equal(streamed(image), streamed.module(image))
    drawn_networks_are_exact(group)
    distributed.destroy_process_group()


def maps_are_written_as_one_process_writes_them(
    folder: Path, image: Tensor, mask: Any, group: distributed.ProcessGroup
) -> None:
    """By the first process; the others return when the file is there, or raise what went wrong."""
    rank = distributed.get_rank(group)
    for name in ("map", "group norm"):
        net = network(name)
        one = StreamingCNN(net, (16, 24), verify=False)
        several = StreamingCNN(net, (16, 24), verify=False, process_group=group)
        for options in ({}, {"region": (20, 11, 50, 60)}, {"mask": mask}, {"mask": mask, "region": (50, 0, 40, 70)}):
            with torch.no_grad():
                expected = one(image, **options)
            to = torch.full_like(expected, 7.0) if rank == 0 else torch.empty_like(expected)
            assert several.write(image, to, **options) is (to if rank == 0 else None)
            assert rank > 0 or relative_error(to, expected) <= 1e-14
            (folder / "map.zarr").mkdir(exist_ok=True)
            assert several.write(image, folder / "map.zarr", **options) == folder / "map.zarr"
            written = open_image(folder / "map.zarr").read(0, 0, *expected.shape[2:])
            assert relative_error(torch.from_numpy(written)[None], expected) <= 1e-14
            distributed.barrier(group)
    wrong = np.empty(3) if rank == 0 else np.empty(expected.shape)
    with pytest.raises(ValueError, match="a map of shape"):
        several.write(image, wrong)
    with pytest.raises(ValueError, match="must be given the same one"):
        several.write(image, folder / "map.zarr", dtype="float32" if rank == 0 else "float64")
    with pytest.raises(OSError if rank else RuntimeError, match="full"):
        several.write(image, Full())
    assert relative_error(several(image, gather=True), one(image)) <= TOLERANCE  # nothing is left of it


class Full:
    """A target that takes no tile."""

    places = (None,)

    def buffer_rows(self, written: Any) -> int:
        return 0

    @contextmanager
    def begin(self, image: Any, maps: Any) -> Any:
        yield self

    def write(self, number: int, y: int, x: int, tile: np.ndarray) -> None:
        raise RuntimeError("full")

    def rows_done(self, number: int, y: int) -> None:
        pass


def drawn_networks_are_exact(group: distributed.ProcessGroup, examples: int = 6) -> None:
    """All processes draw the same networks, images, tiles, regions and masks."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(part=PARTS)
    def check(part: dict[str, Any]) -> None:
        assert_drawn_part_is_exact(**part, group=group)

    check()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(ranks: int, tmp_path: Path) -> None:
    spawn(run, args=(ranks, str(tmp_path / "store")), nprocs=ranks)


def test_what_is_no_process_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a torch\.distributed process group"):
        StreamingCNN(nn.Conv2d(3, 3, 3), process_group=2)
