"""Does a training step stay within its memory budget, and is its peak what the plan says?

    uv run python benchmarks/budget.py

One fresh process per row on a CPU: a warm-up on a small image, then a step on an image of the given size, under the given budget.
Measured is the peak above the weights, their gradients and the image (CPU: VmHWM; CUDA: max_memory_allocated). Prints a
Markdown table.
"""

import argparse
import datetime
import gc
import json
import platform
import sys

import torch
from measuring import peak_in_new_process, peak_of
from streaming import setup, step

from widefield.streaming import StreamingCNN
from widefield.streaming.budget import parse_bytes

ROWS = (
    ("resnet18", 1024, "256MiB"),
    ("resnet18", 2048, "512MiB"),
    ("resnet18", 2048, "1GiB"),
    ("resnet18", 4096, "1GiB"),
    ("resnet50", 1024, "768MiB"),
    ("resnet50", 2048, "1GiB"),
    ("resnet50", 2048, "2GiB"),
    ("convnext_tiny", 1024, "1GiB"),
    ("convnext_tiny", 2048, "1500MiB"),
    ("efficientnet_b0", 1024, "256MiB"),
    ("efficientnet_b0", 2048, "1GiB"),
    ("densenet121", 1024, "512MiB"),
    ("mobilenet_v2", 2048, "512MiB"),
    ("vgg11_bn", 1024, "768MiB"),
)


def measure(model: str, size: int, budget: str, device: str) -> dict[str, float]:
    options = argparse.Namespace(model=model, device=device, bf16=False)
    trunk, small = setup(options, 256)
    step(StreamingCNN(trunk, 128), small, options)
    image = setup(options, size)[1]
    run = StreamingCNN(trunk, memory_budget=budget)
    plan = run.plan(tuple(image.shape))
    for p in trunk.parameters():
        p.grad = torch.empty_like(p).zero_()  # zeros_like has no pages yet
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(run, image, options)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = peak_of(lambda: step(run, image, options))
    return {
        "peak": peak,
        "predicted": plan.total_bytes,
        "overhead": plan.predicted_overhead,
        "tile": plan.tile_size,
        "by_kind": dict(plan.predicted_bytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="numbers of rows, from 0")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(measure(*ROWS[int(options.peak)], options.device)))
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"`python benchmarks/budget.py {' '.join(sys.argv[1:])}`")
    print(f"{datetime.date.today()}, {name}, {options.threads} threads, torch {torch.__version__}, float32\n")
    print("| model | image | budget (MiB) | tile | overhead | predicted (MiB) | peak (MiB) | / predicted | / budget |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in options.rows:
        model, size, budget = ROWS[row]
        found = measure(*ROWS[row], "cuda") if options.device == "cuda" else peak_in_new_process(str(row))
        limit = parse_bytes(budget)
        assert limit is not None
        peak, predicted = found["peak"], found["predicted"]
        cells = (
            *(model, f"{size}x{size}", limit >> 20, "x".join(map(str, found["tile"])), f"{found['overhead']:.2f}"),
            *(predicted >> 20, peak >> 20, f"{peak / predicted:.2f}", f"{peak / limit:.2f}"),
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
