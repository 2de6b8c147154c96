"""Encoder and head end to end, against a head on a frozen encoder, where the encoder was not made for what the label hangs on.

    uv run python benchmarks/end_to_end.py [--seeds 3] [--epochs 5]

The task: a slide of 4 x 6 patches of 32 x 32 pixels from ten photographs of scikit-image and scikit-learn, grey, with noise. In
half of the slides, six of the patches have a mark: a grid of dots that are brighter and darker by turns, which leaves the mean of
the patch as it is. The label says whether there are marks. Slides for training and for testing are cut from the left and the right
halves of the photographs.

The encoder is four convolutions. A generic one has learnt from which photograph a patch is, without any mark; a random one nothing.
Either is frozen, so that gated attention pooling trains alone on its map, or trains with it through `widefield.stream`. Each pair
gets the same slides and epochs; the frozen one the best of three learning rates, on the test slides.

It shows whether gradients through the encoder find what the label needs and the encoder lacks. It does not show how much that is on
real slides: foundation models see more than four convolutions do, and labels hang on other things.
"""

import argparse
import copy
from functools import cache

import numpy as np
import torch
from skimage import data
from sklearn.datasets import load_sample_image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import widefield as wf
from widefield.components import GatedAttentionPooling
from widefield.models.patch_encoder import PatchEncoder

SIDE, ROWS, COLUMNS, MARKED = 32, 4, 6, 6
TRAIN, TEST, CHANNELS = 600, 200, 64
NOISE, MARK = 0.02, 1 / 8
RATES = (1e-3, 3e-3, 1e-2)


@cache
def photographs() -> list[Tensor]:
    """Grey pictures from 0 to 1."""
    names = ("immunohistochemistry", "brick", "grass", "gravel", "coffee", "astronaut", "camera", "coins")
    pictures = [np.asarray(getattr(data, name)(), dtype=np.float32) for name in names]
    pictures += [load_sample_image(name).astype(np.float32) for name in ("china.jpg", "flower.jpg")]
    return [torch.from_numpy(p.mean(2) if p.ndim == 3 else p) / 255 for p in pictures]


def patch(generator: torch.Generator, source: int, right: bool) -> Tensor:
    """A patch of a half of a photograph, with noise."""
    picture = photographs()[source]
    half = picture.shape[1] // 2
    y = int(torch.randint(picture.shape[0] - SIDE, (), generator=generator))
    x = int(torch.randint(half - SIDE, (), generator=generator)) + right * half
    return picture[y : y + SIDE, x : x + SIDE] + NOISE * torch.randn(SIDE, SIDE, generator=generator)


def dots(generator: torch.Generator) -> Tensor:
    """The mark, moved by up to four pixels."""
    mark = torch.zeros(SIDE, SIDE)
    mark[::4, ::4], mark[2::4, 2::4] = MARK, -MARK
    return mark.roll(torch.randint(4, (2,), generator=generator).tolist(), (0, 1))


def slides(count: int, seed: int, right: bool) -> tuple[Tensor, Tensor]:
    """Slides (count, 1, H, W) and their labels."""
    generator = torch.Generator().manual_seed(seed)
    made, labels = [], torch.arange(count) % 2
    for label in labels.tolist():
        sources = torch.randint(len(photographs()), (ROWS * COLUMNS,), generator=generator).tolist()
        patches = [patch(generator, source, right) for source in sources]
        for k in torch.randperm(len(patches), generator=generator)[: MARKED * label].tolist():
            patches[k] = patches[k] + dots(generator)
        rows = [torch.cat(patches[k : k + COLUMNS], 1) for k in range(0, len(patches), COLUMNS)]
        made.append(torch.cat(rows)[None])
    return torch.stack(made), labels


def network() -> nn.Sequential:
    """The encoder, untrained."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64), (64, CHANNELS)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def generic(seed: int, steps: int = 400) -> tuple[nn.Sequential, float]:
    """An encoder that knows the photographs, and how often it is right about patches of the other halves."""
    torch.manual_seed(seed)
    net, head = network(), nn.Linear(CHANNELS, len(photographs()))
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=3e-3)

    def batch(right: bool, count: int) -> tuple[Tensor, Tensor]:
        sources = torch.randint(len(photographs()), (count,), generator=generator)
        return torch.stack([patch(generator, source, right)[None] for source in sources.tolist()]), sources

    for _ in range(steps):
        patches, sources = batch(False, 64)
        optimizer.zero_grad()
        F.cross_entropy(head(net(patches)), sources).backward()
        optimizer.step()
    patches, sources = batch(True, 500)
    with torch.no_grad():
        return net, float((head(net(patches)).argmax(1) == sources).float().mean())


def run(net: nn.Module, frozen: bool, rate: float, seed: int, epochs: int) -> float:
    """AUC on slides of the right halves, after training on those of the left halves."""
    torch.manual_seed(seed)
    encoder = PatchEncoder(copy.deepcopy(net), SIDE).requires_grad_(not frozen)
    head = GatedAttentionPooling(CHANNELS, 2, 32)
    model = wf.stream(nn.Sequential(encoder, head), tile_size=(SIDE * ROWS, SIDE * COLUMNS), verify=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    images, labels = slides(TRAIN, seed, right=False)
    with torch.no_grad():
        maps = encoder(images) if frozen else None
    for _ in range(epochs):
        for group in torch.randperm(TRAIN).split(4):
            optimizer.zero_grad()
            logits = model(images[group]) if maps is None else head(maps[group])
            F.cross_entropy(logits, labels[group]).backward()
            optimizer.step()
    images, labels = slides(TEST, 500 + seed, right=True)
    with torch.no_grad():
        scores = model(images).softmax(1)[:, 1]
    return float(roc_auc_score(labels.numpy(), scores.numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| encoder | seed | frozen (best of three rates) | end to end |\n|---|---|---|---|")
    for seed in range(arguments.seeds):
        net, accuracy = generic(seed)
        torch.manual_seed(seed)
        for name, start in ((f"generic, right about {accuracy:.2f} of patches", net), ("random", network())):
            frozen = max(run(start, True, rate, seed, arguments.epochs) for rate in RATES)
            trained = run(start, False, RATES[0], seed, arguments.epochs)
            print(f"| {name} | {seed} | {frozen:.3f} | {trained:.3f} |", flush=True)


if __name__ == "__main__":
    main()
