"""What does a training step with the loss inside take: peak memory and seconds against the budget, and plain PyTorch where it fits.

    uv run python benchmarks/dense.py [--size 4096] [--plain-size 2048] [--memory-budget 1GiB] [--loss dice]
    uv run python benchmarks/dense.py --size 20000 --plain-size 0                  # the streamed step alone
    uv run python benchmarks/dense.py --size 20000 --plain-size 0 --plan           # without computing it

The U-Net of `benchmarks/writing.py` with 10 classes, float32, on a CPU; image and labels are read from TIFF files, tile by tile,
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

import torch
from writing import CLASSES, UNet, random_file

import widefield as wf
from widefield.cli.measuring import peak_in_new_process, peak_of
from widefield.modules import DenseModule
from widefield.streaming.budget import format_bytes


def plan_of(network: Any, size: int) -> Any:
    return network.plan((3, size, size), torch.empty(1, 1, size, size, dtype=torch.uint8, device="meta"))


def measure(kind: str, size: int, budget: str, loss: str, folder: Path, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = DenseModule(UNet(width).eval(), CLASSES, loss=loss, memory_budget=budget)
    network = module.stream_network
    pairs: list[list[Any]] = []
    for side in (256, size):
        files = [folder / f"{name}{side}.tif" for name in ("image", "labels")]
        for file, (channels, top) in zip(files, ((3, 256), (1, CLASSES)), strict=True):
            random_file(file, side, channels, top)
        pairs.append([wf.open_image(file) for file in files])
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
    plan = plan_of(network, size)
    return {**found, "peak": peak, "plan": plan.total_bytes, "tile": plan.tile_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument(
        "--plain-size", type=int, default=2048, help="the size that plain PyTorch is measured at, too; 0: none"
    )
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--loss", default="dice")
    parser.add_argument("--width", type=int, default=16, help="channels of the first level of the network")
    parser.add_argument("--plan", action="store_true", help="print the plan of the step, and compute nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        kind, size = options.peak.split("@")
        with tempfile.TemporaryDirectory() as folder:
            given = options.memory_budget, options.loss, Path(folder), options.width
            print(json.dumps(measure(kind, int(size), *given)))
        return
    if options.plan:
        network = UNet(options.width).eval()
        module = DenseModule(network, CLASSES, loss=options.loss, memory_budget=options.memory_budget)
        print(plan_of(module.stream_network, options.size))
        return
    net = f"U-Net of {options.width} channels, {CLASSES} classes"
    print(f"{net}, loss {options.loss}, float32, torch {torch.__version__}, {platform.machine()}\n")
    print("| | pixels | tile | budget | plan | peak | seconds | loss |\n" + "|---" * 8 + "|")
    compared = [("plain", options.plain_size), ("streamed", options.plain_size)] if options.plain_size else []
    rows = [*compared, ("streamed", options.size)]
    for kind, size in rows:
        row = peak_in_new_process(f"{kind}@{size}")
        tile, plan = "{} x {}".format(*row["tile"]), format_bytes(row["plan"])
        shown = ("", "", "") if kind == "plain" else (tile, options.memory_budget, plan)
        measured = format_bytes(row["peak"]), f"{row['seconds']:.1f}", f"{row['loss']:.6f}"
        print("|", " | ".join((kind, f"{size} x {size}", *shown, *measured)), "|", flush=True)


if __name__ == "__main__":
    main()
