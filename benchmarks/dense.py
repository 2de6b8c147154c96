"""What does a training step with the loss inside take: peak memory and seconds against the budget, and plain PyTorch where it fits.

    uv run python benchmarks/dense.py [--size 4096] [--plain-size 2048] [--memory-budget 1GiB] [--loss dice]

The U-Net of `benchmarks/writing.py` with 10 classes, float32, on a CPU; image and labels are read from `.npy` files, tile by tile,
or are whole for plain PyTorch. One fresh process per row: a step on a small image, then the step. Measured is the peak above the
weights, and for plain PyTorch above the image and the labels (VmHWM). Prints a Markdown table.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from writing import CLASSES, UNet

import widefield as wf
from widefield.cli.measuring import peak_in_new_process, peak_of
from widefield.modules import DenseModule
from widefield.streaming.budget import format_bytes


def measure(kind: str, size: int, budget: str, loss: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    module = DenseModule(UNet().eval(), CLASSES, loss=loss, memory_budget=budget)
    network = module.stream_network
    random = np.random.default_rng(0)
    pairs: list[list[Any]] = []
    for side in (256, size):
        files = [folder / f"{name}{side}.npy" for name in ("image", "labels")]
        for file, (channels, top) in zip(files, ((3, 256), (1, CLASSES)), strict=True):
            pixels = np.lib.format.open_memmap(file, "w+", np.uint8, (side, side, channels))
            for y in range(0, side, 256):
                pixels[y : y + 256] = random.integers(0, top, pixels[y : y + 256].shape, dtype=np.uint8)
            pixels.flush()
        pairs.append([wf.open_image(file, channel_axis="last") for file in files])
    found: dict[str, Any] = {}
    step: Any = network
    if kind == "plain":
        pairs = [[torch.from_numpy(one.read(0, 0, *one.shape[1:]))[None] for one in pair] for pair in pairs]

        def step(image: Any, labels: Any) -> Any:
            return network.module(image.float() / 255, labels)

    def work(pair: Any) -> None:
        begin = time.perf_counter()
        value = step(*pair)[0]
        value.backward()
        found.update(seconds=time.perf_counter() - begin, loss=float(value.detach()))

    work(pairs[0])
    peak = peak_of(lambda: work(pairs[1]))
    plan = network.plan((3, size, size), torch.empty(1, 1, size, size, dtype=torch.uint8, device="meta"))
    return {**found, "peak": peak, "plan": plan.total_bytes, "tile": plan.tile_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--plain-size", type=int, default=2048, help="the size that plain PyTorch is measured at, too")
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--loss", default="dice")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        kind, size = options.peak.split("@")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(kind, int(size), options.memory_budget, options.loss, Path(folder))))
        return
    print(f"U-Net, {CLASSES} classes, loss {options.loss}, float32, torch {torch.__version__}, {platform.machine()}\n")
    print("| | pixels | tile | budget | plan | peak | seconds | loss |\n" + "|---" * 8 + "|")
    rows = [("plain", options.plain_size), ("streamed", options.plain_size), ("streamed", options.size)]
    for kind, size in rows:
        row = peak_in_new_process(f"{kind}@{size}")
        tile, plan = "{} x {}".format(*row["tile"]), format_bytes(row["plan"])
        shown = ("", "", "") if kind == "plain" else (tile, options.memory_budget, plan)
        measured = format_bytes(row["peak"]), f"{row['seconds']:.1f}", f"{row['loss']:.6f}"
        print("|", " | ".join((kind, f"{size} x {size}", *shown, *measured)), "|", flush=True)


if __name__ == "__main__":
    main()
