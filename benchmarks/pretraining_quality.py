"""What pretraining is worth: k-nearest-neighbour accuracy of a small network before and after a short run of each method.

    uv run python benchmarks/pretraining_quality.py [--methods simclr byol] [--seeds 3] [--epochs 20] [--light]

The task: from which of ten photographs, of scikit-image and scikit-learn, a patch of 24 x 24 pixels is. Patches are grey, turned
and mirrored, with noise. The network before and after sees the same patches: it is asked for 600 of
the right halves, and 640 of the left halves are known, on which it trains without their labels. Convolutional networks learn by all
methods but those that hide patches, which get a vision transformer; distillation gets a teacher that SimCLR trained.

All patches have one brightness and contrast, because nothing in the views below would hide them: BYOL and DINO, which have no
negatives, learn in a few hundred steps what two views of an image share most plainly. With `--light` every patch has its own, and
that is what they learn.
"""

import argparse
import tempfile
import time
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from skimage import data
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import widefield
from widefield.components.target_generators.target_generators import VQKD
from widefield.pretraining import METHODS, wrap

SIDE, CLASSES, NEIGHBOURS = 24, 10, 5
KNOWN, ASKED = 640, 600
BATCH = 64
NOISE = 0.05

VIEWS: dict[str, Any] = {
    "image_size": SIDE,
    "random_resize": {"min_scale": 0.4},
    "random_flip": {"horizontal_prob": 0.5, "vertical_prob": 0.5},
    "color_jitter": None,
    "random_gray_scale": None,
    "gaussian_blur": None,
    "solarize": None,
    "global_view_1": None,
}
"""Patches have no colour, and one brightness and contrast; blur and solarisation are made for photographs of 224 pixels."""

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
    "densecl": {"method_args": {**HEAD, "momentum": 0.95, "queue_size": 256}},
    "lejepa": {"method_args": {"hidden_dim": 256, "output_dim": 32, "directions": 256}, "transform_args": LOCAL},
    "dino": {
        "method_args": {"hidden_dim": 256, "bottleneck_dim": 64, "output_dim": 256, "batch_norm": True},
        "transform_args": LOCAL,
    },
    **{
        name: {
            "rate": rate,
            "class_token": True,
            "method_args": {
                "hidden_dim": 256,
                "bottleneck_dim": 64,
                "output_dim": 256,
                "teacher_temp": 0.02,  # DINO's for few images
            },
            "transform_args": LOCAL,
        }
        for name, rate in (("dinov2", 2e-3), ("dinov3", 1e-3))
    },
    "mae": {"rate": 2e-3, "method_args": {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4}},
    "maskfeat": {"rate": 2e-3, "method_args": {"cell": 4}},
    "beit": {"rate": 1e-3, "class_token": True},
}
"""For runs of some hundred steps of 64 images, where the methods' own settings are for a hundred thousand of some thousand.

`rate` is the learning rate of the optimizer, AdamW; convolutional networks get `RATE`. What stands for an image is the class token
of a transformer where the method trains it (`class_token`), else the mean of its patches.
"""
RATE = 4e-3


def network(seed: int, method: str = "simclr") -> nn.Module:
    """A wrapper of 128 (or 64) channels, for patches of 24 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind: Any = METHODS.get(method)
        if not kind.needs_transformer:
            return Convolutions()
        sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 0}
        token = SETTINGS.get(method, {}).get("class_token", False)
        pooling = {} if token else {"class_token": False, "global_pool": "avg"}
        return wrap(timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes, **pooling))


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


@cache
def photographs() -> list[Tensor]:
    """Ten grey pictures (H, W), each from 0 to 1."""
    shipped = (data.brick, data.grass, data.gravel, data.coins, data.text, data.immunohistochemistry)
    arrays = [load() for load in (*shipped, data.hubble_deep_field, data.chelsea)]
    arrays += [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    grey = [array if array.ndim == 2 else array.mean(-1) for array in arrays]
    return [torch.tensor(array, dtype=torch.float32) / 255 for array in grey]


def patches(known: bool, seed: int, light: bool = False) -> tuple[Tensor, Tensor]:
    """Patches (N, 3, 24, 24) uint8 and the numbers of their photographs, of the left halves if they are known, or the right.

    With `light`, brightness and contrast are drawn for each.
    """
    random = torch.Generator().manual_seed(2 * seed + known)

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=random))

    numbers, images = torch.arange(KNOWN if known else ASKED) % CLASSES, []
    for number in numbers.tolist():
        whole = photographs()[number]
        left, right = whole.tensor_split(2, dim=1)
        half = left if known else right
        y, x = below(half.shape[0] - SIDE + 1), below(half.shape[1] - SIDE + 1)
        patch = half[y : y + SIDE, x : x + SIDE].rot90(below(4))
        patch = patch.flip(1) if below(2) else patch
        brightness, contrast = torch.rand(2, generator=random).tolist() if light else (0.5, 0.5)
        patch = (patch - patch.mean()) / (patch.std() + 0.02)
        images.append(0.3 + 0.4 * brightness + (0.1 + 0.2 * contrast) * patch)
    batch = torch.stack(images)[:, None]
    batch = (batch + NOISE * torch.randn(batch.shape, generator=random)).clamp(0, 1)
    return (batch * 255).round().byte().expand(-1, 3, -1, -1).contiguous(), numbers


def tokenizer(seed: int, images: Tensor) -> nn.Module:
    """What BEiT predicts: which of 64 patches of the known images is most like a patch, as a random transformer sees them.

    Trained tokenizers, as in the papers, are files of hundreds of megabytes, for photographs of 224 pixels.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        arch = {"embed_dims": 64, "num_layers": 1, "num_heads": 4, "feedforward_channels": 128}
        encoder = {
            "type": "VisionTransformer",
            "arch": arch,
            "img_size": SIDE,
            "patch_size": 4,
            "out_type": "featmap",
        }
        made = VQKD(encoder, num_embed=64, embed_dims=32, allow_random_weights=True).eval()
        chosen = images[torch.randperm(len(images))[:64]] / 127.5 - 1
        with torch.no_grad():
            seen = made.encode_task_layer(made.encoder(chosen)[-1].flatten(2).transpose(1, 2))
            made.quantize.embedding.weight.copy_(seen[:, int(torch.randint(seen.shape[1], ()))])
    return made


@torch.no_grad()
def accuracy(wrapper: Any, known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    """Share of patches whose nearest neighbours, by cosine, are mostly of their photograph; weights are exp(cosine / 0.07)."""
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
    settings = SETTINGS.get(method, {})
    method_args = settings.get("method_args", {})
    if method == "distillation":
        teacher = network(seed + 100)
        train("simclr", seed, images, epochs, teacher)
        method_args = {"teacher": teacher}
    elif method == "beit":
        method_args = {"target_generator": tokenizer(seed, images)}
    kind: Any = METHODS.get(method)
    views = {**VIEWS, **settings.get("transform_args", {})}
    if kind.transforms.global_view_1 is None:
        del views["global_view_1"]
    lr = settings.get("rate", RATE) / kind.optim.scaled(1.0, BATCH)
    with tempfile.TemporaryDirectory() as folder:
        widefield.train(
            out=Path(folder) / "out",
            data=Images(images),
            model=wrapper,
            method=method,
            epochs=epochs,
            batch_size=BATCH,
            num_workers=0,
            accelerator="cpu",
            seed=seed,
            method_args=method_args,
            transform_args=views,
            optim="adamw",
            optim_args={"lr": lr, "weight_decay": 1e-4},
            loggers={"tensorboard": None, "jsonl": None},
            callbacks={"model_export": {"every_n_epochs": epochs}},
            trainer_args={"enable_progress_bar": False},
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


def measure(method: str, seed: int, epochs: int, light: bool = False) -> dict[str, Any]:
    """Accuracies before and after."""
    known, questions = patches(True, seed, light), patches(False, seed, light)
    wrapper = network(seed, method)
    before, start = accuracy(wrapper, known, questions), time.process_time()
    train(method, seed, known[0], epochs, wrapper)
    after = accuracy(wrapper, known, questions)
    return {"method": method, "seed": seed, "before": before, "after": after, "cpu_s": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS.index), default=list(METHODS.index))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--light", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | untrained | trained | gain (points) | CPU-seconds a run |\n|---|---|---|---|---|")
    for method in args.methods:
        rows = [
            measure(method, seed, args.epochs, args.light)
            for seed in range(args.first_seed, args.first_seed + args.seeds)
        ]
        before, after, seconds = (np.mean([row[key] for row in rows]) for key in ("before", "after", "cpu_s"))
        gains = ", ".join(f"{100 * (row['after'] - row['before']):+.1f}" for row in rows)
        print(
            f"| {method} | {before:.3f} | {after:.3f} | {100 * (after - before):+.1f} ({gains}) | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
