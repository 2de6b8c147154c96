"""What a step of pretraining costs: CPU-seconds here and in LightlyTrain, with the same wrapper, batch and views.

    uv run python benchmarks/pretraining.py [--runs simclr-64 dino-64 simclr-224 dino-224] [--images 64] [--batch 16] [--steps 8]
        [--rounds 3] [--only ours|theirs]

Each run is a process of its own with one thread and no workers, so that its CPU time is that of reading, views, networks and
optimizer. A step is counted from the start of one batch's training to the start of the next; the first two are left out, and the
median is told. Ours and theirs take turns, and of the rounds the median is told again. LightlyTrain is installed from the package
index into an environment of its own by `uv run --with lightly-train`;
what it reports over the network is turned off, and nothing of it is needed to use Widefield. The images are cut from the
pictures of scikit-image, as JPEG files of 256 x 256 pixels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

RUNS: dict[str, tuple[str, int, int | None]] = {
    "simclr-64": ("simclr", 64, None),
    "dino-64": ("dino", 64, 32),
    "simclr-224": ("simclr", 224, None),
    "dino-224": ("dino", 224, 96),
}
"""Method, side of the two global views, side of the six local ones."""

LEFT_OUT = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}


def wrapper() -> Any:
    """The ResNet-18 of the page on custom models."""
    from torch import nn
    from torchvision.models import resnet18

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet18()

        def get_model(self) -> nn.Module:
            return self.model

        def forward_features(self, x: Any) -> dict[str, Any]:
            m = self.model
            x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
            return {"features": m.layer4(m.layer3(m.layer2(m.layer1(x))))}

        def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
            return {"pooled_features": self.model.avgpool(x["features"])}

        def feature_dim(self) -> int:
            return 512

    globals()["Wrapper"] = Wrapper  # theirs pickles it into checkpoints
    Wrapper.__qualname__ = "Wrapper"
    return Wrapper()


def measure(library: str, run: str, images: str, batch: int, steps: int) -> None:
    """Print the CPU-seconds of each step."""
    import torch

    trainer: Any
    torch.set_num_threads(1)
    if library == "ours":
        from lightning.pytorch import Trainer

        import widefield

        trainer = widefield
    else:
        import lightly_train
        from pytorch_lightning import Trainer

        trainer = lightly_train
    starts: list[float] = []
    method, side, local = RUNS[run]
    views: dict[str, Any] = {"image_size": side if library == "ours" else (side, side)}
    if local is not None:
        views["local_view"] = {"view_size": local if library == "ours" else (local, local)}
    fit = Trainer.fit

    def timed(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        step = model.training_step

        def training_step(*inputs: Any, **named: Any) -> Any:
            starts.append(time.process_time())
            return step(*inputs, **named)

        model.training_step = training_step
        return fit(self, model, *args, **kwargs)

    Trainer.fit = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        trainer.pretrain(
            out=Path(folder) / "out",
            data=images,
            model=wrapper(),
            method=method,
            epochs=100,
            batch_size=batch,
            num_workers=0,
            accelerator="cpu",
            precision="32-true",
            optim="sgd",
            transform_args=views,
            trainer_args={"max_steps": steps},
            loggers={"tensorboard": None},
            callbacks={"model_checkpoint": None} if library == "ours" else None,
        )
    print(json.dumps([after - before for before, after in pairwise(starts)][LEFT_OUT:]))


def write_images(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image
    from skimage import data

    random = np.random.default_rng(0)
    pictures = [data.astronaut(), data.immunohistochemistry(), data.hubble_deep_field()]
    for k in range(count):
        picture = pictures[k % len(pictures)]
        y, x = (random.integers(n - 255) for n in picture.shape[:2])
        Image.fromarray(picture[y : y + 256, x : x + 256]).save(folder / f"{k:04d}.jpg", quality=90)


def median(library: str, run: str, images: Path, batch: int, steps: int) -> float:
    """CPU-seconds of a step in a process of its own."""
    script = [str(Path(__file__).resolve()), "--inside", library, run, str(images), str(batch), str(steps)]
    command = [sys.executable, *script]
    if library == "theirs":
        command = ["uv", "run", "--no-project", "--python", "3.11", "--with", "lightly-train", "python", *script]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, cwd="/", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{library} {run}: {done.stderr[-2000:]}")
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["ours", "theirs"])
    parser.add_argument("--inside", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        library, run, images, batch, steps = args.inside
        measure(library, run, images, int(batch), int(steps))
        return
    libraries = [args.only] if args.only else ["ours", "theirs"]
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images)
        print("| run | " + " | ".join(f"{one} (CPU-s a step)" for one in libraries) + " | ours / theirs |")
        print("|---|" + "---|" * (len(libraries) + 1))
        for run in args.runs:
            rounds = [
                [median(one, run, Path(folder), args.batch, args.steps) for one in libraries]
                for _ in range(args.rounds)
            ]
            costs = [statistics.median(of_one) for of_one in zip(*rounds, strict=True)]
            ratio = f"{costs[0] / costs[1]:.2f}" if len(costs) == 2 else ""
            print(f"| {run} | " + " | ".join(f"{cost:.3f}" for cost in costs) + f" | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
