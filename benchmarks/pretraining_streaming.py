"""What views of 1024 pixels cost, streamed and not, beside views of 224 pixels: SimCLR and DINO.

    uv run python benchmarks/pretraining_streaming.py [--methods simclr dino] [--ways "maps in a file" "statistics frozen"]
        [--side 1024] [--batch 2] [--repeats 2] [--double]

A step is the loss of the method on views of photographs and its gradients: ResNet-18, one thread. DINO has 2 global views of the
side and 6 local ones of 3/7 of it, as 96 of 224. Norms have the statistics of the batch, and where views are streamed the maps
between them lie in a file; or all have frozen ones. Each row is a process of its own: after a step on small views comes the one of
which the peak memory is measured (above weights, gradients and views; the resident high-water mark); the CPU time is the median of
it and `--repeats` others. At last comes a step on whole views with the same weights, norms and random numbers; from that the
differences are, of float32, or with `--double` of float64.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from dataclasses import replace
from random import Random
from typing import Any

import torch
from skimage import data
from torch import Tensor, nn

from widefield.cli.measuring import peak_in_new_process, peak_of
from widefield.pretraining import METHODS, EmbeddingModel, Run, wrap
from widefield.pretraining.embedding import StreamingArgs
from widefield.pretraining.views import Views

SMALL, WARM_UP = 224, 64
LOCAL = 3 / 7
WAYS: dict[str, dict[str, Any]] = {
    "maps in a file": {"maps": "file", "memory_budget": "384MiB"},
    "statistics frozen": {"batch_statistics": "frozen"},
}
FROZEN_BUDGETS = {"simclr": "256MiB", "dino": "384MiB"}
"""The small views of DINO are many, and go through the model together."""


def make(name: str, streaming: StreamingArgs | None, frozen: bool) -> Any:
    torch.manual_seed(0)
    method = METHODS.get(name)(EmbeddingModel(wrap("torchvision/resnet18"), None, streaming), Run(512, 1000, 256, 1000))
    method.train()
    for embedding in method.modules() if frozen else ():
        if isinstance(embedding, EmbeddingModel):
            for module in embedding.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
    for weight in method.parameters():
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight).zero_()  # zeros_like has no pages yet
    return method


def views(name: str, side: int, batch: int) -> list[Tensor]:
    method: Any = METHODS.get(name)
    args = method.transforms
    local = None if args.local_view is None else replace(args.local_view, view_size=round(side * LOCAL))
    draw = Views(replace(args, image_size=side, local_view=local))
    photos = (data.astronaut(), data.immunohistochemistry(), data.coffee(), data.chelsea())
    samples = [draw(torch.from_numpy(photos[k % 4]).permute(2, 0, 1), Random(k)) for k in range(batch)]
    return [torch.stack(same).to(torch.get_default_dtype()) / 127.5 - 1 for same in zip(*samples, strict=True)]


def step(method: Any, batch: list[Tensor]) -> float:
    """The loss; its gradients are added to those of the weights."""
    torch.manual_seed(2)
    loss = method.loss(batch, 500)["loss"]
    loss.backward()
    return float(loss)


def measure(args: argparse.Namespace, name: str, side: int, way: str) -> list[float]:
    """Peak in bytes, seconds of a step, relative differences of the loss and of the gradients from those of whole views."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    frozen = way == "statistics frozen"
    streaming = None if way == "whole" else StreamingArgs(**{"memory_budget": FROZEN_BUDGETS[name], **WAYS[way]})
    step(make(name, streaming, frozen), views(name, WARM_UP, args.batch))
    method, batch = make(name, streaming, frozen), views(name, side, args.batch)
    losses: list[float] = []
    seconds: list[float] = []

    def timed() -> None:
        start = time.process_time()
        losses.append(step(method, batch))
        seconds.append(time.process_time() - start)

    peak = peak_of(timed)
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    for _ in range(args.repeats):
        timed()
    differences = [0.0, 0.0]
    if streaming is not None:
        whole = make(name, None, frozen)
        loss = step(whole, batch)
        wanted = {key: p.grad for key, p in whole.named_parameters() if p.grad is not None}
        apart = sum(float((gradients[key] - value).square().sum()) for key, value in wanted.items())
        size = sum(float(value.square().sum()) for value in wanted.values())
        differences = [abs(losses[0] - loss) / abs(loss), (apart / size) ** 0.5]
    return [peak, statistics.median(seconds), *differences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=["simclr", "dino"], default=["simclr", "dino"])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        name, side, way = args.peak.split("/")
        print(json.dumps(measure(args, name, int(side), way)))
        return
    print(f"torch {torch.__version__}, {platform.machine()}, 1 thread, {datetime.date.today()}\n")
    print("| method | views | | peak (MiB) | / whole | step (CPU-s) | / whole | loss differs by | gradients by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.methods:
        whole: list[float] = []
        for side, way in ((SMALL, "whole"), *((args.side, way) for way in ("whole", *args.ways))):
            peak, seconds, loss, gradients = peak_in_new_process(f"{name}/{side}/{way}")
            if side == args.side and way == "whole":
                whole = [peak, seconds]
            ratios = [f"{peak / whole[0]:.2f}", f"{seconds / whole[1]:.2f}"] if whole else ["", ""]
            errors = ["", ""] if way == "whole" else [f"{loss:.1e}", f"{gradients:.1e}"]
            cells = [f"{peak / 2**20:.0f}", ratios[0], f"{seconds:.2f}", ratios[1], *errors]
            print(f"| {name} | {side} | {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
