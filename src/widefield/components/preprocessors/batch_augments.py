"""Mixing the images of a batch with each other, and their labels with them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional

from widefield.errors import WrongArgumentError
from widefield.registry import ComponentOf, Registry

BATCH_AUGMENTS = Registry("batch augmentation")
BatchAugmentConfig = Annotated[dict[str, Any], ComponentOf(BATCH_AUGMENTS)]
Box = tuple[int, int, int, int]
"""First row, behind the last row, first column, behind the last column."""


@BATCH_AUGMENTS.register_module()
class Mixup:
    """Each image becomes lam * itself + (1 - lam) * another one, and so do the scores; lam ~ Beta(alpha, alpha).

    Zhang et al., 2017, https://arxiv.org/abs/1710.09412.

    Args:
        alpha: Of the beta distribution; the larger, the nearer lam is to 1/2.
    """

    def __init__(self, alpha: float) -> None:
        if alpha <= 0:
            raise WrongArgumentError(f"alpha={alpha} must be positive")
        self.alpha = alpha

    def __call__(self, images: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and scores (N, num_classes), mixed."""
        share = self._draw_share()
        others = torch.randperm(len(images), device=images.device)
        return self._mix(images, images[others], share, scores, scores[others])

    def _draw_share(self) -> float:
        return torch.distributions.Beta(self.alpha, self.alpha).sample().item()

    def _mix(
        self, images: Tensor, others: Tensor, share: float, scores: Tensor, other_scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        return share * images + (1 - share) * others, share * scores + (1 - share) * other_scores


@BATCH_AUGMENTS.register_module()
class CutMix(Mixup):
    """A box of each image is that of another one; scores are mixed by area.

    The box has (1 - lam) of the area, with lam ~ Beta(alpha, alpha), around a point of the image, and is cut off at its border (Yun
    et al., 2019, https://arxiv.org/abs/1905.04899).

    Args:
        alpha: Of the beta distribution.
        cutmix_minmax: Instead of lam, least and greatest share of the image's height and width that the box has.
        correct_lam: Mix scores by the area of the box as it was cut off, rather than by lam.
    """

    def __init__(self, alpha: float, cutmix_minmax: Sequence[float] | None = None, correct_lam: bool = True) -> None:
        super().__init__(alpha)
        if cutmix_minmax is not None and not (
            len(cutmix_minmax) == 2 and 0 < cutmix_minmax[0] <= cutmix_minmax[1] <= 1
        ):
            raise WrongArgumentError(f"cutmix_minmax={cutmix_minmax} must be two shares, 0 < least <= greatest <= 1")
        self.cutmix_minmax = cutmix_minmax
        self.correct_lam = correct_lam

    def _mix(
        self, images: Tensor, others: Tensor, share: float, scores: Tensor, other_scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        top, bottom, left, right = self._draw_box(height, width, share)
        if self.correct_lam or self.cutmix_minmax is not None:
            share = 1 - (bottom - top) * (right - left) / (height * width)
        images = images.clone()
        if bottom > top and right > left:
            images[..., top:bottom, left:right] = self._patch(others, (top, bottom, left, right))
        return images, share * scores + (1 - share) * other_scores

    def _draw_box(self, height: int, width: int, share: float) -> Box:
        if self.cutmix_minmax is not None:
            least, greatest = self.cutmix_minmax
            sizes = [int(n * (least + (greatest - least) * torch.rand(()).item())) for n in (height, width)]
            top, left = (_draw(n - size + 1) for n, size in zip((height, width), sizes, strict=True))
            return top, top + sizes[0], left, left + sizes[1]
        ratio = (1 - share) ** 0.5
        halves = [int(n * ratio) // 2 for n in (height, width)]
        y, x = _draw(height), _draw(width)
        return (max(y - halves[0], 0), min(y + halves[0], height), max(x - halves[1], 0), min(x + halves[1], width))

    def _patch(self, others: Tensor, box: Box) -> Tensor:
        top, bottom, left, right = box
        return others[..., top:bottom, left:right]


@BATCH_AUGMENTS.register_module()
class ResizeMix(CutMix):
    """A box of each image shows all of another one, resized; scores are mixed by area.

    Qin et al., 2020, https://arxiv.org/abs/2012.11101.

    Args:
        alpha: Of the beta distribution from which lam comes, which is then scaled to the range `lam_min` to `lam_max`.
        lam_min: Least lam, the share of the image that stays.
        lam_max: Greatest lam.
        interpolation: How the other image is resized, a mode of `torch.nn.functional.interpolate`.
        kwargs: Those of `CutMix`.
    """

    def __init__(
        self,
        alpha: float,
        lam_min: float = 0.1,
        lam_max: float = 0.8,
        interpolation: Literal["nearest", "bilinear", "bicubic", "area"] = "bilinear",
        **kwargs: Any,
    ) -> None:
        super().__init__(alpha, **kwargs)
        if not 0 <= lam_min <= lam_max <= 1:
            raise WrongArgumentError(f"lam_min={lam_min} and lam_max={lam_max} must be 0 <= lam_min <= lam_max <= 1")
        self.lam_min = lam_min
        self.lam_max = lam_max
        self.interpolation = interpolation

    def _draw_share(self) -> float:
        return self.lam_min + (self.lam_max - self.lam_min) * super()._draw_share()

    def _patch(self, others: Tensor, box: Box) -> Tensor:
        top, bottom, left, right = box
        align = False if self.interpolation in ("bilinear", "bicubic") else None
        return functional.interpolate(
            others, (bottom - top, right - left), mode=self.interpolation, align_corners=align
        )


class BatchAugmentsConfig(TypedDict, total=False):
    """The arguments of `RandomBatchAugment`; without any of them nothing is mixed."""

    augments: BatchAugmentConfig | Sequence[BatchAugmentConfig]
    probs: Sequence[float] | float | None


class RandomBatchAugment:
    """One of several augmentations, drawn for each batch.

    Args:
        augments: One or several.
        probs: The probability of each; what is missing to 1 is that of none. By default all are equally probable.
    """

    def __init__(
        self, augments: BatchAugmentConfig | Sequence[BatchAugmentConfig], probs: Sequence[float] | float | None = None
    ) -> None:
        described = [augments] if isinstance(augments, dict) else list(augments)
        self.augments = [BATCH_AUGMENTS.build(one) for one in described]
        given = [probs] if isinstance(probs, (int, float)) else probs
        self.probs = [1 / len(described)] * len(described) if given is None else list(given)
        if len(self.probs) != len(described) or min(self.probs, default=-1) < 0 or sum(self.probs) > 1 + 1e-6:
            raise WrongArgumentError(
                f"probs={probs} must be a probability for each of {len(described)} augments, with a sum of at most 1"
            )

    def __call__(self, images: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and scores (N, num_classes), mixed or not."""
        number = torch.rand(()).item()
        for augment, probability in zip(self.augments, self.probs, strict=True):
            number -= probability
            if number < 0:
                return augment(images, scores)
        return images, scores


def _draw(count: int) -> int:
    """A number from 0 to below `count`."""
    return int(torch.randint(count, ()).item())
