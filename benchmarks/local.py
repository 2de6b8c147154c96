"""A vision transformer on every patch of a slide, and gated attention pooling over its map, trained together: memory and time.

    uv run python benchmarks/local.py --model vit_small_patch16_224 --size 4096 --memory-budget 700MiB

Memory is above the weights and the image, in a process of its own per row: VmHWM on the CPU, max_memory_allocated on CUDA. Rows:

    chunk     forward and backward of as many patches at a time as a step of the scan holds, encoder and head, without the rest
    chunks    the same over all patches of the image, one chunk after the other: the time of the bare computation
    streamed  `stream(...)` on the image: exact gradients of one loss of the whole slide
    frozen    `stream(...)` with an encoder that does not train

Prints a Markdown table.
"""

import argparse
import json
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import widefield as wf
from widefield.cli.measuring import peak_in_new_process, peak_of


class GatedAttention(nn.Module):
    """Ilse et al., Attention-based deep multiple instance learning, 2018, equation 9."""

    def __init__(self, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.v, self.u, self.w = nn.Linear(channels, hidden), nn.Linear(channels, hidden), nn.Linear(hidden, 1)
        self.out = nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        weights = self.w(torch.tanh(self.v(tokens)) * torch.sigmoid(self.u(tokens))).softmax(1)
        return self.out((weights * tokens).sum(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--window", type=int, default=224)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--memory-budget", default=None)
    parser.add_argument("--tile", type=int, default=None, help="pixels of a tile along each side, instead of a budget")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="*", default=["chunk", "chunks", "streamed", "frozen"])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(measured(options.peak, options)))
        return
    rows = {row: peak_in_new_process(row) for row in options.rows}
    print(
        f"{options.model}, {options.size} x {options.size} pixels, {next(iter(rows.values()))['chunk']} patches a chunk\n"
    )
    print("| | MiB | s | of chunk | of chunks |\n|---|---|---|---|---|")
    for row, found in rows.items():
        memory = f"{found['bytes'] / rows['chunk']['bytes']:.2f}" if "chunk" in rows else ""
        seconds = f"{found['seconds'] / rows['chunks']['seconds']:.2f}" if "chunks" in rows and row != "chunk" else ""
        print(f"| {row} | {found['bytes'] / 2**20:.0f} | {found['seconds']:.1f} | {memory} | {seconds} |")


def measured(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Return bytes and seconds of a row, and the number of patches in a chunk."""
    torch.manual_seed(0)
    encoder = timm.create_model(options.model, num_classes=0).requires_grad_(row != "frozen").eval()
    head = GatedAttention(encoder.num_features)
    net = nn.Sequential(wf.Local(encoder, options.window), head).to(options.device)
    image = torch.rand(1, 3, options.size, options.size)
    streamed = wf.stream(net, options.tile, memory_budget=options.memory_budget, verify=False)
    tile = streamed.plan(image.shape[1:]).tile_size
    chunk = max(1, tile[0] // options.window) * max(1, tile[1] // options.window)
    count = (options.size // options.window) ** 2
    patches = torch.rand(min(chunk, count), 3, options.window, options.window, device=options.device)

    def on_patches(times: int) -> None:
        for _ in range(times):
            head(encoder(patches).T[None, :, :, None]).sum().backward()

    work: dict[str, Callable[[], object]] = {
        "chunk": lambda: on_patches(1),
        "chunks": lambda: on_patches(-(-count // chunk)),
        "streamed": lambda: streamed(image).sum().backward(),
        "frozen": lambda: streamed(image).sum().backward(),
    }
    for p in net.parameters():  # as in any step but the first; they count as weights
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    encoder(patches[:1])
    started = time.perf_counter()
    if options.device == "cpu":
        peak = peak_of(work[row])
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work[row]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return {"bytes": peak, "seconds": time.perf_counter() - started, "chunk": chunk}


if __name__ == "__main__":
    main()
