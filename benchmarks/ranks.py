"""One image over several processes: the time of a training step, and the speed-up to be expected of more of them.

    uv run python benchmarks/ranks.py --model resnet18 --size 2048 --ranks 2
    uv run python benchmarks/ranks.py --model resnet50 --size 131072 --ranks 64 --expected

Measured: medians of steps with one thread for each process, of one process and of several, in turn. Expected: from the plans of all
processes, the work of all over that of the one that has most (a position of a map counts as its bytes; the sums that processes
exchange are left out). Prints a Markdown table.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import distributed
from torch.multiprocessing.spawn import spawn

from widefield import stream
from widefield.streaming import StreamingCNN
from widefield.streaming.captured import CallKind
from widefield.streaming.need import Wanted


def measured(rank: int, ranks: int, store: str, options: argparse.Namespace, file: str) -> None:
    """Time steps of one process (the others wait) and of all, in turn; the first process writes the medians to `file`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    net = getattr(torchvision.models, options.model)(num_classes=2).eval()
    alone = stream(net, memory_budget=options.memory_budget)
    together = stream(net, memory_budget=options.memory_budget, process_group=distributed.group.WORLD)
    image = torch.rand(1, 3, options.size, options.size)
    times: dict[int, list[float]] = {1: [], ranks: []}
    for repeat in range(options.repeats + 1):  # the first one captures and checks
        for count, model in ((1, alone), (ranks, together)):
            distributed.barrier()
            begin = time.perf_counter()
            if count > 1 or rank == 0:
                model(image).sum().backward()
            distributed.barrier()
            if repeat:
                times[count].append(time.perf_counter() - begin)
    if rank == 0:
        Path(file).write_text(" ".join(str(statistics.median(found)) for found in times.values()))
    distributed.destroy_process_group()


def expected(options: argparse.Namespace) -> tuple[float, float]:
    """Return the speed-up that the plans promise, and what is computed twice as a share of all work."""
    net = getattr(torchvision.models, options.model)(num_classes=2).eval()
    model = StreamingCNN(net, unsupported="run_whole", memory_budget=options.memory_budget)
    kind = CallKind((1, 3, options.size, options.size), torch.float32)
    program = model._program(kind)
    planner = model._planner(program, kind)
    parts = [planner.plan(Wanted(band=(rank, options.ranks)))[0].computed_fraction for rank in range(options.ranks)]
    return 1 / max(parts), sum(parts) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-budget", default="1GiB", help="of each process")
    parser.add_argument("--expected", action="store_true", help="measure nothing")
    options = parser.parse_args()
    speed_up, twice = expected(options)
    found = ""
    if not options.expected:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "times"
            spawn(measured, args=(options.ranks, f"{folder}/store", options, str(file)), nprocs=options.ranks)
            one, several = map(float, file.read_text().split())
        found = f" {one:.2f} s | {several:.2f} s | {one / several:.2f} |"
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {datetime.date.today()}\n")
    head = "| model | size | processes | computed twice | expected speed-up |"
    print(head + (" one process | several | speed-up |" if found else ""))
    print("|---" * (8 if found else 5) + "|")
    print(f"| {options.model} | {options.size} | {options.ranks} | {twice:.1%} | {speed_up:.2f} |{found}")


if __name__ == "__main__":
    main()
