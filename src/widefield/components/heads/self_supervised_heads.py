"""Heads of self-supervised learning: what is compared with what."""

import math

import torch
from lightly.models.utils import normalize_mean_var, patchify, unpatchify
from lightly.utils.dist import rank
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.component import InitConfig, LossConfig, LossHead, NeckConfig
from widefield.components.losses.embedding_losses import joint
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module()
class ContrastiveHead(LossHead):
    """Classification of the positive pair among the negative ones, InfoNCE.

    van den Oord et al., 2018, https://arxiv.org/abs/1807.03748, equation 4; with a temperature as in SimCLR.

    Args:
        loss: Called with scores (N, 1 + K) and the class 0 for each.
        temperature: Similarities are divided by it.
        init_cfg: See `Component`.
    """

    def __init__(
        self,
        loss: LossConfig = {"type": "CrossEntropyLoss"},  # noqa: B006  # read, never written
        temperature: float = 0.1,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(loss, init_cfg)
        if temperature <= 0:
            raise WrongArgumentError(f"temperature={temperature} must be positive")
        self.temperature = temperature

    def loss(self, pos: Tensor, neg: Tensor) -> Tensor:
        """Return the loss of similarities.

        Args:
            pos: Of the positive pairs, (N, 1).
            neg: Of the negative pairs, (N, K).
        """
        score = torch.cat([pos, neg], dim=1) / self.temperature
        label = torch.zeros(len(score), dtype=torch.long, device=score.device)
        return self.loss_module(score, label)


@MODELS.register_module()
class LatentPredictHead(LossHead):
    """Compares what a predictor makes of one view with the other view, which gets no gradient.

    Grill et al., 2020 (BYOL), https://arxiv.org/abs/2006.07733; Chen and He, 2020 (SimSiam), https://arxiv.org/abs/2011.10566.

    Args:
        loss: Called with predictions and targets.
        predictor: A neck.
        init_cfg: See `Component`.
    """

    def __init__(self, loss: LossConfig, predictor: NeckConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(loss, init_cfg)
        self.predictor = MODELS.build(predictor)

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of features (N, C) of one view against those of the other."""
        predicted = self.predictor((input,))[0]
        return self.loss_module(predicted, target.detach())


@MODELS.register_module()
class LatentCrossCorrelationHead(LossHead):
    """The cross-correlation of two views' projections over the batch, which is that of all processes.

    Zbontar et al., 2021 (Barlow Twins), https://arxiv.org/abs/2103.03230.

    Args:
        in_channels: Width D of the projections.
        loss: Called with the matrix (D, D) of correlations.
        init_cfg: See `Component`.
    """

    def __init__(self, in_channels: int, loss: LossConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(loss, init_cfg)
        self.bn = nn.BatchNorm1d(in_channels, affine=False, track_running_stats=False)

    def loss(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of projections (N, D) of one view and of the other."""
        first, second = self.bn(joint(input)), self.bn(joint(target))
        return self.loss_module(first.T @ second / len(first))


@MODELS.register_module()
class MoCoV3Head(LossHead):
    """Finds what a predictor makes of one view among the other views of the batch, which is that of all processes.

    Chen et al., 2021, https://arxiv.org/abs/2104.02057.

    Args:
        predictor: A neck.
        loss: Called with similarities (N, N * processes) and the number of the right one for each.
        temperature: Similarities are divided by it.
        init_cfg: See `Component`.
    """

    def __init__(
        self, predictor: NeckConfig, loss: LossConfig, temperature: float = 1.0, init_cfg: InitConfig = None
    ) -> None:
        super().__init__(loss, init_cfg)
        if temperature <= 0:
            raise WrongArgumentError(f"temperature={temperature} must be positive")
        self.predictor = MODELS.build(predictor)
        self.temperature = temperature

    def loss(self, base_out: Tensor, momentum_out: Tensor) -> Tensor:
        """Return the loss of features (N, C) of one view against those of the other, which get no gradient."""
        predicted = functional.normalize(self.predictor((base_out,))[0], dim=1)
        target = joint(functional.normalize(momentum_out.detach(), dim=1))
        score = predicted @ target.T / self.temperature
        label = torch.arange(len(score), device=score.device) + len(score) * rank()
        return self.loss_module(score, label)


@MODELS.register_module()
class SwAVHead(LossHead):
    """The loss of the features of all crops of a batch, see `SwAVLoss`."""

    def loss(self, pred: Tensor) -> Tensor:
        """Return the loss of features (crops * N, D)."""
        return self.loss_module(pred)


@MODELS.register_module()
class MIMHead(LossHead):
    """Compares predictions with targets under a mask."""

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss; predictions, targets and mask are what the loss takes."""
        return self.loss_module(pred, target, mask)


@MODELS.register_module(replaceable=True)
class MAEPretrainHead(LossHead):
    """Compares predicted patches with those of the image, for masked autoencoders.

    He et al., 2021, https://arxiv.org/abs/2111.06377.

    Args:
        loss: Called with predictions and targets (B, L, D) and the mask (B, L).
        norm_pix: Targets are standardised, patch by patch: (x - mean) / sqrt(variance + 1e-6), with the unbiased variance.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        init_cfg: See `Component`.
    """

    def __init__(
        self,
        loss: LossConfig,
        norm_pix: bool = False,
        patch_size: int = 16,
        in_channels: int = 3,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(loss, init_cfg)
        self.norm_pix = norm_pix
        self.patch_size = patch_size
        self.in_channels = in_channels

    def patchify(self, imgs: Tensor) -> Tensor:
        """Return patches (B, L, p * p * C), row by row, of images (B, C, H, H); in a patch, channels change fastest.

        Raises:
            WrongArgumentError: Images that are not square, not a multiple of the patch, or of another number of channels.
        """
        p = self.patch_size
        channels, height, width = imgs.shape[1:]
        if height != width or height % p or channels != self.in_channels:
            raise WrongArgumentError(
                f"images have the shape {tuple(imgs.shape)}; give square ones of {self.in_channels} channels, "
                f"with a side that patch_size={p} divides"
            )
        return patchify(imgs, p)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Return the images (B, C, H, H) of patches (B, L, p * p * C), the inverse of `patchify`.

        Raises:
            WrongArgumentError: Patches that make no square, or of another number of values.
        """
        p, channels = self.patch_size, self.in_channels
        patches, values = x.shape[1:]
        if math.isqrt(patches) ** 2 != patches or values != p * p * channels:
            raise WrongArgumentError(
                f"patches have the shape {tuple(x.shape)}; give a square number of them, of {p * p * channels} values each"
            )
        return unpatchify(x, p, channels)

    def construct_target(self, target: Tensor) -> Tensor:
        """Return the targets of images (B, C, H, H): their patches, standardised with `norm_pix`."""
        target = self.patchify(target)
        return normalize_mean_var(target) if self.norm_pix else target

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the loss.

        Args:
            pred: Predicted patches (B, L, p * p * C).
            target: Images (B, C, H, H).
            mask: (B, L), 1 for patches that were removed.
        """
        return self.loss_module(pred, self.construct_target(target), mask)


class VisualTokenHead(LossHead):
    """Predicts the visual tokens of masked patches by one linear layer.

    Args:
        embed_dims: Width of the features.
        num_embed: Different tokens.
        loss: Called with scores (M, num_embed) and tokens (M,) of the M masked patches.
        init_cfg: See `Component`.
    """

    default_init_cfg = ({"type": "TruncNormal", "layer": "Linear", "std": 0.02},)

    def __init__(self, embed_dims: int, num_embed: int, loss: LossConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(loss, init_cfg)
        self.cls_head = nn.Linear(embed_dims, num_embed)

    def token_loss(self, feats: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of features (B, L, D) of patches against tokens (B, L) where `mask` (B, L) is True.

        Raises:
            WrongArgumentError: The shapes differ, or the mask selects nothing.
        """
        if feats.shape[:2] != tokens.shape or tokens.shape != mask.shape:
            raise WrongArgumentError(
                f"there are features {tuple(feats.shape)}, tokens {tuple(tokens.shape)} and a mask {tuple(mask.shape)}; "
                f"give one of each per patch"
            )
        masked = feats[mask]
        if not len(masked):
            raise WrongArgumentError(
                "the mask selects no patch, and the loss is that of masked patches; mask one at least"
            )
        return self.loss_module(self.cls_head(masked), tokens[mask])


@MODELS.register_module()
class BEiTV1Head(VisualTokenHead):
    """Predicts which of the DALL-E encoder's tokens masked patches have.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254.
    """

    def loss(self, feats: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Return the loss.

        Args:
            feats: Tokens (B, 1 + L, D) of the backbone, that of the class first.
            target: Scores (B, num_embed, h, w) of the visual tokens on a grid of L = h * w patches.
            mask: (B, h, w), True or 1 for masked patches.
        """
        return self.token_loss(feats[:, 1:], target.argmax(dim=1).flatten(1), mask.flatten(1).bool())


@MODELS.register_module()
class BEiTV2Head(VisualTokenHead):
    """Predicts VQ-KD's tokens of masked patches twice, by one layer.

    Peng et al., 2022, https://arxiv.org/abs/2208.06366.
    """

    def loss(self, feats: Tensor, feats_cls_pt: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of both features.

        Args:
            feats: Final features (B, L, D) of the patches.
            feats_cls_pt: Those from the class token and an early layer, see `BEiTV2Neck`.
            target: Visual tokens, integers (B, L).
            mask: (B, h, w) or (B, L), True or 1 for masked patches.
        """
        mask = mask.flatten(1).bool()
        return self.token_loss(feats, target, mask), self.token_loss(feats_cls_pt, target, mask)
