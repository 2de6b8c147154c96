"""Models, methods and images so small that a run takes a fraction of a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

import widefield
from widefield.components.target_generators.target_generators import DALLEEncoder
from widefield.pretraining import METHODS
from widefield.registry import arguments_of


class TinyWrapper(nn.Module):
    """Two convolutions and a classifier that pretraining does not reach."""

    def __init__(self, in_channels: int = 3, dim: int = 12, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Conv2d(in_channels, 8, 3, 2, 1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout2d(dropout),
                nn.Conv2d(8, dim, 3, 2, 1),
                nn.Linear(dim, 5),
            )
        self.dim = dim

    def get_model(self) -> nn.Module:
        return self.model

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        return {"features": self.model[:5](x)}

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def feature_dim(self) -> int:
        return self.dim


def timm_vit(seed: int = 0, **options: Any) -> nn.Module:
    """A transformer of 3 layers, patches of 4 pixels of images of 16, with a class token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
        return timm.create_model("vit_tiny_patch16_224", **{**sizes, "dynamic_img_size": True, **options})


def tokenizer() -> DALLEEncoder:
    """A target generator of 24 visual tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DALLEEncoder(n_hid=4, n_blk_per_group=1, vocab_size=24, allow_random_weights=True)


GIVEN: dict[str, Callable[[], Any]] = {
    "teacher": lambda: TinyWrapper(dim=10, seed=1),
    "target_generator": tokenizer,
    "decoder_depth": lambda: 1,
    "decoder_heads": lambda: 2,
}
"""Arguments of methods that must be given, or would make a method large."""


def small(method: str) -> dict[str, Any]:
    """Return arguments that make a method small: widths of 16, and those of `GIVEN`."""
    known = arguments_of(METHODS.get(method)).named
    widths = {name: 16 for name in known if name.endswith("_dim")}
    return widths | {name: make() for name, make in GIVEN.items() if name in known}


def model_for(method: str) -> nn.Module:
    """Return a small model that the method takes."""
    return timm_vit() if METHODS.get(method).needs_transformer else TinyWrapper()


QUIET: dict[str, Any] = {
    "callbacks": {"quality": None, "learning_rate_monitor": None},
    "loggers": {"tensorboard": None},
}
"""Options of a run of which only the losses and weights are looked at."""


def write_images(folder: Path, count: int = 10, side: int = 48) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    picture = data.astronaut()
    for k in range(count):
        Image.fromarray(picture[20 * k : 20 * k + side, 30 * k : 30 * k + side]).save(folder / f"{k:02d}.png")
    return folder


def files(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def train(out: Path, images: Any, method: str = "simclr", **options: Any) -> None:
    """A run of 2 steps an epoch on the CPU, without a progress bar and a report."""
    views = {"image_size": 16, **options.pop("transform_args", {})}
    if METHODS.get(method).transforms.local_view is not None:
        views.setdefault("local_view", {"view_size": 8, "num_views": 2})
    widefield.train(
        out=out,
        data=images,
        model=options.pop("model", None) or model_for(method),
        method=method,
        transform_args=views,
        callbacks={"report": None, **options.pop("callbacks", {})},
        trainer_args={"enable_progress_bar": False, **options.pop("trainer_args", {})},
        **{
            "method_args": small(method),
            "epochs": 1,
            "batch_size": 4,
            "num_workers": 0,
            "accelerator": "cpu",
            **options,
        },
    )


def checkpoint(out: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(out / "checkpoints" / name, weights_only=True)


def exported(out: Path) -> dict[str, Tensor]:
    return torch.load(out / "exported_models" / "exported_last.pt", weights_only=True)


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train_loss"]) for line in metrics(out) if "train_loss" in line]


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for k, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}[{k}]")
    elif isinstance(left, (Tensor, np.ndarray)):
        assert left.shape == right.shape and bool((left == right).all()), path
    else:
        assert left == right, path
