"""Target generators: the visual tokenizers of BEiT and BEiT v2, and histograms of oriented gradients.

They never learn, and those that were trained need their weights.
"""

import math
from collections import OrderedDict
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.component import Component, InitConfig
from widefield.components.key_maps import adapted
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, ComponentOf

_WIDTHS = (1, 2, 4, 8)
"""Channels of each group, in multiples of those of the first."""


class BaseTargetGenerator(Component):
    """Makes targets from images, and never learns: it stays in evaluation mode, and what it computes has no gradients.

    A constructor with parts of its own ends with `self.train()`, which freezes them.
    """

    component_kind = "target_generator"

    def train(self, mode: bool = True) -> Any:
        """Set evaluation mode, whatever the mode, and freeze all parameters."""
        super().train(False)
        return self.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The targets, without gradients."""
        with torch.no_grad():
            return super().__call__(*args, **kwargs)


class PretrainedTargetGenerator(BaseTargetGenerator):
    """A target generator that was trained before: it refuses to make targets with weights that nobody loaded.

    Args:
        init_cfg: `{type: Pretrained, checkpoint: FILE}`.
        allow_random_weights: Do without a checkpoint; the targets mean nothing then.

    Raises:
        WrongArgumentError: No checkpoint is given, and random weights are not allowed.
    """

    def __init__(self, init_cfg: InitConfig = None, allow_random_weights: bool = False) -> None:
        super().__init__(init_cfg)
        self.allow_random_weights = allow_random_weights
        self._missing: set[str] | None = None
        if not (allow_random_weights or self.is_pretrained):
            raise WrongArgumentError(
                f"{type(self).__name__} makes no sense with random weights; give "
                f"init_cfg={{type: Pretrained, checkpoint: FILE}}, or allow_random_weights=True to try things out"
            )

    def init_weights(self) -> None:
        """Initialise the weights.

        Raises:
            WrongArgumentError: The checkpoint lacks some of them.
        """
        super().init_weights()
        if not self.allow_random_weights:
            self._check_weights()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The targets, without gradients.

        Raises:
            WrongArgumentError: Weights were not loaded.
        """
        if not self.allow_random_weights:
            self._check_weights()
        return super().__call__(*args, **kwargs)

    def _check_weights(self) -> None:
        name = type(self).__name__
        if self._missing is None:
            raise WrongArgumentError(f"the weights of {name} were not loaded; call init_weights() or load_state_dict()")
        if self._missing:
            few = sorted(self._missing)[:3]
            more = f" and {len(self._missing) - len(few)} more" if len(self._missing) > len(few) else ""
            raise WrongArgumentError(f"what was loaded lacks weights of {name}: {', '.join(few)}{more}; check the file")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load, and note what has not been loaded so far."""
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        missing = self.state_dict().keys() - adapted(self, given).keys()
        self._missing = missing if self._missing is None else self._missing & missing
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Conv(nn.Module):
    """A convolution that keeps the size of the map; `w` and `b` are the names of the weights in checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.b = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_normal_(self.w, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class _Block(nn.Module):
    """x + gain * four convolutions with ReLU before each."""

    def __init__(self, in_channels: int, out_channels: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        inside = out_channels // 4
        self.id_path = _Conv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        channels = (in_channels, inside, inside, inside, out_channels)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for k in range(1, 5):
            layers[f"relu_{k}"] = nn.ReLU()
            layers[f"conv_{k}"] = _Conv(channels[k - 1], channels[k], 3 if k < 4 else 1)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


@MODELS.register_module(aliases="DALL-E")
class DALLEEncoder(PretrainedTargetGenerator):
    """Scores of the visual tokens of DALL-E's discrete autoencoder, the targets of BEiT.

    Ramesh et al., 2021, https://arxiv.org/abs/2102.12092, appendix A. Images are scaled to 0.1 + 0.8 x with x from 0 to 1.

    Args:
        in_channels: Channels of the image.
        n_hid: Channels of the first group of blocks, a multiple of 4; the others have 2, 4 and 8 times as many.
        n_blk_per_group: Blocks of a group.
        vocab_size: Tokens.
        init_cfg: `{type: Pretrained, checkpoint: FILE}`.
        allow_random_weights: Do without a checkpoint; the tokens mean nothing then.
    """

    def __init__(
        self,
        in_channels: int = 3,
        n_hid: int = 256,
        n_blk_per_group: int = 2,
        vocab_size: int = 8192,
        init_cfg: InitConfig = None,
        allow_random_weights: bool = False,
    ) -> None:
        super().__init__(init_cfg, allow_random_weights)
        gain = 1 / (len(_WIDTHS) * n_blk_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=_Conv(in_channels, n_hid, 7))
        before = n_hid
        for k, factor in enumerate(_WIDTHS, 1):
            group: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, n_blk_per_group + 1):
                group[f"block_{block}"] = _Block(before, factor * n_hid, gain)
                before = factor * n_hid
            if k < len(_WIDTHS):
                group["pool"] = nn.MaxPool2d(2)
            layers[f"group_{k}"] = nn.Sequential(group)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=_Conv(before, vocab_size, 1)))
        self.blocks = nn.Sequential(layers)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, vocab_size, H / 8, W / 8) of images (B, C, H, W)."""
        return self.blocks(x)


class CosineQuantizer(nn.Module):
    """Replaces vectors by the index of the code that points most nearly in their direction.

    Peng et al., 2022, https://arxiv.org/abs/2208.06366, equation 1.

    Args:
        num_embed: Codes.
        embed_dims: Width of a code.
    """

    def __init__(self, num_embed: int, embed_dims: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embed, embed_dims)

    def forward(self, z: Tensor) -> Tensor:
        """Indices (...) of the codes of greatest cosine with vectors (..., embed_dims)."""
        codes = functional.normalize(self.embedding.weight.float(), dim=-1)
        return (functional.normalize(z.float(), dim=-1) @ codes.T).argmax(dim=-1)


@MODELS.register_module()
class VQKD(PretrainedTargetGenerator):
    """Visual tokens by vector-quantised knowledge distillation, the targets of BEiT v2.

    A vision transformer, two linear layers with tanh between them, and a codebook (Peng et al., 2022,
    https://arxiv.org/abs/2208.06366, section 3.1). Tokens are computed in 32 bits from what the transformer gives.

    Args:
        encoder_config: The transformer; it gives maps (`out_type: featmap`) and knows its `embed_dims`. Without a type it is a
            BEiTViT.
        num_embed: Codes.
        embed_dims: Width of a code.
        init_cfg: `{type: Pretrained, checkpoint: FILE}`.
        allow_random_weights: Do without a checkpoint; the tokens mean nothing then.
    """

    def __init__(
        self,
        encoder_config: Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "backbone", typed=False)],
        num_embed: int = 8192,
        embed_dims: int = 32,
        init_cfg: InitConfig = None,
        allow_random_weights: bool = False,
    ) -> None:
        super().__init__(init_cfg, allow_random_weights)
        self.encoder = MODELS.build(encoder_config, {"type": "BEiTViT"})
        width = getattr(self.encoder, "embed_dims", None)
        if not isinstance(width, int):
            raise WrongArgumentError(
                f"the encoder {type(self.encoder).__name__} has no embed_dims, its width; give a vision transformer"
            )
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, embed_dims))
        self.quantize = CosineQuantizer(num_embed, embed_dims)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L), int64 from 0 to below num_embed, of the L patches of images (B, C, H, W), row by row."""
        features = self.encoder(x)[-1]
        if features.ndim != 4:
            raise WrongArgumentError(
                f"the encoder gives features of shape {tuple(features.shape)}, not maps (B, D, h, w); "
                f"set out_type='featmap' in encoder_config"
            )
        with torch.autocast(x.device.type, enabled=False):
            patches = features.flatten(2).transpose(1, 2).to(self.quantize.embedding.weight.dtype)
            tokens: Tensor = self.quantize(self.encode_task_layer(patches))
        return tokens


@MODELS.register_module()
class HOGGenerator(BaseTargetGenerator):
    """Histograms of oriented gradients of every patch, the targets of MaskFeat.

    Gradients are Sobel's, angles do not know forwards from backwards, and magnitudes are weighted by Gaussian windows that tile the
    image. Histograms have the L2 norm 1 in each cell and channel, or 0 where nothing changes (Dalal and Triggs, 2005; Wei et al.,
    2021, https://arxiv.org/abs/2112.09133, section 3.2).

    Attributes:
        out: The histograms of the last images, (B, C, nbins, H / pool, W / pool), for pictures of them.

    Args:
        nbins: Angles, of 180 / nbins degrees each.
        pool: Side of a cell, in pixels.
        gaussian_window: Side of a window, in pixels; its standard deviation is half of that.
        patch_size: Side of a patch, in pixels, a multiple of `pool`.
    """

    gaussian: Tensor

    def __init__(self, nbins: int = 9, pool: int = 8, gaussian_window: int = 16, patch_size: int = 16) -> None:
        super().__init__()
        if min(nbins, pool, gaussian_window, patch_size) < 1 or patch_size % pool:
            raise WrongArgumentError(
                f"nbins={nbins}, pool={pool}, gaussian_window={gaussian_window} and patch_size={patch_size} must be positive, "
                f"and patch_size a multiple of pool"
            )
        self.nbins = nbins
        self.pool = pool
        self.gaussian_window = gaussian_window
        self.patch_size = patch_size
        window = torch.signal.windows.gaussian(gaussian_window, std=gaussian_window / 2)
        gaussian = torch.outer(window, window)
        self.register_buffer("gaussian", gaussian / gaussian.sum(), persistent=False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Histograms (B, L, C * nbins * u * u) of the L patches, row by row, with u * u cells each.

        A patch has its channels one after the other, of each channel its angles, and of each angle the cells row by row.

        Args:
            x: Images (B, C, H, W); patches and windows fill them.
        """
        height, width = x.shape[-2:]
        side = math.lcm(self.patch_size, self.gaussian_window)
        if height % side or width % side:
            raise WrongArgumentError(
                f"images have {height} x {width} pixels; patch_size={self.patch_size} and "
                f"gaussian_window={self.gaussian_window} need multiples of {side}"
            )
        self.out = self._histograms(x.to(torch.promote_types(x.dtype, torch.float32)))
        patches = functional.pixel_unshuffle(self.out.flatten(1, 2), self.patch_size // self.pool)
        return patches.flatten(2).transpose(1, 2)

    def _histograms(self, x: Tensor) -> Tensor:
        right, down = _sobel(x)
        angle = torch.atan2(right, down) / math.pi * self.nbins
        bins = angle.floor().remainder(self.nbins)
        tiles = (x.shape[-2] // self.gaussian_window, x.shape[-1] // self.gaussian_window)
        magnitude = torch.hypot(right, down) * self.gaussian.to(x).tile(tiles)
        # One angle at a time: an axis of angles in front of the sums would take nbins times the memory of the images.
        of_angles = (magnitude * (bins == k) for k in range(self.nbins))
        sums = [functional.avg_pool2d(one, self.pool, divisor_override=1) for one in of_angles]
        return functional.normalize(torch.stack(sums, dim=2), dim=2)


def _sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and downwards, of (B, C, H, W) with reflected borders.

    They are sums of slices, for convolutions round to fewer bits on GPUs, and angles at the border of two bins would move.
    """
    x = functional.pad(x, (1, 1, 1, 1), mode="reflect")
    along_y = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    along_x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return along_y[..., :-2] - along_y[..., 2:], along_x[..., :-2, :] - along_x[..., 2:, :]
