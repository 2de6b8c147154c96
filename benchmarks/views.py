"""What the two views of SimCLR cost: CPU-milliseconds an image, by our transforms (torchvision's functions) and by kornia's.

    uv run --with kornia python benchmarks/views.py

The same crops, flips, colours, grey values and blur with the same probabilities, from images of 256 x 256 pixels, uint8. kornia
works on batches of 32 float images; ours on one image at a time, as workers read it. One thread, interleaved, medians of rounds.
"""

import statistics
import time
from dataclasses import replace
from random import Random

import kornia.augmentation as K
import torch
from kornia import __version__ as kornia_version
from torch import nn

from widefield.pretraining.methods.simclr import SimCLR
from widefield.pretraining.views import Views, to_unit

BATCH, ROUNDS = 32, 7


def kornia_view(side: int) -> nn.Module:
    """The view of SimCLR's defaults, with kornia."""
    args = SimCLR.transforms
    resize, flip, jitter, blur = args.random_resize, args.random_flip, args.color_jitter, args.gaussian_blur
    assert resize is not None and flip is not None and jitter is not None and blur is not None
    assert args.random_gray_scale is not None
    strengths = (jitter.strength * v for v in (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue))
    return nn.Sequential(
        K.RandomResizedCrop(
            (side, side),
            (resize.min_scale, resize.max_scale),
            (resize.min_ratio, resize.max_ratio),
            cropping_mode="slice",
        ),
        K.RandomHorizontalFlip(p=flip.horizontal_prob),
        K.ColorJitter(*strengths, p=jitter.prob),
        K.RandomGrayscale(p=args.random_gray_scale),
        K.RandomGaussianBlur((side // 20 * 2 + 1,) * 2, blur.sigmas, p=blur.prob),
    )


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    print(f"torch {torch.__version__}, kornia {kornia_version}\n")
    print("| view | Widefield (CPU-ms) | kornia (CPU-ms) | Widefield / kornia |\n|---|---|---|---|")
    for side in (64, 224):
        views, other, random = Views(replace(SimCLR.transforms, image_size=side)), kornia_view(side), Random(0)
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            start = time.process_time()
            made = [torch.stack(pair) for pair in zip(*(views(image, random) for image in images), strict=True)]
            [to_unit(view, None) for view in made]
            between = time.process_time()
            unit = images / 255
            [other(unit) for _ in range(2)]
            times[0].append(between - start)
            times[1].append(time.process_time() - between)
        ours, theirs = (1e3 * statistics.median(one) / BATCH for one in times)
        print(f"| {side} x {side} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
