"""What does writing a large map take: peak memory against the budget and the plan, and seconds, against a call that returns it?

    uv run python benchmarks/writing.py [--size 8192] [--out FOLDER]
    uv run python benchmarks/writing.py --size 26756 --from-file --rows 2     # an image of 2 GiB

A U-Net-like network with 10 classes, float32, on a CPU, and a square image of bytes, in memory, or `--from-file` read tile by tile.
One fresh process per row: a warm-up on a small image, then the image. Measured is the peak above the weights and the image (VmHWM),
and the seconds of the same pass. Prints a Markdown table.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from torch import Tensor, nn

import widefield as wf
from widefield.cli.measuring import peak_in_new_process, peak_of
from widefield.streaming import StreamingCNN
from widefield.streaming.budget import format_bytes

CLASSES = 10
ROWS: tuple[tuple[str, Any, str], ...] = (
    ("", None, "6GiB"),
    ("a NumPy memmap", None, "512MiB"),
    ("map.ome.tif", "argmax", "512MiB"),
    ("map.ome.zarr", "argmax", "512MiB"),
    ("map.ome.zarr", "softmax", "1GiB"),
    ("map.ome.tif", "softmax", "1GiB"),
    ("map.tif", "softmax", "1GiB"),
)


class UNet(nn.Module):
    """Three levels with once, twice and four times `width` channels, batch norm and ReLU behind each convolution."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        one, two, four = width, 2 * width, 4 * width
        self.down = nn.ModuleList([self.twice(3, one), self.twice(one, two), self.twice(two, four)])
        self.grow = nn.ModuleList([nn.ConvTranspose2d(four, two, 2, 2), nn.ConvTranspose2d(two, one, 2, 2)])
        self.up = nn.ModuleList([self.twice(four, two), self.twice(two, one)])
        self.out = nn.Conv2d(one, CLASSES, 1)

    @staticmethod
    def twice(before: int, after: int) -> nn.Sequential:
        layers = [[nn.Conv2d(n, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()] for n in (before, after)]
        return nn.Sequential(*layers[0], *layers[1])

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for k, down in enumerate(self.down):
            x = down(x if k == 0 else nn.functional.max_pool2d(x, 2))
            maps.append(x)
        for k, (grow, up) in enumerate(zip(self.grow, self.up, strict=True)):
            x = up(torch.cat([grow(x), maps[1 - k]], 1))
        return self.out(x)


def random_file(path: Path, size: int, channels: int, values: int) -> Path:
    """A compressed TIFF file of a square image of bytes: pages of a file that is mapped to memory would count as its peak."""
    random, side = np.random.default_rng(0), 256
    shape = (size, size, channels) if channels > 1 else (size, size)
    tile = (side, side, *shape[2:])
    tiles = (random.integers(0, values, tile, dtype=np.uint8) for _ in range((-(-size // side)) ** 2))
    kind: dict[str, Any] = {
        "photometric": "rgb" if channels > 1 else "minisblack",
        "compression": "zlib",
        "compressionargs": {"level": 1},
    }
    tifffile.imwrite(path, tiles, shape=shape, dtype=np.uint8, tile=(side, side), bigtiff=True, metadata=None, **kind)
    return path


@torch.no_grad()
def measure(
    to: str, postprocess: Any, budget: str, size: int, folder: Path, width: int, from_file: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    net = UNet(width).eval()
    small = torch.randint(0, 255, (1, 3, 256, 256), dtype=torch.uint8)
    if from_file:
        image: Any = wf.open_image(random_file(folder / "image.tif", size, 3, 256))
    else:
        image = torch.randint(0, 255, (1, 3, size, size), dtype=torch.uint8)
    wf.stream(net, 128).write(small, folder / to if to.startswith("map") else np.empty((CLASSES, 256, 256)))
    model = StreamingCNN(net, memory_budget=budget)
    model.verify = False
    found: dict[str, Any] = {}

    def work() -> None:
        target: Any = folder / to
        if to.startswith("a "):
            target = np.lib.format.open_memmap(folder / "map.npy", "w+", np.float32, (CLASSES, size, size))
        begin = time.perf_counter()
        if to:
            model.write(image, target, postprocess=postprocess)
        else:
            model(image)
        found["seconds"] = time.perf_counter() - begin

    options = {"to": folder / to if to.startswith("map") else np.empty((CLASSES, 0, 0)), "postprocess": postprocess}
    plan = model.plan((3, size, size), **(options if to else {}))
    peak = peak_of(work)
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "image.tif")
    return {**found, "peak": peak, "plan": plan.total_bytes, "tile": plan.tile_size, "written": written}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="folder for the maps, which go when they are measured")
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="numbers of rows, from 0")
    parser.add_argument("--width", type=int, default=16, help="channels of the first level of the network")
    parser.add_argument("--from-file", action="store_true", help="read the image from a TIFF file, tile by tile")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.out))
    try:
        if arguments.peak is not None:
            to, postprocess, budget = ROWS[int(arguments.peak)]
            given = arguments.size, folder, arguments.width, arguments.from_file
            print(json.dumps(measure(to, postprocess, budget, *given)))
            return
    finally:
        shutil.rmtree(folder)
    net = f"U-Net of {arguments.width} channels with {CLASSES} classes"
    print(f"{net}, {arguments.size} x {arguments.size}, float32, {platform.machine()}\n")
    print("| written to | after | tile | budget | plan | peak | written | seconds |\n" + "|---" * 8 + "|")
    for number in arguments.rows:
        to, postprocess, budget = ROWS[number]
        row = peak_in_new_process(str(number))
        sizes = " | ".join(format_bytes(row[name]) for name in ("plan", "peak", "written"))
        tile = "{} x {}".format(*row["tile"])
        print(
            f"| {to or 'nothing, returned'} | {postprocess or ''} | {tile} | {budget} | {sizes} | {row['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
