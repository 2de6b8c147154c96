"""Datasets of lazy images, and the batches made of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from widefield.data.labels import LabelledImage
from widefield.images import Alpha, ImageFile, open_image

Batch = tuple[list[ImageFile], Tensor]
"""Lazy images, of any sizes, and their class indices: an integer tensor of shape (N,)."""


class ImageDataset(Dataset[tuple[ImageFile, int]]):
    """Pairs (lazy image, class index). Opening an image reads its header only.

    Args:
        images: What to open.
        level: Level of the pyramid, 0 the largest.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.
    """

    def __init__(self, images: Sequence[LabelledImage], level: int = 0, alpha: Alpha = "drop") -> None:
        self.images = tuple(images)
        self.level = level
        self.alpha = alpha

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[ImageFile, int]:
        image = self.images[index]
        return open_image(image.path, self.level, alpha=self.alpha), image.label

    def __iter__(self) -> Iterator[tuple[ImageFile, int]]:
        return (self[index] for index in range(len(self)))


def collate(pairs: Sequence[tuple[ImageFile, int]]) -> Batch:
    """A batch of the pairs that an `ImageDataset` gives; no pixels are read."""
    return [image for image, _ in pairs], torch.tensor([label for _, label in pairs])


class EpochShuffle(Sampler[int]):
    """A random order that depends on the seed and the epoch alone, so a resumed run sees what an unbroken one sees.

    Lightning calls `set_epoch` before every epoch.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())
