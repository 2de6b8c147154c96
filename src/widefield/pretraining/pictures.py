"""Whole images as they are shown to a trained model: resized, and not changed otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from widefield.pretraining.dataset import BadImage, seeded
from widefield.pretraining.source import ImageSource
from widefield.pretraining.transform_args import Normalize
from widefield.pretraining.views import Views, to_unit


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
