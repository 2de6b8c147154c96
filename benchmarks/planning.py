"""What planning takes for an image size that is new to a traced model: CPU milliseconds, median and largest of 7 sizes.

    uv run python benchmarks/planning.py

The trunks of torchvision's classifiers. Where the largest stands out, Python's garbage collection fell into that call.
"""

import time
from statistics import median

import torchvision

import widefield as wf

BUDGETS = {2048: "2GiB", 8192: "4GiB", 65536: "64GiB"}


def main() -> None:
    print("| trunk | around | budget | median (ms) | largest (ms) |\n|---|---|---|---|---|")
    for name in ("resnet18", "resnet50", "convnext_tiny", "efficientnet_b0"):
        trunk, _ = wf.split(torchvision.models.get_model(name, weights=None))
        for side, budget in BUDGETS.items():
            model = wf.StreamingCNN(trunk, memory_budget=budget)
            model.plan((3, 1024, 1024))
            times = []
            for k in range(7):
                start = time.thread_time()
                model.plan((3, side - 64 * k, side - 32 * k))
                times.append(1e3 * (time.thread_time() - start))
            print(f"| {name} | {side} x {side} | {budget} | {median(times):.0f} | {max(times):.0f} |", flush=True)


if __name__ == "__main__":
    main()
