"""Encoder and head end to end, against a head on a frozen encoder, where the encoder was not made for what the label hangs on.

    uv run python benchmarks/end_to_end.py --seeds 10 11 12

The task: a slide of 4 x 6 patches of 32 x 32 pixels from ten photographs of scikit-image and scikit-learn, with noise. In every
patch lie two red and two blue discs, in pairs that touch. In ordinary patches red touches red and blue touches blue. In half of the
slides there are six patches in which each pair is red and blue, and the label says whether there are. So both classes have the same
photographs, the same discs, and the same number of pairs: what differs is which touches which. Slides for training and for testing
are cut from the left and the right halves of the photographs.

The encoder is four convolutions. It begins at random, or as SimCLR left it that trained on patches of the training slides without
their labels. Then train

    head alone  gated attention, on the encoder's maps, whose channels have mean 0 and deviation 1: 15 epochs at each of three
                learning rates, of which the best epoch of the best rate on the test slides counts
    end to end  both, through `widefield.stream`: one learning rate, the last of 12 epochs

It shows whether gradients through the encoder find what the label needs and the encoder lacks. It does not show how much that is on
real slides: foundation models see more than a small network does, discs are no cells, and labels hang on other things.
"""

import argparse
import copy
import math
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining_quality import HEAD, VIEWS, Images
from skimage import data
from sklearn.datasets import load_sample_image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

import widefield as wf
from widefield.components import GatedAttentionPooling
from widefield.models.patch_encoder import PatchEncoder
from widefield.pretraining import METHODS

SIDE, ROWS, COLUMNS, MARKED = 32, 4, 6, 6
TRAIN, TEST, CHANNELS, BATCH = 400, 200, 64, 8
NOISE, RADIUS, OPAQUE = 0.02, 2.5, 0.7
COLOURS = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.2, 0.8]])
RATES, FROZEN_EPOCHS = (1e-3, 3e-3, 1e-2), 15
RATE, EPOCHS = 3e-3, 12
UNLABELLED, STEPS = 3200, 200


@cache
def photographs() -> list[Tensor]:
    """Pictures (3, H, W) from 0 to 1."""
    names = ("immunohistochemistry", "brick", "grass", "gravel", "coffee", "astronaut", "camera", "coins")
    pictures = [np.asarray(getattr(data, name)(), dtype=np.float32) for name in names]
    pictures += [load_sample_image(name).astype(np.float32) for name in ("china.jpg", "flower.jpg")]
    coloured = [p if p.ndim == 3 else np.repeat(p[..., None], 3, 2) for p in pictures]
    return [torch.from_numpy(p).permute(2, 0, 1).contiguous() / 255 for p in coloured]


def patch(generator: torch.Generator, mixed: bool, right: bool) -> Tensor:
    """A patch (3, SIDE, SIDE) of a half of a photograph, with its discs and noise."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    picture = photographs()[int(torch.randint(len(photographs()), (), generator=generator))]
    half = picture.shape[2] // 2
    y = int(torch.randint(picture.shape[1] - SIDE, (), generator=generator))
    x = int(torch.randint(half - SIDE, (), generator=generator)) + right * half
    made = picture[:, y : y + SIDE, x : x + SIDE]
    rows, cols = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for above, kinds in ((True, (0, 1 if mixed else 0)), (False, (0 if mixed else 1, 1))):
        centre = (between(4, 12) if above else between(SIDE - 12, SIDE - 4)), between(4, SIDE - 4)
        angle = between(0, 2 * math.pi)
        for sign, kind in zip((1, -1), kinds, strict=True):
            at = centre[0] + sign * RADIUS * math.sin(angle), centre[1] + sign * RADIUS * math.cos(angle)
            distance = ((rows - at[0]) ** 2 + (cols - at[1]) ** 2).sqrt()
            share = OPAQUE * (RADIUS + 0.5 - distance).clamp(0, 1)
            made = made * (1 - share) + COLOURS[kind][:, None, None] * share
    return made + NOISE * torch.randn(made.shape, generator=generator)


def slides(count: int, seed: int, right: bool) -> tuple[Tensor, Tensor]:
    """Slides (count, 3, H, W) and their labels."""
    generator = torch.Generator().manual_seed(seed)
    made, labels = [], torch.arange(count) % 2
    for label in labels.tolist():
        marked = set(torch.randperm(ROWS * COLUMNS, generator=generator)[: MARKED * label].tolist())
        patches = [patch(generator, k in marked, right) for k in range(ROWS * COLUMNS)]
        made.append(torch.cat([torch.cat(patches[k : k + COLUMNS], 2) for k in range(0, len(patches), COLUMNS)], 1))
    return torch.stack(made), labels


def encoder() -> nn.Sequential:
    """Four convolutions, untrained."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, CHANNELS)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Wrapper(nn.Module):
    """The encoder as `widefield.train` takes it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def get_model(self) -> nn.Module:
        return self.net

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        return {"features": self.net(x)[:, :, None, None]}

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        return {"pooled_features": x["features"]}

    def feature_dim(self) -> int:
        return CHANNELS


def pretrained(net: nn.Module, patches: Tensor, seed: int) -> nn.Module:
    """A copy of the encoder after SimCLR on patches (N, 3, SIDE, SIDE) without labels."""
    net, epochs = copy.deepcopy(net), STEPS * 64 // len(patches)
    views = {**VIEWS, "image_size": SIDE, "normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    del views["global_view_1"]
    kind: Any = METHODS.get("simclr")
    with tempfile.TemporaryDirectory() as folder:
        wf.train(
            out=Path(folder) / "out",
            data=Images((patches.clamp(0, 1) * 255).round().byte()),
            model=Wrapper(net),
            method="simclr",
            epochs=epochs,
            batch_size=64,
            num_workers=0,
            accelerator="cpu",
            seed=seed,
            method_args={**HEAD, "temperature": 0.2},
            transform_args=views,
            optim="adamw",
            optim_args={"lr": RATE / kind.optim.scaled(1.0, 64), "weight_decay": 1e-4},
            loggers={"tensorboard": None, "jsonl": None},
            callbacks={"model_export": {"every_n_epochs": epochs}},
            trainer_args={"enable_progress_bar": False},
        )
        net.load_state_dict(torch.load(Path(folder) / "out/exported_models/exported_last.pt", weights_only=True))
    return net


def auc(logits: Tensor, labels: Tensor) -> float:
    return float(roc_auc_score(labels.numpy(), logits.softmax(1)[:, 1].numpy()))


def fitted(model: Any, inputs: Tensor, labels: Tensor, rate: float, epochs: int, after_epoch: Any) -> None:
    """Train what requires grad in `model`, by AdamW and one cycle of the learning rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(inputs) // BATCH) + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for group in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[group]), labels[group]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            after_epoch()


def frozen(net: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> float:
    """The best AUC on the test slides after any epoch at any rate, of a head on maps of the encoder."""
    with torch.no_grad():
        known, asked = (encoder_of(net)(images) for images, _ in (train, test))
    mean, deviation = known.mean((0, 2, 3), keepdim=True), known.std((0, 2, 3), keepdim=True)
    known, asked = ((maps - mean) / deviation for maps in (known, asked))
    found: list[float] = []
    for rate in RATES:
        torch.manual_seed(seed)
        head = GatedAttentionPooling(CHANNELS, 2, 32)
        fitted(head, known, train[1], rate, FROZEN_EPOCHS, lambda head=head: found.append(auc(head(asked), test[1])))
    return max(found)


def encoder_of(net: nn.Module) -> PatchEncoder:
    return PatchEncoder(copy.deepcopy(net), SIDE, mean=(0.5,) * 3, std=(0.25,) * 3)


def streamed(net: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int) -> float:
    """AUC on the test slides after the last epoch, of an encoder that trains with its head."""
    torch.manual_seed(seed)
    network = nn.Sequential(encoder_of(net), GatedAttentionPooling(CHANNELS, 2, 32))
    model = wf.stream(network, tile_size=(SIDE * ROWS, SIDE * COLUMNS), verify=False)
    fitted(model, *train, RATE, EPOCHS, lambda: None)
    with torch.no_grad():
        return auc(model(test[0]), test[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    print("| encoder | seed | trains | AUC | CPU-seconds |\n|---|---|---|---|---|", flush=True)
    for seed in seeds:
        train, test = slides(TRAIN, seed, right=False), slides(TEST, 500 + seed, right=True)
        torch.manual_seed(seed)
        net = encoder()
        patches = train[0].unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        chosen = patches[torch.randperm(len(patches))[:UNLABELLED]]
        for name in ("random", "SimCLR"):
            start = net if name == "random" else pretrained(net, chosen, seed)
            for how, trained in (("head alone", frozen), ("end to end", streamed)):
                begin = time.process_time()
                score = trained(start, train, test, seed)
                found.setdefault(f"| {name} | mean | {how} |", []).append(score)
                print(f"| {name} | {seed} | {how} | {score:.3f} | {time.process_time() - begin:.0f} |", flush=True)
    for row, scores in found.items():
        print(f"{row} {np.mean(scores):.3f} | |")


if __name__ == "__main__":
    main()
