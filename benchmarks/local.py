"""A vision transformer on every patch of a slide, and gated attention pooling over its map, trained together: memory and time.

    uv run python benchmarks/local.py --size 2016 4096 --chunk 4 16 --threads 1 --json benchmarks/results/local.json

The slide is a tiled TIFF, stained tissue of scikit-image again and again, and is read tile by tile. Memory is the resident peak
(VmHWM; on CUDA what PyTorch allocates) of a process of its own, above the weights and their gradients. Times are CPU-seconds on a
CPU, so that other processes count little, and ways take turns. Ways, with a chunk of patches a step:

    chunks    plain PyTorch: forward and backward of one chunk after the other, each with the head, until all patches of the slide
              were there; its memory is that of one chunk. It computes no gradient of a loss of the slide
    streamed  `widefield.stream`: exact gradients of one loss of the whole slide. Nothing is recorded: a tile is a chunk
    frozen    the same with an encoder that does not train

`--model tiny` is a network of two layers, so that large slides take minutes.
"""

import argparse
import itertools
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyvips
import timm
import torch
from skimage import data
from torch import nn

import widefield as wf
from widefield.cli.bench import HEADER, table_row
from widefield.cli.measuring import machine, peak_in_new_process, peak_of, write_json
from widefield.components import GatedAttentionPooling
from widefield.models.patch_encoder import PatchEncoder

WINDOW = 224
WAYS = ("chunks", "streamed", "frozen")


def slide(folder: Path, size: int) -> Path:
    """A slide of so many pixels a side, which is made if it is not there."""
    path = folder / f"{size}.tif"
    if not path.exists():
        tissue = pyvips.Image.new_from_array(data.immunohistochemistry())
        times = -(-size // tissue.width)
        tissue.replicate(times, times).crop(0, 0, size, size).tiffsave(path, tile=True, compression="jpeg", Q=85)
    return path


def network(model: str, frozen: bool, device: str) -> nn.Sequential:
    """The encoder of patches and its head."""
    torch.manual_seed(0)
    if model == "tiny":
        layers = nn.Conv2d(3, 64, 16, 16), nn.GELU(), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        encoder, channels = PatchEncoder(nn.Sequential(*layers), WINDOW), 64
    else:
        named: Any = timm.create_model(model, num_classes=0)
        encoder, channels = PatchEncoder(named, WINDOW), named.num_features
    head = GatedAttentionPooling(channels, 2)
    return nn.Sequential(encoder.requires_grad_(not frozen).eval(), head).to(device)


def tile_of(chunk: int) -> tuple[int, int]:
    """Height and width in pixels of a tile of so many patches, as square as can be."""
    rows = next(n for n in range(math.isqrt(chunk), 0, -1) if chunk % n == 0)
    return rows * WINDOW, chunk // rows * WINDOW


class Passes:
    """The ways to take a step on a slide."""

    def __init__(self, options: argparse.Namespace, path: Path, chunk: int) -> None:
        self.image = wf.open_image(path)
        self.count = (self.image.shape[1] // WINDOW) * (self.image.shape[2] // WINDOW)
        self.chunk, self.device = min(chunk, self.count), options.device
        self.networks = {frozen: network(options.model, frozen, self.device) for frozen in (False, True)}
        self.streamed = {frozen: wf.stream(net, tile_of(chunk), verify=False) for frozen, net in self.networks.items()}
        for net in self.networks.values():
            for p in net.parameters():  # as in any step but the first: they count as weights
                p.grad = torch.ones_like(p) if p.requires_grad else None

    def one(self, way: str) -> Callable[[], None]:
        """The pass whose memory is measured: of `chunks` one chunk."""
        return (lambda: self.chunks(1)) if way == "chunks" else self.whole(way)

    def whole(self, way: str) -> Callable[[], None]:
        """The pass whose time is measured."""
        if way == "chunks":
            return lambda: self.chunks(-(-self.count // self.chunk))
        return lambda: self.stream(frozen=way == "frozen")

    def chunks(self, times: int) -> None:
        encoder: Any = self.networks[False][0]
        head = self.networks[False][1]
        patches = torch.rand(self.chunk, 3, WINDOW, WINDOW, device=self.device)
        for _ in range(times):
            head(encoder.module(patches).T[None, :, :, None]).sum().backward()

    def stream(self, frozen: bool) -> None:
        self.streamed[frozen](self.image).sum().backward()


def warmed_up(options: argparse.Namespace, folder: Path, size: int, chunk: int, ways: list[str]) -> Passes:
    """The passes on a slide, after each on a small one, of one tile."""
    passes = Passes(options, slide(folder, tile_of(chunk)[1]), chunk)
    for way in ways:
        passes.one(way)()
    passes.image = wf.open_image(slide(folder, size))
    passes.count = (passes.image.shape[1] // WINDOW) * (passes.image.shape[2] // WINDOW)
    for streamed in passes.streamed.values():
        streamed.plan(passes.image.shape)
    return passes


def measured(options: argparse.Namespace, folder: Path, way: str, size: int, chunk: int) -> dict[str, Any]:
    """Bytes at the peak of a way, in this process."""
    passes = warmed_up(options, folder, size, chunk, [way])
    return {"bytes": peak_of(passes.one(way), options.device)}


def rows_of(options: argparse.Namespace, folder: Path, size: int, chunk: int) -> list[dict[str, Any]]:
    """Rows of all ways."""
    passes = warmed_up(options, folder, size, chunk, options.ways if options.repeats else [])
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for _ in range(options.repeats):
        for way, of_way in seconds.items():
            begin = clock()
            passes.whole(way)()
            if options.device != "cpu":
                torch.cuda.synchronize()
            of_way.append(clock() - begin)
    plan = passes.streamed[False].plan(passes.image.shape)
    rows = []
    for way, of_way in seconds.items():
        given = json.dumps({"way": way, "size": size, "chunk": chunk, "folder": str(folder)})
        row = {
            "model": options.model,
            "size": size,
            "dtype": "float32",
            "what": "step",
            "way": f"{way} of {passes.chunk} patches" if way == "chunks" else f"{way}, {passes.chunk} patches a step",
            "fits": True,
            "patches": passes.count,
            "all_seconds": [round(s, 2) for s in of_way],
            "seconds": sorted(of_way)[len(of_way) // 2] if of_way else None,
            **peak_in_new_process(given),
        }
        if way == "streamed":
            row["predicted_bytes"] = plan.total_bytes
        rows.append(row)
    for row in rows if options.ways[0] == "chunks" else ():
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"] if rows[0]["seconds"] else None
        row["memory_ratio"] = row["bytes"] / rows[0]["bytes"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, nargs="+", default=[2016])
    parser.add_argument("--chunk", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=1, help="0: memory alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        given = json.loads(options.peak)
        folder = Path(given.pop("folder"))
        print(json.dumps(measured(options, folder, **given)))
        return
    written = {**machine(options.device), "command": shlex.join(["python", *sys.argv]), "rows": []}
    print(*HEADER, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as slides:
        for size, chunk in itertools.product(options.size, options.chunk):
            for row in rows_of(options, Path(slides), size, chunk):
                written["rows"].append(row)
                print(table_row(row), flush=True)
            if options.json:
                write_json(options.json, written)


if __name__ == "__main__":
    main()
