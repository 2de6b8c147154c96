"""Time per pixel of a streamed training step, from small images to large ones: is it constant?

    uv run python benchmarks/pixels.py

Strips of one height for all sizes. Medians of rounds over all sizes, in one process, after a round of the smaller ones to warm up.
Prints a Markdown table.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time

import torch
from streaming import setup, step

from widefield.streaming import StreamingCNN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model, or timm/NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--tile", type=int, nargs=2, default=[128, 1024], help="height and width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.device, options.bf16 = "cpu", False
    torch.set_num_threads(options.threads)
    seconds: dict[int, list[float]] = {size: [] for size in options.sizes}
    for repeat in range(options.rounds + 1):
        for size in options.sizes if repeat else options.sizes[:-1]:
            trunk, image = setup(options, size)
            run = StreamingCNN(trunk, tuple(options.tile))
            run.plan(tuple(image.shape))
            begin = time.perf_counter()
            step(run, image, options)
            if repeat:
                seconds[size].append(time.perf_counter() - begin)
    print(f"`python benchmarks/pixels.py {' '.join(sys.argv[1:])}`")
    print(
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {options.threads} threads, "
        f"torch {torch.__version__}, {options.model} trunk, float32, tile {tuple(options.tile)}\n"
    )
    print("| image | step (s) | ns per pixel | / smallest |\n|---|---|---|---|")
    least = min(options.sizes)
    for size in options.sizes:
        per_pixel, of_least = (statistics.median(seconds[n]) / n**2 for n in (size, least))
        print(f"| {size}x{size} | {per_pixel * size**2:.2f} | {per_pixel * 1e9:.0f} | {per_pixel / of_least:.2f} |")


if __name__ == "__main__":
    main()
