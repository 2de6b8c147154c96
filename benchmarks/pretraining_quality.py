"""What pretraining is worth: k-nearest-neighbour accuracy of a small network before and after a short run of each method.

    uv run python benchmarks/pretraining_quality.py [--methods simclr byol] [--seeds 3] [--epochs 32]

The task: scikit-learn's digits, turned by up to 29 degrees, moved, scaled, with brightness and contrast of their own and noise, on
24 x 24 pixels. The network before and after sees the same digits: it is asked for 600, and 640 are known, on which it trains
without their labels. Convolutional networks learn by all methods but those that hide patches, which get a vision transformer;
distillation gets a teacher that SimCLR trained.
"""

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import widefield
from widefield.pretraining import METHODS, wrap

SIDE, CLASSES, NEIGHBOURS = 24, 10, 5
KNOWN, ASKED = 640, 600
TRANSFORMER = ("dinov2", "mae", "maskfeat")

VIEWS: dict[str, Any] = {
    "image_size": SIDE,
    "random_resize": {"min_scale": 0.4},
    "random_flip": None,
    "random_rotation": {"prob": 0.7, "degrees": 25},
    "color_jitter": {"prob": 0.8, "strength": 1, "brightness": 0.4, "contrast": 0.5, "saturation": 0, "hue": 0},
    "random_gray_scale": None,
    "gaussian_blur": None,
    "global_view_1": None,
}
"""Digits are grey, and a mirrored one is none; blur and solarisation are made for photographs of 224 pixels."""

PLAIN_VIEWS = {"image_size": SIDE, "random_flip": None, "random_resize": {"min_scale": 0.5}}
LOCAL = {
    "local_view": {
        "num_views": 2,
        "view_size": 16,
        "random_resize": {"min_scale": 0.25, "max_scale": 0.5},
        "gaussian_blur": None,
    }
}
HEAD = {"hidden_dim": 256, "output_dim": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": {"method_args": {**HEAD, "temperature": 0.2}},
    "moco": {"method_args": {**HEAD, "momentum": 0.95, "queue_size": 256}},
    "byol": {"method_args": {**HEAD, "momentum": 0.95}},
    "barlowtwins": {"method_args": {"hidden_dim": 256, "output_dim": 256}},
    "vicreg": {"method_args": {"hidden_dim": 256, "output_dim": 256}},
    "densecl": {"method_args": {**HEAD, "momentum": 0.95}},
    "lejepa": {"method_args": {"hidden_dim": 256, "output_dim": 32, "directions": 256}, "transform_args": LOCAL},
    "dino": {
        "method_args": {"hidden_dim": 256, "bottleneck_dim": 64, "output_dim": 256, "batch_norm": True},
        "transform_args": LOCAL,
    },
    "dinov2": {
        "method_args": {"hidden_dim": 256, "bottleneck_dim": 64, "output_dim": 256},
        "transform_args": LOCAL,
    },
    "mae": {
        "method_args": {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4},
        "transform_args": PLAIN_VIEWS,
    },
    "maskfeat": {"transform_args": PLAIN_VIEWS},
    "distillation": {},
}
"""For runs of some hundred steps of 64 images, where the methods' own settings are for a hundred thousand of some thousand."""


def network(seed: int, transformer: bool = False) -> nn.Module:
    """A wrapper of 128 (or 64) channels, on digits of 24 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if transformer:
            import timm

            sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 0}
            return wrap(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes))
        return Convolutions()


class Convolutions(nn.Module):
    """Four convolutions with batch norm, of which three halve the map, and the mean of the last."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2 if k < 3 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for k, (a, b) in enumerate(pairwise(widths))
            )
        )

    def get_model(self) -> nn.Module:
        return self.layers

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        return {"features": self.layers(x)}

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def feature_dim(self) -> int:
        return 128


def digits(known: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Digits (N, 3, 24, 24) uint8 and what they are: those that are known, or the others."""
    source = load_digits()
    order = np.random.default_rng(seed).permutation(len(source.target))
    chosen = order[:KNOWN] if known else order[KNOWN : KNOWN + ASKED]
    random = torch.Generator().manual_seed(2 * seed + known)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    count = len(chosen)
    angle, scale, shift = uniform(count) - 0.5, 1.3 + 0.5 * uniform(count), 0.7 * uniform(count, 2) - 0.35
    cos, sin = scale * angle.cos(), scale * angle.sin()
    turned = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(turned, [count, 1, SIDE, SIDE], align_corners=False)
    images = F.grid_sample(torch.from_numpy(source.images[chosen]).float()[:, None] / 16, grid, align_corners=False)
    low = 0.4 * uniform(count, 1, 1, 1)
    images = low + (0.3 + (0.7 - low) * uniform(count, 1, 1, 1)) * images
    images = (images + 0.08 * torch.randn(images.shape, generator=random)).clamp(0, 1)
    return (images * 255).round().byte().expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(source.target[chosen])


@torch.no_grad()
def accuracy(wrapper: Any, known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    """Share of digits whose nearest neighbours, by cosine, are mostly the same digit; weights are exp(cosine / 0.07)."""
    wrapper.eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def vectors(images: Tensor) -> Tensor:
        unit = (images / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return F.normalize(wrapper.forward_pool(wrapper.forward_features(unit))["pooled_features"].flatten(1))

    cosines, places = (vectors(asked[0]) @ vectors(known[0]).T).topk(NEIGHBOURS)
    votes = F.one_hot(known[1][places], CLASSES) * (cosines / 0.07).exp()[..., None]
    wrapper.train()
    return float((votes.sum(1).argmax(1) == asked[1]).float().mean())


def train(method: str, seed: int, images: Tensor, epochs: int, wrapper: Any) -> None:
    """Train `wrapper` on `images` with the settings above."""
    settings = {key: dict(value) for key, value in SETTINGS[method].items()}
    if method == "distillation":
        teacher = network(seed + 100)
        train("simclr", seed, images, epochs, teacher)
        settings["method_args"] = {"teacher": teacher}
    views = PLAIN_VIEWS if method in ("mae", "maskfeat") else {**VIEWS, **settings.pop("transform_args", {})}
    settings.pop("transform_args", None)
    if METHODS.get(method).transforms.global_view_1 is None:
        views = {key: value for key, value in views.items() if key != "global_view_1"}
    with tempfile.TemporaryDirectory() as folder:
        widefield.train(
            out=Path(folder) / "out",
            data=Images(images),
            model=wrapper,
            method=method,
            epochs=epochs,
            batch_size=64,
            num_workers=0,
            accelerator="cpu",
            seed=seed,
            transform_args=views,
            loggers={"tensorboard": None, "jsonl": None},
            callbacks={"model_export": {"every_n_epochs": epochs}},
            trainer_args={"enable_progress_bar": False},
            **{"optim": "adamw", "optim_args": {"lr": 1.6e-2, "weight_decay": 1e-4}, **settings},
        )
        state = torch.load(Path(folder) / "out/exported_models/exported_last.pt", weights_only=True)
    wrapper.get_model().load_state_dict(state)


class Images(torch.utils.data.Dataset):
    """Images without labels."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> Tensor:
        return self.images[k]


def measure(method: str, seed: int, epochs: int) -> dict[str, Any]:
    """Accuracies before and after."""
    known, questions = digits(True, seed), digits(False, seed)
    wrapper = network(seed, method in TRANSFORMER)
    before, start = accuracy(wrapper, known, questions), time.process_time()
    train(method, seed, known[0], epochs, wrapper)
    after = accuracy(wrapper, known, questions)
    return {"method": method, "seed": seed, "before": before, "after": after, "cpu_s": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | untrained | trained | gain (points) | CPU-seconds a run |\n|---|---|---|---|---|")
    for method in args.methods:
        rows = [measure(method, seed, args.epochs) for seed in range(args.seeds)]
        before, after, seconds = (np.mean([row[key] for row in rows]) for key in ("before", "after", "cpu_s"))
        gains = ", ".join(f"{100 * (row['after'] - row['before']):+.1f}" for row in rows)
        print(
            f"| {method} | {before:.3f} | {after:.3f} | {100 * (after - before):+.1f} ({gains}) | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
