"""Time and peak memory of plain PyTorch, torch.utils.checkpoint and streaming, for a forward pass and a training step.

    uv run python benchmarks/streaming.py --model resnet18 --size 2048 --tile 128

Times are medians of runs that are interleaved in one process; peak memory is measured in a fresh process per row, above the
weights and the image (CPU: VmHWM after a small warm-up; CUDA: max_memory_allocated, in this process). Prints a Markdown table.
"""

import argparse
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
import torchvision
from measuring import peak_in_new_process, peak_of
from timm.models.convnext import ConvNeXtStage
from timm.models.regnet import RegStage
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from widefield.streaming import StreamingCNN
from widefield.streaming.store import PLACES

KINDS = ("plain", "checkpoint", "streamed")


def trunk_of(name: str) -> nn.Sequential:
    """The convolutional trunk of a torchvision model, or of a timm model ("timm/NAME"), as a sequence of its blocks."""
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"))
        parts = [part for key, part in model.named_children() if key not in ("global_pool", "classifier", "head", "fc")]
    else:
        model = getattr(torchvision.models, name)(weights=None)
        parts = list(model.features) if hasattr(model, "features") else list(model.children())[:-2]
    blocks: list[nn.Module] = []
    for block in _blocks(nn.Sequential(*parts)):
        if any(True for _ in block.children()):
            blocks.append(block)
        elif blocks and isinstance(blocks[-1], nn.Sequential):  # single layers form a block
            blocks[-1].append(block)
        else:
            blocks.append(nn.Sequential(block))
    return nn.Sequential(*blocks)


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    """The blocks of stages that run their children one after the other."""
    if isinstance(part, (nn.Sequential, RegStage, ConvNeXtStage)):
        for child in part.children():
            yield from _blocks(child)
    else:
        yield part


def runner(kind: str, trunk: nn.Sequential, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    if kind == "plain":
        return trunk
    if kind == "checkpoint":

        def run(x: Tensor) -> Tensor:
            for block in trunk:
                x = checkpoint(block, x, use_reentrant=False)
            return x

        return run
    tile = tuple(int(t) for t in options.tile.split("x")) if options.tile and "x" in options.tile else None
    return StreamingCNN(
        trunk,
        tile or (None if options.tile is None else (int(options.tile), None)),
        memory_budget=options.memory_budget,
        maps=options.maps,
        scratch_dir=options.scratch_dir,
    )


def forward(run: Callable[[Tensor], Tensor], image: Tensor, options: argparse.Namespace) -> None:
    with torch.no_grad(), autocast(options):
        run(image)


def step(run: Callable[[Tensor], Tensor], image: Tensor, options: argparse.Namespace) -> None:
    with autocast(options):
        out = run(image)
    out.float().mean().backward()


PASSES = {"forward": forward, "step": step}


def autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.bf16)


def setup(options: argparse.Namespace, size: int) -> tuple[nn.Sequential, Tensor]:
    """Trunk (norm layers frozen, as the streamed pass has them) and image, both channels last."""
    torch.manual_seed(0)
    trunk = trunk_of(options.model).eval().to(options.device, memory_format=torch.channels_last)
    image = torch.rand(1, 3, size, size, device=options.device).contiguous(memory_format=torch.channels_last)
    return trunk, image


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure_times(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    trunk, image = setup(options, options.size)
    times: dict[str, dict[str, list[float]]] = {kind: {what: [] for what in options.passes} for kind in options.kinds}
    runs = {kind: runner(kind, trunk, options) for kind in options.kinds}
    for repeat in range(options.repeats + 1):  # the first round warms up
        for kind, run in runs.items():
            for what in options.passes:
                trunk.zero_grad(set_to_none=True)
                synchronise(options)
                begin = time.perf_counter()
                PASSES[what](run, image, options)
                synchronise(options)
                if repeat:
                    times[kind][what].append(time.perf_counter() - begin)
    return {kind: {what: statistics.median(values) for what, values in of.items()} for kind, of in times.items()}


def measure_peak(options: argparse.Namespace, peak: str) -> int:
    """Bytes above weights and image at the peak of one pass; on a CPU, run this in a process of its own."""
    kind, what = peak.split(":")
    function = PASSES[what]
    trunk, small = setup(options, 256)
    run = runner(kind, trunk, options)
    function(run, small, options)
    image = setup(options, options.size)[1]
    if isinstance(run, StreamingCNN):
        with torch.set_grad_enabled(what == "step"):
            run.plan(tuple(image.shape))
    if what == "step":  # gradients of the weights do not count
        for p in trunk.parameters():
            p.grad = torch.empty_like(p).zero_()  # zeros_like has no pages yet
    if options.device == "cuda":
        gc.collect()
        synchronise(options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(run, image, options)
        return torch.cuda.max_memory_allocated() - before
    return peak_of(lambda: function(run, image, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a torchvision model, or timm/NAME")
    parser.add_argument("--size", type=int, default=2048, help="height and width of the image")
    parser.add_argument("--tile", help="height of full-width strips, or HEIGHTxWIDTH; default: chosen by the planner")
    parser.add_argument("--memory-budget")
    parser.add_argument("--maps", choices=PLACES, help="where maps between stages live")
    parser.add_argument("--scratch-dir", help="folder for them, if in a file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(measure_peak(options, options.peak)))
        return
    times = measure_times(options)
    peak = partial(measure_peak, options) if options.device == "cuda" else peak_in_new_process
    peaks = {kind: {what: peak(f"{kind}:{what}") for what in options.passes} for kind in options.kinds}
    trunk, image = setup(options, options.size)
    streamed = runner("streamed", trunk, options)
    assert isinstance(streamed, StreamingCNN)
    with torch.set_grad_enabled("step" in options.passes):
        plan = streamed.plan(tuple(image.shape))
    device = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.processor() or platform.machine()}"
    )
    precision = "bfloat16 autocast" if options.bf16 else "float32"
    print(f"`python benchmarks/streaming.py {' '.join(sys.argv[1:])}`")
    print(
        f"{datetime.date.today()}, {device}, {options.threads} threads, torch {torch.__version__}, {options.model} trunk,"
    )
    print(
        f"1x3x{options.size}x{options.size}, {precision}, tile {plan.tile_size}, {plan.stages} stages, maps: {plan.map_place}\n"
    )
    print("| |" + "".join(f" {what} (s) | / plain | peak (MiB) | / plain |" for what in options.passes))
    print("|---|" + "---|---|---|---|" * len(options.passes))
    for kind in options.kinds:
        cells = []
        for what in options.passes:
            seconds, peak = times[kind][what], peaks[kind][what]
            cells += [f"{seconds:.3f}", f"{seconds / times['plain'][what]:.2f}"]
            cells += [f"{peak / 2**20:.0f}", f"{peak / peaks['plain'][what]:.2f}"]
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
