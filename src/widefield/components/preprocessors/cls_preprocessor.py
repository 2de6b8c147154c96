"""Batches of classification."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.preprocessors.base_preprocessor import BaseDataPreprocessor
from widefield.components.preprocessors.batch_augments import BatchAugmentsConfig, RandomBatchAugment
from widefield.registry import MODELS


@MODELS.register_module()
class ClsDataPreprocessor(BaseDataPreprocessor):
    """Normalises and stacks images, and makes scores of labels where images are mixed.

    Images that a streamed backbone reads tile by tile are left as they are.

    Args:
        mean: Per channel, in units of the pixels: from 0 to 255 for 8 bits. Without it, and `std`, integers are divided by the
            largest value of their type.
        std: Likewise.
        pad_size_divisor: Images are padded at the bottom and on the right to multiples of it; those of a list to one size, too.
        pad_value: What they are padded with, after normalising.
        to_rgb: Accepted and without effect: images are read as RGB. A `mean` in the order of BGR has to be turned around.
        to_onehot: Give each sample a `gt_score` of 0 and 1 by its labels, if it has none.
        num_classes: How many scores there are; in an `ImageClassifier` by default what the head says.
        batch_augments: `{augments: [{type: Mixup, alpha: 0.8}, ...], probs: [0.5, ...]}`: images of a batch in training are mixed
            by one of these, drawn with its probability; implies `to_onehot`. Others are CutMix and ResizeMix.
    """

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        pad_size_divisor: int = 1,
        pad_value: float = 0,
        to_rgb: bool = False,
        to_onehot: bool = False,
        num_classes: int | None = None,
        batch_augments: BatchAugmentsConfig | None = None,
    ) -> None:
        super().__init__(mean, std, pad_size_divisor, pad_value, to_rgb)
        self.num_classes = num_classes
        self.batch_augments = RandomBatchAugment(**batch_augments) if batch_augments else None
        self.to_onehot = to_onehot or self.batch_augments is not None

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it.

        Args:
            data: `inputs`, images (N, C, H, W) or a list of them (C, h, w), and `data_samples`, if there are any.
            training: Whether images are mixed.
        """
        inputs, samples = data["inputs"], data.get("data_samples")
        whole = isinstance(inputs, Tensor) or all(isinstance(image, Tensor) for image in inputs)
        if whole:
            inputs = self.batch(inputs)
        elif self.pad_size_divisor > 1:
            raise WrongArgumentError(
                f"pad_size_divisor={self.pad_size_divisor}, and the images are read tile by tile, which pads none; leave it away"
            )
        if samples is not None and self.to_onehot:
            samples = [self._with_score(sample) for sample in samples]
        if training and samples is not None and self.batch_augments is not None:
            if not whole:
                raise WrongArgumentError(
                    "images that are read tile by tile cannot be mixed; leave batch_augments (train_cfg) away"
                )
            if not all("gt_score" in sample for sample in samples):
                raise WrongArgumentError(
                    "images are mixed with their labels, and there are samples without; label them all"
                )
            scores = torch.stack([sample.gt_score for sample in samples]).to(inputs)
            inputs, scores = self.batch_augments(inputs, scores)
            for sample, score in zip(samples, scores, strict=True):
                sample.set_gt_score(score)
        return {"inputs": inputs, "data_samples": samples}

    def _with_score(self, sample: DataSample) -> DataSample:
        """The sample, with scores if it has labels; a copy, for the data set may keep it, and mixed scores hold for one batch."""
        if "gt_score" not in sample and "gt_label" not in sample:
            return sample
        sample = copy.copy(sample)
        if "gt_score" in sample:
            return sample
        if self.num_classes is None:
            raise WrongArgumentError(
                "to_onehot and batch_augments need num_classes; give the data preprocessor their number"
            )
        label: Tensor = sample.gt_label
        if not 0 <= int(label.min()) <= int(label.max()) < self.num_classes:
            raise WrongArgumentError(f"num_classes={self.num_classes}, and there is the label {int(label.max())}")
        return sample.set_gt_score(torch.zeros(self.num_classes).index_fill(0, label.cpu(), 1.0))


def with_augments(given: Any, train_cfg: BatchAugmentsConfig | None, num_classes: int | None) -> Any:
    """The description of the data preprocessor, with the batch augmentations of `train_cfg` and what these need."""
    if not train_cfg and not isinstance(given, dict):
        return given
    if isinstance(given, dict) or given is None:
        described = {**(given or {}), **({"batch_augments": train_cfg} if train_cfg else {})}
        needs_classes = described.get("batch_augments") or described.get("to_onehot")
        return {"num_classes": num_classes, **described} if needs_classes else described
    raise WrongArgumentError(
        f"train_cfg augments batches in the data preprocessor, and that is a {type(given).__name__} already; "
        "give batch_augments to that, and leave train_cfg away"
    )
