"""What reading the next tile in the background saves: a forward pass over a slide of JPEG tiles.

    uv run python benchmarks/reading.py

The trunk of a ResNet-18 on a tiled TIFF (JPEG, quality 90) of photographs that scikit-image ships, put side by side. Seconds are
medians of passes that are interleaved in one process: with tiles read in the background, and with tiles read where they are
needed; and of reading all tiles without a network. Prints a Markdown table.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pyvips
import skimage.data
import torch
import torchvision
from torch import Tensor

import widefield as wf
from widefield.streaming.job import Job


def make_slide(path: Path, size: int) -> None:
    photograph = skimage.data.immunohistochemistry()
    times = -(-size // min(photograph.shape[:2]))
    pixels = np.tile(photograph, (times, times, 1))[:size, :size]
    image = pyvips.Image.new_from_memory(pixels.tobytes(), size, size, 3, "uchar")
    image.tiffsave(str(path), tile=True, tile_width=256, tile_height=256, compression="jpeg", Q=90)


def read_in_place(job: Job, steps: Iterable[tuple[int, int]]) -> Iterator[list[Tensor | None]]:
    for i, j in steps:
        yield job._to_device(job._fetch(i, j))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    trunk, _ = wf.split(torchvision.models.resnet18(weights=None).eval().to(options.device))
    streamed = wf.StreamingCNN(trunk, (256, 2048))
    print(f"`python benchmarks/reading.py`, {datetime.date.today()}, torch {torch.__version__}, {options.device}\n")
    print(
        "| threads of torch | reading alone (s) | in place (s) | in the background (s) | / in place |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "slide.tif"
        make_slide(path, options.size)

        def read() -> None:
            image = wf.open_image(path)
            for y in range(0, options.size, 256):
                for x in range(0, options.size, 2048):
                    image.read(y, x, min(256, options.size - y), min(2048, options.size - x))

        def in_place() -> None:
            with mock.patch.object(Job, "tiles", read_in_place):
                streamed(wf.open_image(path))

        def ahead() -> None:
            streamed(wf.open_image(path))

        for threads in options.threads:
            torch.set_num_threads(threads)
            ways: tuple[Callable[[], None], ...] = (read, in_place, ahead)
            times: list[list[float]] = [[] for _ in ways]
            for repeat in range(options.repeats + 1):  # the first round warms up
                for way, seconds in zip(ways, times, strict=True):
                    start = time.perf_counter()
                    way()
                    if options.device == "cuda":
                        torch.cuda.synchronize()
                    if repeat:
                        seconds.append(time.perf_counter() - start)
            alone, placed, background = map(statistics.median, times)
            print(
                f"| {threads} | {alone:.2f} | {placed:.2f} | {background:.2f} | {background / placed:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
