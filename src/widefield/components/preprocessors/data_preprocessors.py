"""Data preprocessors: from the batch of a data loader to the input of a model."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.data_sample import DataSample
from widefield.components.preprocessors.batch_augments import BatchAugmentsConfig, RandomBatchAugment
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, ComponentOf
from widefield.streaming.tiles import Normalisation

_log = logging.getLogger(__name__)
_SCALED = 2.0
"""Means of images from 0 to 1 are smaller, of those from 0 to 255 larger."""
PreprocessorConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "preprocessor", typed=False)]


class BaseDataPreprocessor(nn.Module):
    """Normalises images, and makes one tensor of those of a batch.

    Called with `{inputs: ..., data_samples: ...}` and whether the model trains; it returns such a dictionary. A subclass writes
    `forward`.

    Attributes:
        normalisation: What is done to pixels; a streamed backbone does it tile by tile.

    Args:
        mean, std: Per channel, in units of the pixels: from 0 to 255 for 8 bits. Without them integers are divided by the
            largest value of their type.
        pad_size_divisor: Images are padded at the bottom and on the right to multiples of it.
        pad_value: What they are padded with, after normalising.
        to_rgb: Accepted and without effect: images are read as RGB, so there is no BGR to be turned around. A `mean` and `std` in
            the order of BGR are to be written in that of RGB.
    """

    component_kind = "preprocessor"

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        pad_size_divisor: int = 1,
        pad_value: float = 0,
        to_rgb: bool = False,
    ) -> None:
        super().__init__()
        if pad_size_divisor < 1:
            raise WrongArgumentError(f"pad_size_divisor={pad_size_divisor} must be positive; 1 pads nothing")
        self.normalisation = pixel_normalisation(mean, std)
        self._saw_floats = False
        self.pad_size_divisor = pad_size_divisor
        self.pad_value = pad_value

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it."""
        raise NotImplementedError

    def batch(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Images (N, C, H, W), or a list of (C, h, w), normalised and padded to one size, as a tensor (N, C, H, W)."""
        self._warn_of_scaled(images)
        if isinstance(images, Tensor):
            return self._pad(normalised(images, self.normalisation), images.shape[-2:])
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        return torch.stack([self._pad(normalised(image, self.normalisation), (height, width)) for image in images])

    def _warn_of_scaled(self, images: Tensor | Sequence[Tensor]) -> None:
        """Once, of floats from 0 to 1 beside a `mean` for 8 bits: everything would come out nearly the same."""
        if self._saw_floats or self.normalisation.mean is None or not len(images) or not images[0].is_floating_point():
            return
        self._saw_floats = True  # later batches are not looked at: on a GPU that would wait for it
        if max(self.normalisation.mean) > _SCALED and float(images[0].max()) <= 1:
            _log.warning(
                "images are floats up to 1, and mean=%s is in units of 8 bits; divide mean and std by 255, or give 8 bits",
                list(self.normalisation.mean),
            )

    def _pad(self, image: Tensor, size: Sequence[int]) -> Tensor:
        """`image`, padded to `size` and to a multiple of the divisor."""
        if image.ndim < 3:
            return image
        below, right = (
            -(-n // self.pad_size_divisor) * self.pad_size_divisor - own
            for n, own in zip(size, image.shape[-2:], strict=True)
        )
        return functional.pad(image, (0, right, 0, below), value=self.pad_value) if below or right else image


def pixel_normalisation(mean: Sequence[float] | float | None, std: Sequence[float] | float | None) -> Normalisation:
    """(x - mean) / std of pixels as they are stored; without both, integers divided by the largest value of their type."""
    try:
        return Normalisation.parse(mean, std, None if mean is None else (0.0, 1.0))
    except ValueError as error:
        raise WrongArgumentError(str(error)) from error


def normalised(image: Tensor, normalisation: Normalisation) -> Tensor:
    """`image` (..., C, H, W) normalised; integers become torch's default floating-point type, floats keep theirs."""
    mean = normalisation.mean
    if mean is not None and len(mean) not in (1, image.shape[-3]):
        raise WrongArgumentError(
            f"mean and std have {len(mean)} values, the image has {image.shape[-3]} channels; give one per channel, or "
            "images of as many, as {type: RGB} under transforms makes them"
        )
    if image.is_floating_point():
        return normalisation.apply(image, image.dtype)
    default = torch.get_default_dtype()  # with 16 bits a mean of 123.675 would be another one
    return normalisation.apply(image, torch.promote_types(default, torch.float32)).to(default)


@MODELS.register_module()
class ClsDataPreprocessor(BaseDataPreprocessor):
    """Normalises and stacks images, and makes scores of labels where images are mixed.

    Images that a streamed backbone reads tile by tile are left as they are.

    Args:
        mean, std: See `BaseDataPreprocessor`.
        to_onehot: Give each sample a `gt_score` of 0 and 1 by its labels, if it has none.
        num_classes: How many scores there are; in an `ImageClassifier` by default what the head says.
        batch_augments: `{augments: [{type: Mixup, alpha: 0.8}, ...], probs: [0.5, ...]}`: images of a batch in training are mixed
            by one of these, drawn with its probability; implies `to_onehot`. Others are CutMix and ResizeMix.
        kwargs: Those of `BaseDataPreprocessor`.
    """

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        *,
        to_onehot: bool = False,
        num_classes: int | None = None,
        batch_augments: BatchAugmentsConfig | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mean, std, **kwargs)
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


@MODELS.register_module()
class SelfSupDataPreprocessor(BaseDataPreprocessor):
    """Normalises and stacks images, or each of several views of them."""

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it.

        Args:
            data: `inputs` and maybe `data_samples`. Inputs are images (N, C, H, W), a list of images (C, h, w), or a list of views,
                each of them images (N, C, H, W).
            training: Without effect.
        """
        inputs = data["inputs"]
        views = inputs if is_views(inputs) else [inputs]
        batches = [self.batch(view) for view in views]
        return {"inputs": batches if is_views(inputs) else batches[0], "data_samples": data.get("data_samples")}


def is_views(inputs: Any) -> bool:
    """True if inputs are a list of batches, not one batch."""
    return isinstance(inputs, (list, tuple)) and all(isinstance(view, Tensor) and view.ndim == 4 for view in inputs)


@MODELS.register_module()
class TwoNormDataPreprocessor(SelfSupDataPreprocessor):
    """Two views of each image, normalised in two ways: that of the model and that of the target generator.

    Of images without a second view, both views are the same.

    Args:
        mean, std: Of the model's view: per channel, in units of the pixels, from 0 to 255 for 8 bits.
        second_mean, second_std: Of the target generator's view: 127.5 and 127.5 for VQ-KD, -31.875 and 318.75 for DALL-E.
        kwargs: Those of `BaseDataPreprocessor`; they concern the model's view.
    """

    def __init__(
        self,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        second_mean: Sequence[float] | float | None = None,
        second_std: Sequence[float] | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(mean, std, **kwargs)
        if second_mean is None or second_std is None:
            raise WrongArgumentError(
                "second_mean and second_std are missing; give those of the target generator, or use SelfSupDataPreprocessor"
            )
        self.second_normalisation = pixel_normalisation(second_mean, second_std)

    def forward(self, data: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """The batch as the model gets it: `inputs` is a list of two views, each (N, C, H, W).

        Args:
            data: `inputs`, images (N, C, H, W) or two views of them in a list, and maybe `data_samples`.
            training: Without effect.
        """
        inputs = data["inputs"]
        views = inputs if is_views(inputs) else [inputs, inputs]
        if len(views) != 2:
            raise WrongArgumentError(
                f"there are {len(views)} views; give two, that of the model and that of the target"
            )
        second = normalised(views[1], self.second_normalisation)
        return {"inputs": [self.batch(views[0]), second], "data_samples": data.get("data_samples")}
