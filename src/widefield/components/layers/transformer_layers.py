"""Layers of vision transformers: patches as tokens, where they stand, and attention."""

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Literal, TypedDict

import torch
from timm.layers import build_sincos2d_pos_embed, gen_relative_position_index
from timm.models.beit import Attention as BeitAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from widefield.components.component import ActivationConfig, NormConfig, build_activation_layer, build_norm_layer
from widefield.components.key_maps import AdaptsWeights
from widefield.errors import WrongArgumentError

Resolution = tuple[int, int]
"""Rows and columns of tokens."""


def sincos_position_embedding(resolution: Resolution, embed_dims: int, cls_token: bool = False) -> Tensor:
    """Position embedding (1, L, C) of sines and cosines in two dimensions (He et al., 2021, after Vaswani et al., 2017).

    With the frequencies 10000^(-4 k / C), k from 0 to C / 4 - 1, it is the sines and the cosines of the row times each, then those
    of the column. Tokens are in row-major order.

    Args:
        resolution: Rows and columns.
        embed_dims: Channels C, a multiple of 4.
        cls_token: Begin with zeros for a class token.

    Raises:
        WrongArgumentError: C is no multiple of 4.
    """
    if embed_dims % 4:
        raise WrongArgumentError(f"embed_dims={embed_dims} must be a multiple of 4 for sines and cosines of two axes")
    embedding = build_sincos2d_pos_embed(list(resolution), embed_dims, interleave_sin_cos=True)
    return functional.pad(embedding, (0, 0, int(cls_token), 0))[None]


def resize_position_embedding(
    embedding: Tensor, old: Resolution, new: Resolution, mode: str = "bicubic", extra_tokens: int = 1
) -> Tensor:
    """A position embedding (1, extra_tokens + L, C) for another number of rows and columns; extra tokens keep theirs."""
    if old == new:
        return embedding
    extra, grid = embedding[:, :extra_tokens], embedding[:, extra_tokens:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
    align = None if mode in ("nearest", "area") else False
    grid = functional.interpolate(grid, new, mode=mode, align_corners=align)
    return torch.cat((extra, grid.flatten(2).transpose(1, 2)), dim=1)


class RelativePositionBias(AdaptsWeights):
    """A learned number per head for each offset between two tokens, added to the attention.

    As in BEiT (Bao et al., 2021). Three more are for the class token: towards patches, from patches, and towards itself.

    Args:
        resolution: Rows and columns of patches.
        num_heads: Heads of the attention.
    """

    def __init__(self, resolution: Resolution, num_heads: int) -> None:
        super().__init__()
        self.resolution = resolution
        offsets = (2 * resolution[0] - 1) * (2 * resolution[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))

    def forward(self, resolution: Resolution | None = None) -> Tensor:
        """The bias (heads, 1 + L, 1 + L); for other rows and columns than the own ones the table is resized."""
        resolution = resolution or self.resolution
        table = self.resized(self.relative_position_bias_table, self.resolution, resolution)
        index = gen_relative_position_index(resolution, class_token=True).to(table.device)
        return table[index].permute(2, 0, 1)

    @staticmethod
    def resized(table: Tensor, old: Resolution, new: Resolution) -> Tensor:
        """A table for other rows and columns: the numbers of offsets between patches are interpolated bicubically."""
        if old == new:
            return table
        sizes = [tuple(2 * n - 1 for n in resolution) for resolution in (old, new)]
        grid = table[:-3].T.unflatten(1, sizes[0])[None]
        grid = functional.interpolate(grid, sizes[1], mode="bicubic", align_corners=False)
        return torch.cat((grid[0].flatten(1).T, table[-3:]))

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """See `AdaptsWeights`; a table for another square of patches is resized."""
        key = prefix + "relative_position_bias_table"
        table = weights.get(key)
        own = self.relative_position_bias_table
        if table is not None and table.ndim == own.ndim and len(table) != len(own) and table.shape[1] == own.shape[1]:
            side = (round((len(table) - 3) ** 0.5) + 1) // 2
            if (2 * side - 1) ** 2 == len(table) - 3:
                weights[key] = self.resized(table, (side, side), self.resolution)


class PatchConfig(TypedDict, total=False):
    """Options of `PatchEmbed`."""

    stride: int
    padding: int | Literal["corner"]
    bias: bool


class PatchEmbed(nn.Module):
    """A token per patch, by a convolution.

    Args:
        img_size: Height and width for which `resolution` holds.
        patch_size: Side of a patch, in pixels.
        in_channels: Channels of the image.
        embed_dims: Channels of a token.
        bias: Whether the convolution has one.
        stride: From one patch to the next; None is the patch size.
        padding: Zeros around the image; "corner" adds as many at its end as whole patches need.

    Attributes:
        resolution: Rows and columns of patches of an image of `img_size`.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_channels: int,
        embed_dims: int,
        bias: bool = True,
        stride: int | None = None,
        padding: int | Literal["corner"] = "corner",
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = patch_size if stride is None else stride
        self.pads_corner = padding == "corner"
        margin = 0 if padding == "corner" else padding
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, self.stride, margin, bias=bias)
        if self.pads_corner:
            self.resolution = (math.ceil(img_size[0] / self.stride), math.ceil(img_size[1] / self.stride))
        else:
            rows, columns = ((side + 2 * margin - patch_size) // self.stride + 1 for side in img_size)
            self.resolution = (rows, columns)

    def forward(self, x: Tensor) -> tuple[Tensor, Resolution]:
        """Tokens (N, L, C) of an image (N, channels, H, W), row by row, and their rows and columns."""
        if self.pads_corner:
            height, width = (
                max((math.ceil(side / self.stride) - 1) * self.stride + self.patch_size - side, 0)
                for side in x.shape[-2:]
            )
            x = functional.pad(x, (0, width, 0, height))
        x = self.projection(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def leave_out(tokens: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out all but `kept` of the tokens (N, L, C), drawn for each image.

    Returns:
        The kept tokens (N, kept, C) in the order they were drawn in, the mask (N, L), 1 for each token that is left out, and
        `ids_restore` (N, L), which for each place says where its token is among the kept and then the left out.
    """
    ids_shuffle = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    visible = tokens.gather(1, ids_shuffle[:, :kept, None].expand(-1, -1, tokens.shape[2]))
    return visible, (ids_restore >= kept).to(tokens.dtype), ids_restore


def replace_masked(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """`tokens` (N, L, C) with `mask_token` in the place of the masked ones.

    Args:
        tokens: Of patches, without a class token.
        mask: (N, L), or (N, rows, columns): 1 or True where a patch is masked.
        mask_token: (1, 1, C).

    Raises:
        ValueError: The mask is for another number of images or patches.
    """
    if mask.ndim < 2 or mask.flatten(1).shape != tokens.shape[:2]:
        raise ValueError(
            f"the mask has the shape {tuple(mask.shape)}; {tokens.shape[0]} images of {tokens.shape[1]} patches need "
            f"({tokens.shape[0]}, rows, columns) or {tuple(tokens.shape[:2])}"
        )
    weight = mask.flatten(1).unsqueeze(2).to(tokens.dtype)
    return tokens * (1 - weight) + mask_token * weight


QKVBias = bool | Literal["qv"]


class LayerConfig(TypedDict, total=False):
    """Options of a `TransformerEncoderLayer`."""

    num_heads: int
    feedforward_channels: int
    layer_scale_init_value: float
    drop_rate: float
    drop_path_rate: float
    qkv_bias: QKVBias
    norm_cfg: NormConfig
    act_cfg: ActivationConfig


class TransformerEncoderLayer(nn.Module):
    """A pre-norm block: x + gamma1 attention(LN(x)), then x + gamma2 ffn(LN(x)) (Dosovitskiy et al., 2020).

    Args:
        embed_dims: Channels of a token.
        num_heads: Heads of the attention.
        feedforward_channels: Channels between the two linear layers.
        layer_scale_init_value: What gamma1 and gamma2, one number per channel, are at first (Touvron et al., 2021); 0 leaves them
            out.
        drop_rate: Dropout on outputs of linear layers.
        drop_path_rate: Probability with which an image skips a branch in training.
        qkv_bias: Biases of queries, keys and values; "qv": of queries and values alone, as BEiT has it.
        norm_cfg: See `build_norm_layer`.
        act_cfg: See `build_activation_layer`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        layer_scale_init_value: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: QKVBias = True,
        norm_cfg: dict[str, Any] = {"type": "LN", "eps": 1e-6},  # noqa: B006  # read, never written
        act_cfg: dict[str, Any] | None = {"type": "GELU"},  # noqa: B006  # read, never written
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise WrongArgumentError(f"embed_dims={embed_dims} cannot be shared evenly by num_heads={num_heads}")
        attention = BeitAttention if qkv_bias == "qv" else Attention
        self.ln1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = attention(embed_dims, num_heads, qkv_bias=bool(qkv_bias), proj_drop=drop_rate)
        self.ln2 = build_norm_layer(norm_cfg, embed_dims)[1]
        first = nn.Sequential(
            nn.Linear(embed_dims, feedforward_channels), build_activation_layer(act_cfg), nn.Dropout(drop_rate)
        )
        layers = nn.Sequential(first, nn.Linear(feedforward_channels, embed_dims), nn.Dropout(drop_rate))
        self.ffn = nn.Sequential(OrderedDict(layers=layers))  # the names of MMPretrain's weights
        self.drop_path = StochasticDepth(drop_path_rate, "row") if drop_path_rate else nn.Identity()
        scale = torch.full((embed_dims,), float(layer_scale_init_value))
        self.gamma1 = nn.Parameter(scale) if layer_scale_init_value else None
        self.gamma2 = nn.Parameter(scale.clone()) if layer_scale_init_value else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output (N, L, C) for tokens (N, L, C); `bias` (heads, L, L) is added to the attention before its softmax."""
        branch = self.attn(self.ln1(x), None if bias is None else bias[None])
        x = x + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.ffn(self.ln2(x))
        return x + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)


@torch.no_grad()
def shrink_branches(layers: Iterable[nn.Module], first: int = 1) -> None:
    """Divide the last weights of both branches of layer k, counted from `first`, by sqrt(2 k), so that their sum does not grow."""
    for number, layer in enumerate(layers, first):
        for name in ("attn.proj", "ffn.layers.1"):
            layer.get_parameter(f"{name}.weight").div_((2 * number) ** 0.5)
