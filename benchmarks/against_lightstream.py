"""A training step of a ResNet-18 trunk: plain PyTorch, lightstream (from PyPI) and Widefield in the memory that lightstream took.

    uv run --with lightstream python benchmarks/against_lightstream.py

lightstream is no dependency of Widefield. `--with` installs it with a torch of its own, in the version of the lock file. To run it
with the installed torch, whatever its version:

    uv pip install --target build/lightstream --no-deps lightstream
    PYTHONPATH=build/lightstream uv run python benchmarks/against_lightstream.py

Norm layers are in evaluation mode and their parameters are frozen, for all, as lightstream's own modules do. lightstream's tile is
given; Widefield gets the peak of that run as its `memory_budget`, and chooses a tile that fits, often in far less. The pass over
one tile by which lightstream prepares itself is not counted. Float32, on CUDA without TF32 in convolutions; image and weights are
channels last, for all.

Seconds are medians of runs that are interleaved in one process; peak memory is measured above the weights, their gradients and the
image, after a small warm-up (CPU: in a fresh process per row; CUDA: max_memory_allocated). Errors of the output and of the
gradients of all convolutions are the largest errors from plain PyTorch in float64, relative to the tensor's largest value. Prints
a Markdown table.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torchvision
from lightstream.core.scnn.scnn import StreamingCNN as Lightstream
from measuring import peak_in_new_process, peak_of
from streaming import synchronise
from torch import Tensor, nn

from widefield.streaming import StreamingCNN

Step = Callable[[Tensor], Tensor]
STRIDE, SMALLEST_TILE = 32, 1024  # of a ResNet-18 trunk; lightstream is wrong, or fails, for other sizes

warnings.filterwarnings("ignore", ".*CUDA is not available")  # lightstream's autocast


def trunk_and_step(kind: str, device: str) -> tuple[nn.Module, Step]:
    """A trunk on `device`, the same for each `kind`, and its training step: "plain", "lightstream:TILE" or "widefield:BYTES"."""
    torch.manual_seed(0)
    trunk = nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2]).eval().to(device)
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    name, _, size = kind.partition(":")
    if name == "lightstream":
        return trunk, lightstream_step(trunk, int(size))
    trunk.to(memory_format=torch.channels_last)
    run = StreamingCNN(trunk, memory_budget=int(size)) if name == "widefield" else trunk

    def step(image: Tensor) -> Tensor:
        out = run(image)
        loss_of(out).backward()
        return out.detach()

    return trunk, step


def lightstream_step(trunk: nn.Module, tile: int) -> Step:
    with contextlib.redirect_stdout(io.StringIO()):
        net = Lightstream(trunk, (1, 3, tile, tile), copy_to_gpu=False)  # replaces the convolutions in `trunk`
    trunk.to(memory_format=torch.channels_last)

    def step(image: Tensor) -> Tensor:
        out = net.forward(image).requires_grad_()
        loss_of(out).backward()
        net.backward(image, out.grad)
        return out.detach()

    return step


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def make_image(size: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, size, size, generator=generator).to(device, memory_format=torch.channels_last)


def measure_peak(options: argparse.Namespace, kind: str) -> int:
    """Bytes above weights, their gradients and image at the peak of one step; on a CPU, run this in a process of its own."""
    trunk, step = trunk_and_step(kind, options.device)
    step(make_image(256, options.device))
    for p in trunk.parameters():
        p.grad = torch.empty_like(p).zero_() if p.requires_grad else None  # zeros_like has no pages yet
    image = make_image(options.size, options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(image)
        return torch.cuda.max_memory_allocated() - before
    return peak_of(lambda: step(image))


def measure_times(kinds: list[str], options: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Of each of `kinds`: seconds of a step, the error of its output and the largest one of its gradients."""
    image = make_image(options.size, options.device)
    trunk, step = trunk_and_step("plain", options.device)
    trunk.double()
    right, right_grads = step(image.double()), gradients(trunk)
    cases = {kind: trunk_and_step(kind, options.device) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    errors: dict[str, tuple[float, float]] = {}
    for repeat in range(options.repeats + 1):  # the first round warms up, and compares
        for kind, (trunk, step) in cases.items():
            trunk.zero_grad(set_to_none=True)
            synchronise(options)
            begin = time.perf_counter()
            out = step(image)
            synchronise(options)
            seconds[kind].append(time.perf_counter() - begin)
            if repeat == 0:
                grads = gradients(trunk)
                of_grads = [error(grads[name], grad) for name, grad in right_grads.items()]
                errors[kind] = error(out, right), max(of_grads)
    return {kind: (statistics.median(seconds[kind][1:]), *errors[kind]) for kind in kinds}


def gradients(trunk: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}


def error(value: Tensor, right: Tensor) -> float:
    return float((value - right).abs().max() / right.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="height and width of the image")
    parser.add_argument(
        "--tile",
        type=int,
        nargs="+",
        default=[1280, 1600],
        help="lightstream's tile sizes; near 1024 it needs very many",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(size % STRIDE for size in (options.size, *options.tile)) or min(options.tile) < SMALLEST_TILE:
        parser.error(f"sizes and tiles must be multiples of {STRIDE}, tiles at least {SMALLEST_TILE}")
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(measure_peak(options, options.peak)))
        return
    torch.backends.cudnn.allow_tf32 = False
    peak = partial(measure_peak, options) if options.device == "cuda" else peak_in_new_process
    rows = ["plain"]
    peaks = {"plain": peak("plain")}
    theirs = {}  # lightstream's row for one of ours
    for tile in options.tile:
        other = f"lightstream:{tile}"
        peaks[other] = peak(other)
        ours = f"widefield:{peaks[other]}"
        peaks[ours], theirs[ours] = peak(ours), other
        rows += [other, ours]
    results = measure_times(rows, options)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightstream", "widefield"))
    print(f"`python benchmarks/against_lightstream.py {' '.join(sys.argv[1:])}`")
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"{datetime.date.today()}, {device}, {options.threads} threads, {versions},")
    print(f"resnet18 trunk, 1x3x{options.size}x{options.size}, float32\n")
    print("| | step (s) | / plain | / lightstream | peak (MiB) | / plain | error of outputs | of gradients |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in rows:
        seconds, *errors = results[kind]
        label = (
            f"Widefield, within the peak of {theirs[kind].replace(':', ' ')}"
            if kind in theirs
            else kind.replace(":", ", tile ")
        )
        cells = [f"{seconds:.3f}", f"{seconds / results['plain'][0]:.2f}"]
        cells += [f"{seconds / results[theirs[kind]][0]:.2f}" if kind in theirs else ""]
        cells += [f"{peaks[kind] / 2**20:.0f}", f"{peaks[kind] / peaks['plain']:.2f}"]
        cells += [f"{value:.1e}" for value in errors]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
