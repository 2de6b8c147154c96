"""Views of images, drawn in worker processes: what is drawn depends on the seed, the epoch and the number of the image alone."""

import random as python_random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from widefield.images import ImageReadError
from widefield.pretraining.changes import Changes, change
from widefield.pretraining.source import ImageSource
from widefield.pretraining.transform_args import Normalize
from widefield.pretraining.views import Views, to_unit

OnBadImage = Literal["skip", "raise"]
TRIES = 64
"""Images that are tried in the place of a bad one, before it is concluded that the data is at fault."""


class Index(NamedTuple):
    """An image of an epoch."""

    epoch: int
    image: int


class BadImage(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


class Sample(NamedTuple):
    """The views of one image, what is still to be done to each, and the images that had to be skipped for it."""

    name: str
    views: list[Tensor]
    changes: list[Changes]
    bad: list[BadImage]


class Batch(NamedTuple):
    """Views, each (N, C, height, width): uint8, or float32 from 0 to 1; names of the images; images that were skipped.

    `changes` are still to be done, see `finished`: for each of the views one for each image.
    """

    views: list[Tensor]
    changes: list[list[Changes]]
    names: list[str]
    bad: list[BadImage]

    def finished(self) -> list[Tensor]:
        """The views with their changes."""
        return [change(view, changes) for view, changes in zip(self.views, self.changes, strict=True)]


class NoReadableImageError(ImageReadError):
    """So many images in a row cannot be read that something is wrong with all of them."""


@dataclass(frozen=True)
class ViewDataset(Dataset[Sample]):
    """The views of the images of `source`.

    An image that cannot be read is replaced by another, so that batches stay full, or is an error (`on_bad_image="raise"`).
    With `deferred`, what needs floats is drawn, but left to who has the batch, on a GPU for example.
    """

    source: ImageSource
    views: Views
    seed: int
    on_bad_image: OnBadImage = "skip"
    deferred: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Index) -> Sample:
        name, pixels, bad, random = self.image(index)
        if self.deferred:
            return Sample(name, *self.views.unchanged(pixels, random), bad)
        views = self.views(pixels, random)
        return Sample(name, views, [Changes()] * len(views), bad)

    def image(self, index: Index) -> tuple[str, Tensor, list[BadImage], Random]:
        """Return what views of `index` are drawn from: name and pixels (C, H, W), the bad images before it, a generator.

        Raises:
            ImageReadError: The image is bad, with `on_bad_image="raise"`, or too many in its place are.
        """
        bad: list[BadImage] = []
        for attempt in range(min(TRIES, len(self))):
            words = np.random.SeedSequence([self.seed, *index, attempt]).generate_state(4)
            random = Random(words[:2].tobytes())
            image = index.image if attempt == 0 else random.randrange(len(self))
            name = self.source.name(image)
            try:
                with seeded(int(words[2]), int(words[3])):
                    pixels = self.source.read(image, random)
            except OSError as error:
                if self.on_bad_image == "raise":
                    raise
                bad.append(BadImage(name, str(error)))
                continue
            return name, pixels, bad, random
        raise NoReadableImageError(f"{len(bad)} images in a row cannot be used; the last: {bad[-1].reason}")


@contextmanager
def seeded(torch_seed: int, other_seed: int) -> Iterator[None]:
    """Seed the default generators of torch, NumPy and Python in this block, for datasets that draw from them."""
    states = torch.get_rng_state(), np.random.get_state(), python_random.getstate()
    torch.default_generator.manual_seed(torch_seed)
    np.random.seed(other_seed)
    python_random.seed(other_seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        python_random.setstate(states[2])


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples; bytes beside floats become floats."""
    views = []
    for same in zip(*(sample.views for sample in samples), strict=True):
        if len({view.dtype for view in same}) > 1:
            same = tuple(to_unit(view, None) for view in same)
        views.append(torch.stack(same))
    changes = [list(same) for same in zip(*(sample.changes for sample in samples), strict=True)]
    return Batch(views, changes, [sample.name for sample in samples], [one for sample in samples for one in sample.bad])


class EpochOrder(Sampler[list[Index]]):
    """Batches of the images of an epoch in an order that depends on the seed and the epoch alone, for one of several processes.

    All processes together go through the same batches as one alone would. The last, incomplete batch is dropped. Lightning
    calls `set_epoch` before every epoch.

    Args:
        length: Number of images.
        batch_size: Images of a batch, over all processes; a multiple of `processes`.
        seed: Of the order.
        rank, processes: Which part of every batch is ours.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.processes = rank, processes
        self.epoch, self.position = 0, 0

    @property
    def sampler(self) -> "EpochOrder":
        """Itself: of a batch sampler, Lightning calls `set_epoch` on what stands under this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`, or stay where we are in it."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def resume(self, batches: int) -> None:
        """Go to where a run is after so many batches."""
        self.epoch, self.position = divmod(batches, len(self))

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[Index]]:
        words = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        order = torch.randperm(self.length, generator=generator).tolist()
        share, epoch, first = self.batch_size // self.processes, self.epoch, self.position
        starts = (k * self.batch_size + self.rank * share for k in range(first, len(self)))
        return ([Index(epoch, image) for image in order[start : start + share]] for start in starts)


class Picture(NamedTuple):
    """The number of an image, and what it looks like (C, height, width); the reason, if it cannot be read."""

    number: int
    pixels: Tensor | BadImage


@dataclass(frozen=True)
class Pictures(Dataset[Picture]):
    """The images of `source` by number, the first of the `views` of each; no random number of anybody's is drawn."""

    source: ImageSource
    views: Views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Picture:
        random = Random(index)
        try:
            with seeded(index, index):
                pixels = self.source.read(index, random)
        except OSError as error:
            return Picture(index, BadImage(self.source.name(index), str(error)))
        return Picture(index, self.views(pixels, random)[0])


def normalized(pictures: Sequence[Tensor], normalize: Normalize, device: torch.device) -> Tensor:
    """A batch (B, C, height, width) of pictures (C, height, width) of one size."""
    units = torch.stack([to_unit(picture.to(device), None) for picture in pictures])
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (normalize.mean, normalize.std))
    return (units - mean) / std
