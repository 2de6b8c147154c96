"""Time per pixel of a streamed training step, from small images to large ones: is it constant?

    uv run python benchmarks/pixels.py

Tiles of one size for all images, on a CPU. Medians of rounds over all sizes, in one process, after a round to warm up. Prints a
Markdown table.
"""

import argparse
import sys
from functools import partial

from widefield import stream
from widefield.cli.bench import Case
from widefield.cli.measuring import machine, measure, timed
from widefield.cli.ways import one_pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision/resnet18", help="as of `widefield bench`")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--tile", type=int, nargs=2, default=[128, 1024], help="height and width")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    case = Case(options.model, min(options.sizes), "step", "float32", "cpu", channels_last=True)
    model = case.network()
    streamed = stream(model, tuple(options.tile))
    passes = {
        size: partial(timed, partial(one_pass, streamed, model, image, "step", "float32"), image.device)
        for size in options.sizes
        for image in [case.image(size)]
    }
    found = measure(passes, repeats=options.rounds)
    told = machine("cpu")
    print(f"`python benchmarks/pixels.py {' '.join(sys.argv[1:])}`")
    print(f"{told['date']}, {told['machine']}, {told['threads']} threads, torch {told['torch']}, {options.model}\n")
    print("| image | step (s) | ns per pixel | / smallest |\n|---|---|---|---|")
    nanoseconds = {size: 1e9 * (of.median or 0) / size**2 for size, of in found.items()}
    for size, each in nanoseconds.items():
        print(f"| {size}x{size} | {found[size].median:.2f} | {each:.0f} | {each / nanoseconds[case.size]:.2f} |")


if __name__ == "__main__":
    main()
