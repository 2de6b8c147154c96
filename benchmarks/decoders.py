"""What do tiles change in networks that make images? ESRGAN's network, Swin2SR, and the decoder of diffusers' `AutoencoderKL`.

    uv pip install diffusers transformers
    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/decoders.py [--rows 0 1 2 3 4]

Random weights, float32; narrow networks, so that it takes minutes on a CPU. Tiles are those of the tools that people use: of 128
pixels with 10 more at each side, as Real-ESRGAN crops and joins them, and `enable_tiling()` of diffusers, which blends tiles of
256. Errors are those of the result against plain PyTorch. Seconds are of one run each, interleaved with plain PyTorch; peak
memory is measured in a fresh process for each cell, above the weights and the image (VmHWM). Prints a Markdown table.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import widefield as wf
from widefield.cli.measuring import peak_in_new_process, peak_of

ROWS = [
    ("RRDB", 1024),
    ("RRDB", 2048),
    ("AutoencoderKL", 512),
    ("AutoencoderKL", 1024),
    ("AutoencoderKL", 2048),
    ("Swin2SR", 512),
]
"""Networks, and the height and width of the images that they make."""


class DenseBlock(nn.Module):
    """Five convolutions, each of all maps before (Wang et al., 2018, https://arxiv.org/abs/1809.00219)."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        outputs = [growth] * 4 + [features]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(features + k * growth, out, 3, padding=1) for k, out in enumerate(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for convolution in self.convolutions[:-1]:
            maps.append(F.leaky_relu(convolution(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * self.convolutions[-1](torch.cat(maps, 1))


class RRDB(nn.Module):
    """Residual in residual: three dense blocks."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock(features, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.blocks(x)


class RRDBNet(nn.Module):
    """The generator of ESRGAN, four times as large as its image. The published one has 64 features, 32 of growth and 23 blocks."""

    def __init__(self, features: int = 64, growth: int = 32, blocks: int = 23) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.trunk = nn.Conv2d(features, features, 3, padding=1)
        self.upper = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(features, features, 3, padding=1)
        self.out = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.trunk(self.body(x))
        for convolution in self.upper:
            x = F.leaky_relu(convolution(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.out(F.leaky_relu(self.last(x), 0.2))


class Decoder(nn.Module):
    """From latents to the image, as `AutoencoderKL.decode` computes it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def rrdb() -> nn.Module:
    torch.manual_seed(0)
    return RRDBNet(features=16, growth=8, blocks=3).eval()


def autoencoder() -> nn.Module:
    """Return Stable Diffusion's, an eighth as wide, with one layer per block less."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    make: Any = AutoencoderKL  # its base is not in what mypy sees of diffusers
    return make(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=256,
    ).eval()


def vae_decoder() -> nn.Module:
    return Decoder(autoencoder())


def swin2sr() -> nn.Module:
    """Return a small Swin2SR of transformers, twice as large as its image: SwinIR with the attention of Swin V2."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    class Reconstruction(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).reconstruction

    torch.manual_seed(0)
    config = Swin2SRConfig(embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=8, mlp_ratio=2.0, upscale=2)
    return Reconstruction(Swin2SRForImageSuperResolution(config)).eval()


def padded_tiles(network: nn.Module, tile: int, pad: int, image: Tensor) -> Tensor:
    """Return what Real-ESRGAN's `--tile` gives: tiles with `pad` pixels more at each side, cropped and joined."""
    _, _, height, width = image.shape
    rows = []
    for y in range(0, height, tile):
        row = []
        for x in range(0, width, tile):
            top, left = max(y - pad, 0), max(x - pad, 0)
            given = image[..., top : y + tile + pad, left : x + tile + pad]
            found = network(given)
            n = found.shape[-1] // given.shape[-1]
            y0, x0 = n * (y - top), n * (x - left)
            row.append(found[..., y0 : y0 + n * min(tile, height - y), x0 : x0 + n * min(tile, width - x)])
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def tiled_decode(latents: Tensor) -> Tensor:
    vae: Any = autoencoder()
    vae.enable_tiling()
    return vae.decode(latents).sample


def ways(name: str, side: int) -> tuple[Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """Return the input of an image of `side` pixels, and the ways to this image; plain PyTorch is the first."""
    generator = torch.Generator().manual_seed(0)
    tiles: dict[str, Callable[[Tensor], Tensor]]
    if name == "AutoencoderKL":
        network, given = vae_decoder(), torch.randn(1, 4, side // 8, side // 8, generator=generator)
        tiles = {"enable_tiling()": tiled_decode}
    else:
        network, scale = (rrdb(), 4) if name == "RRDB" else (swin2sr(), 2)
        given = torch.rand(1, 3, side // scale, side // scale, generator=generator)
        pads = (10, 32) if name == "RRDB" else (16, 32)  # Swin2SR takes tiles of whole windows
        tiles = {f"tiles of 128, {pad} pixels more": partial(padded_tiles, network, 128, pad) for pad in pads}
    return given, {"plain": network, "streamed": wf.stream(network, (16, None), verify=False), **tiles}


@torch.no_grad()
def compare(name: str, side: int) -> None:
    """Print a row for each way."""
    given, choices = ways(name, side)
    choices["streamed"](given)  # the first call captures the network
    plain = 0
    for way, compute in choices.items():
        times, images = [], []
        for each in (choices["plain"], compute):
            begin = time.perf_counter()
            images.append(each(given))
            times.append(time.perf_counter() - begin)
        exact, error = images[0], (images[1] - images[0]).abs()
        size = peak_in_new_process(f"{name}: {side}: {way}")
        plain = plain or size
        row = [
            f"{float(error.mean() / exact.std()):.1e}",
            f"{float(error.max() / (exact.max() - exact.min())):.1e}",
            f"{size / 2**20:.0f}",
            f"{size / plain:.2f}",
            f"{times[1] / times[0]:.2f}",
        ]
        print("|", " | ".join((name, f"{side} x {side}", way, *row)), "|", flush=True)


@torch.no_grad()
def peak(name: str, side: int, way: str) -> int:
    given, choices = ways(name, side)
    if way == "streamed":
        choices[way](given)
    return peak_of(lambda: choices[way](given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="numbers of rows, from 0")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        name, side, way = options.peak.split(": ", 2)
        print(json.dumps(peak(name, int(side), way)))
        return
    print(f"random weights, float32, torch {torch.__version__}, {platform.machine()}\n")
    print("| | image | | mean / std | max / range | peak (MiB) | / plain | seconds / plain |\n" + "|---" * 8 + "|")
    for row in options.rows:
        compare(*ROWS[row])


if __name__ == "__main__":
    main()
