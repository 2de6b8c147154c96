"""What do tiles change? U-Nets of MONAI with three kinds of norm layers, on tiles and on the whole image.

    uv pip install monai
    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/seams.py [--tables tiles memory training] [--picture FILE]

Each network learns to find vessels in a fundus photograph that scikit-image ships: from the left half, in crops of 128 pixels;
the labels are a threshold on Sato's vesselness. Then its logits of the whole photograph by plain PyTorch are compared with
streamed ones, with those of tiles that are cropped and joined, and with MONAI's `sliding_window_inference`, which blends tiles by
a Gaussian. Dice is that of the right half. Seconds are of one run each, interleaved with plain PyTorch; peak memory is measured
in a fresh process for each cell, above the weights and the image (VmHWM). Prints Markdown tables.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from skimage.data import retina
from skimage.filters import sato
from torch import Tensor, nn

import widefield as wf
from widefield.cli.measuring import peak_in_new_process, peak_of

CROP = 128
"""Side of the crops that the networks learn from."""
TABLES = ["tiles", "memory"]
NORMS: dict[str, Any] = {"batch": "batch", "instance": "instance", "group": ("group", {"num_groups": 4})}


def unet(norm: str) -> nn.Module:
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    return BasicUNet(2, in_channels=3, out_channels=2, features=(8, 8, 16, 32, 64, 8), norm=NORMS[norm]).eval()


unet_batch, unet_instance, unet_group = (partial(unet, norm) for norm in NORMS)  # for `widefield check`


@cache
def photograph(side: int) -> tuple[Tensor, Tensor]:
    """Return a square image (1, 3, side, side) with values from 0 to 1, and where its vessels are, (1, side, side)."""
    pixels = torch.from_numpy(retina()[:side, :side]).permute(2, 0, 1)[None].float() / 255
    vessels = sato(pixels[0, 1].double().numpy(), sigmas=[2, 3, 4], black_ridges=True) > 0.02
    return pixels.contiguous(), torch.from_numpy(vessels)[None].long()


def learn(norm: str, side: int, steps: int) -> nn.Module:
    """Return a network that has seen `steps` batches of four crops of the left half."""
    network = unet(norm).train()
    image, labels = photograph(side)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(steps):
        corners = [[int(torch.randint(room - CROP, ())) for room in (side, side // 2)] for _ in range(4)]
        crops, truth = (
            torch.cat([each[..., y : y + CROP, x : x + CROP] for y, x in corners]) for each in (image, labels)
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(crops), truth).backward()
        optimizer.step()
    return network.eval()


def learn_whole(norm: str, side: int, steps: int) -> nn.Module:
    """Return a network that has seen the left half `steps` times, turned and mirrored at random, streamed as a whole."""
    network = unet(norm).train()
    module = wf.DenseModule(network, 2, tile_size=256)
    pair = [each[..., : side // 2] for each in photograph(side)]
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(steps):
        mirrored = [axis for axis in (-2, -1) if torch.rand(()) < 0.5]
        image, labels = (each.flip(mirrored) for each in pair)
        optimizer.zero_grad()
        module.stream_network(image, labels)[0].backward()
        optimizer.step()
    return network.eval()


def compare_training(side: int, steps: int) -> None:
    """Print the Dice of networks that learned from crops and from whole images, by what they see at a time."""
    print("\n| norm | learned from | 128 | 256 | 512 | whole image |\n" + "|---" * 6 + "|")
    image, labels = photograph(side)
    for norm in ("instance", "group"):
        for name, how in ((f"crops of {CROP}", learn), ("the whole left half", learn_whole)):
            network = how(norm, side, steps)
            with torch.no_grad():
                scores = [dice(joined(network, tile, 0, image), labels) for tile in (128, 256, 512)]
                scores.append(dice(wf.stream(network, 256)(image), labels))
            print(f"| {norm} | {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |", flush=True)


def dice(logits: Tensor, labels: Tensor) -> float:
    """Return the Dice of the right half."""
    half = labels.shape[-1] // 2
    found, truth = logits.argmax(1)[..., half:] == 1, labels[..., half:] == 1
    return 2 * int((found & truth).sum()) / int(found.sum() + truth.sum())


def cuts(side: int, tile: int, overlap: int) -> tuple[list[int], list[int]]:
    """Return where tiles begin along an axis, and where what is kept of each begins and ends."""
    starts = [*range(0, side - tile, tile - overlap), side - tile]
    return starts, [0, *((before + tile + after) // 2 for before, after in pairwise(starts)), side]


def joined(network: nn.Module, tile: int, overlap: int, image: Tensor) -> Tensor:
    """Return the logits of tiles that are cropped by half of their overlap, and joined."""
    starts, borders = cuts(image.shape[-1], tile, overlap)
    spans = list(zip(starts, borders, borders[1:]))
    rows = []
    for y, top, bottom in spans:
        row = [
            network(image[..., y : y + tile, x : x + tile])[..., top - y : bottom - y, left - x : right - x]
            for x, left, right in spans
        ]
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def blended(network: nn.Module, tile: int, overlap: float, image: Tensor) -> Tensor:
    """Return the logits of MONAI's sliding window with a Gaussian."""
    from monai.inferers import sliding_window_inference

    found = sliding_window_inference(image, tile, 1, network, overlap=overlap, mode="gaussian")
    assert isinstance(found, Tensor)
    return found


def ways(network: nn.Module, side: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The ways to the logits of a square image of `side` pixels."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": network,
        "streamed": wf.stream(network, (64, side), verify=False),
    }
    for tile in (CROP, 256, 512):
        found[f"tiles of {tile}"] = partial(joined, network, tile, 0)
    for tile in (256, 512):
        found[f"tiles of {tile}, overlap 64"] = partial(joined, network, tile, 64)
        found[f"tiles of {tile}, MONAI: overlap 25%, Gaussian"] = partial(blended, network, tile, 0.25)
    return found


def step_at_seams(error: Tensor, name: str) -> float | None:
    """Return by how much more joined logits change from tile to tile than whole ones; None for those that are not joined."""
    words = name.replace(",", "").split()
    if words[0] != "tiles" or "MONAI" in name:
        return None
    _, borders = cuts(error.shape[-1], int(words[2]), int(words[-1]) if "overlap" in words else 0)
    steps = [(error.select(dim, x) - error.select(dim, x - 1)).abs().flatten() for x in borders[1:-1] for dim in (2, 3)]
    return float(torch.cat(steps).mean())


@torch.no_grad()
def compare(norm: str, network: nn.Module, side: int) -> None:
    """Print a row for each way."""
    image, labels = photograph(side)
    choices = ways(network, side)
    choices["streamed"](image)  # the first call captures the network
    for name, way in choices.items():
        times, maps = [], []
        for each in (network, way):
            begin = time.perf_counter()
            maps.append(each(image))
            times.append(time.perf_counter() - begin)
        exact, found = maps
        error, step = found - exact, step_at_seams(found - exact, name)
        row = [
            f"{float(error.abs().mean() / exact.std()):.1e}",
            f"{float(error.abs().max() / (exact.max() - exact.min())):.1e}",
            "" if step is None else f"{step / float(exact.std()):.1e}",
            f"{float((found.argmax(1) != exact.argmax(1)).double().mean()):.2%}",
            f"{dice(found, labels):.3f}",
            f"{times[1] / times[0]:.1f}",
        ]
        print("|", " | ".join((norm, name, *row)), "|", flush=True)


@torch.no_grad()
def peak(norm: str, name: str, side: int) -> int:
    way, image = ways(unet(norm), side)[name], torch.rand(1, 3, side, side)
    if name == "streamed":
        way(image)
    return peak_of(lambda: way(image))


def draw(networks: dict[str, nn.Module], side: int) -> Figure:
    """A part of the photograph, its whole maps and maps from tiles, and differences by the distance to the border of a tile."""
    image, _ = photograph(side)
    part = slice(0, 640), slice(0, 640)
    figure: Any = Figure((13.5, 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.45, 1))
    axes = upper.subplots(1, 4)
    network = networks["instance"]
    with torch.no_grad():
        choices = ways(network, side)
        shown = {
            "whole image, streamed": choices["streamed"](image),
            "tiles of 256, joined": choices["tiles of 256"](image),
            "tiles of 256, MONAI, Gaussian": choices["tiles of 256, MONAI: overlap 25%, Gaussian"](image),
        }
    axes[0].imshow(image[0, :, *part].permute(1, 2, 0))
    axes[0].set_title("a corner of the photograph")
    for panel, (title, logits) in zip(axes[1:], shown.items(), strict=True):
        panel.imshow(logits.softmax(1)[0, 1, *part], cmap="magma", vmin=0, vmax=1)
        panel.set_title(title)
    for panel in axes:
        panel.set_axis_off()
    upper.suptitle("probability of a vessel, U-Net with instance norm")
    for panel, tile in zip(lower.subplots(1, 2, sharey=True), (256, 512), strict=True):
        for norm, trained in networks.items():
            found = wf.tile_mismatch(trained, image, tile_size=tile)
            places = [max(one.start, 0.5) for one in found.by_distance]
            panel.plot(
                places, [one.mean_difference / found.std for one in found.by_distance], "o-", label=f"{norm} norm"
            )
        panel.set(
            xscale="log",
            yscale="log",
            ylim=(1e-7, 3),
            title=f"tiles of {tile}",
            xlabel="pixels to the border of the tile",
        )
        panel.grid(alpha=0.3)
    lower.axes[0].set_ylabel("mean difference / standard deviation")
    lower.axes[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="of the photograph, at most 1411; a multiple of 16")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tables", nargs="*", default=TABLES, choices=[*TABLES, "training"])
    parser.add_argument("--picture", type=Path, help="a file to draw to")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        norm, name = options.peak.split(": ", 1)
        print(json.dumps(peak(norm, name, options.side)))
        return
    print(f"{options.side} x {options.side} pixels, float32, torch {torch.__version__}, {platform.machine()}\n")
    learned = options.picture or "tiles" in options.tables
    networks = {norm: learn(norm, options.side, options.steps) for norm in NORMS if learned}
    if "tiles" in options.tables:
        print(
            "| norm | | mean / std | max / range | step / std | another class | Dice | seconds / plain |\n"
            + "|---" * 8
            + "|"
        )
        for norm, network in networks.items():
            compare(norm, network, options.side)
    if "training" in options.tables:
        compare_training(options.side, options.steps)
    if options.picture:
        figure = draw(networks, options.side)
        figure.savefig(options.picture, dpi=100, pil_kwargs={"quality": 85, "optimize": True})
    if "memory" in options.tables:
        print("\n| norm | | peak (MiB) | / plain |\n" + "|---" * 4 + "|")
        for norm in ("batch", "instance"):
            plain = 0
            for name in ("plain", "streamed", "tiles of 256", "tiles of 256, MONAI: overlap 25%, Gaussian"):
                size = peak_in_new_process(f"{norm}: {name}")
                plain = plain or size
                print(f"| {norm} | {name} | {size / 2**20:.0f} | {size / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
