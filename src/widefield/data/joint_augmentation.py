"""Random changes of an image and its label map together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from widefield.data.pipeline import TransformsConfig, torchvision_transform
from widefield.errors import WrongArgumentError

FLIPS = "flips"


class JointAugmentation:
    """Flips and quarter turns, or transforms of torchvision, that change an image and its label map alike.

    Where a transform brings in positions from outside of the image, their label is the ignored one.

    Args:
        described: "flips" draws one of the eight ways to turn and mirror an image, each as likely; or descriptions of transforms of
            torchvision, such as `{type: RandomRotation, degrees: 20}`, which are applied in turn. Those of colours change the image
            alone.
        ignore_index: The label that is no class.

    Raises:
        WrongArgumentError: A transform is not torchvision's, so that it is not known how it changes labels.
    """

    def __init__(self, described: str | TransformsConfig, ignore_index: int = 255) -> None:
        if isinstance(described, str) and described != FLIPS:
            raise WrongArgumentError(
                f"augment={described!r} must be {FLIPS!r}, or a list of transforms such as [{{type: RandomHorizontalFlip}}]"
            )
        self._transforms: Sequence[v2.Transform] | None = (
            None if isinstance(described, str) else [torchvision_transform(one) for one in described or ()]
        )
        self._ignored = ignore_index

    def __call__(self, image: np.ndarray, labels: np.ndarray, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return an image (C, H, W) and its labels (H, W), changed; the same for the same `seed`.

        Flips take any map (..., H, W) in place of labels.
        """
        random = np.random.default_rng([*seed, 1])  # not the numbers that have drawn the crop
        if self._transforms is None:
            turns, mirrored = int(random.integers(4)), bool(random.integers(2))
            return _turned(image, turns, mirrored), _turned(labels, turns, mirrored)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(random.integers(2**63)))
            pair: Any = tv_tensors.Image(image), tv_tensors.Mask((labels.astype(np.int64) + 1)[None])
            for transform in self._transforms:
                pair = transform(*pair)
        found = pair[1][0].numpy()
        changed = np.where(found == 0, self._ignored, found - 1)  # 0 is what comes from outside
        return pair[0].numpy(), changed.astype(np.result_type(labels, np.min_scalar_type(self._ignored)))


def _turned(array: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    """Return an array (..., H, W) after so many quarter turns, and mirrored."""
    turned = np.rot90(array, turns, (-2, -1))
    return np.ascontiguousarray(turned[..., ::-1] if mirrored else turned)
