"""A training step on a slide of which a part is foreground: with its mask against without, reading included; and its plan.

    uv run python benchmarks/parts.py --size 4096 --foreground 0.15

The slide is a tiled TIFF (JPEG) that is made here: tissue in blobs on white. Times are medians of steps that are interleaved in one
process. Prints a Markdown table.
"""

import argparse
import datetime
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyvips
import torch
import torchvision

from widefield import open_image, stream


def blobs(size: int, share: float, seed: int = 0) -> np.ndarray:
    """A mask of size / 32 with round blobs that cover `share` of it, their radii a tenth of the image's side or less."""
    random, n = np.random.default_rng(seed), size // 32
    y, x = np.mgrid[:n, :n]
    mask = np.zeros((n, n), dtype=bool)
    while mask.mean() < share:
        radius = min(n / 10, math.sqrt(max(1.0, (share - mask.mean()) * n * n / math.pi)))
        centre = random.uniform(radius, n - radius, 2)
        mask |= (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
    return mask


def write_slide(path: Path, mask: np.ndarray) -> None:
    """Noise in the colours of a stained tissue where the mask is, white elsewhere."""
    size = 32 * len(mask)
    grey = pyvips.Image.gaussnoise(size, size, mean=0, sigma=40)
    where = pyvips.Image.new_from_array(mask.astype(np.uint8) * 255).resize(32, kernel="nearest")
    tissue = grey.bandjoin([grey, grey]).linear([1, 1, 1], [200, 120, 180]).cast("uchar")
    where.ifthenelse(tissue, [243, 243, 243]).cast("uchar").tiffsave(
        str(path), tile=True, tile_width=512, tile_height=512, compression="jpeg", Q=90, pyramid=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--foreground", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-budget", default="2GiB")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mask = blobs(options.size, options.foreground)
    net = getattr(torchvision.models, options.model)(num_classes=2).eval()
    streamed = stream(net, memory_budget=options.memory_budget)
    with tempfile.TemporaryDirectory() as folder:
        write_slide(Path(folder) / "slide.tif", mask)
        image = open_image(Path(folder) / "slide.tif")
        kinds = {"whole": None, "masked": mask}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for cells in kinds.values():  # captured and checked on a small image
            streamed(
                torch.rand(1, 3, 512, 512), mask=None if cells is None else cells[:16, :16] | True
            ).sum().backward()
        for _ in range(options.repeats):
            for kind, cells in kinds.items():
                begin = time.perf_counter()
                streamed(image, mask=cells, fill=243 if cells is not None else 0.0).sum().backward()
                times[kind].append(time.perf_counter() - begin)
        plans = {kind: streamed.plan((3, options.size, options.size), mask=cells) for kind, cells in kinds.items()}
    median = {kind: statistics.median(found) for kind, found in times.items()}
    print(
        f"{options.model} {options.size}, foreground {mask.mean():.1%}, {options.threads} threads, torch {torch.__version__}, "
        f"{platform.processor() or platform.machine()}, {datetime.date.today()}\n"
    )
    print("| | step | of the whole | computed | steps | tile | predicted memory |")
    print("|---|---|---|---|---|---|---|")
    for kind, plan in plans.items():
        height, width = plan.tile_size
        print(
            f"| {kind} | {median[kind]:.2f} s | {median[kind] / median['whole']:.2f} | {plan.computed_fraction:.1%} | "
            f"{plan.steps} | {height} x {width} | {plan.total_bytes / 2**20:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
