"""Layers of transformers."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from widefield.components.errors import WrongArgumentError
from widefield.components.layers.norm import build_norm_layer

QKVBias = bool | Literal["qv"]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017): softmax(q k^T / sqrt(d) + bias) v for each head, d channels per head.

    Args:
        embed_dims: Channels of a token.
        num_heads: Heads; they share the channels evenly.
        qkv_bias: Biases of queries, keys and values; "qv": of queries and values alone, as BEiT has it.
        attn_drop_rate: Dropout on the attention weights.
        proj_drop_rate: Dropout on the output.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: QKVBias = True,
        attn_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dims % num_heads:
            raise WrongArgumentError(f"embed_dims={embed_dims} cannot be shared evenly by num_heads={num_heads}")
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop_rate
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias is True)
        self.q_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(embed_dims)) if qkv_bias == "qv" else None
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output (N, L, C) for tokens (N, L, C); `bias` (heads, L, L) is added before the softmax."""
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.attn_drop_rate if self.training else 0.0
        out = functional.scaled_dot_product_attention(
            q, k, v, None if bias is None else bias[None].to(q.dtype), dropped
        )
        result: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return result


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, token by token."""

    def __init__(self, embed_dims: int, hidden_channels: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(embed_dims, hidden_channels), nn.GELU(), nn.Dropout(drop_rate))
        self.layers = nn.Sequential(first, nn.Linear(hidden_channels, embed_dims), nn.Dropout(drop_rate))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class TransformerEncoderLayer(nn.Module):
    """A pre-norm block: x + gamma1 attention(LN(x)), then x + gamma2 ffn(LN(x)) (Dosovitskiy et al., 2020).

    Args:
        embed_dims: Channels of a token.
        num_heads: Heads of the attention.
        feedforward_channels: Channels between the two linear layers.
        layer_scale_init_value: What gamma1 and gamma2, one number per channel, are at first (Touvron et al., 2021); 0 leaves them
            out.
        drop_rate: Dropout on outputs of linear layers.
        attn_drop_rate: Dropout on the attention weights.
        drop_path_rate: Probability with which an image skips a branch in training.
        qkv_bias: See `Attention`.
        norm_cfg: See `build_norm_layer`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        feedforward_channels: int,
        layer_scale_init_value: float = 0.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: QKVBias = True,
        norm_cfg: dict[str, Any] = {"type": "LN", "eps": 1e-6},  # noqa: B006  # read, never written
    ) -> None:
        super().__init__()
        self.ln1 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.attn = Attention(embed_dims, num_heads, qkv_bias, attn_drop_rate, drop_rate)
        self.ln2 = build_norm_layer(norm_cfg, embed_dims)[1]
        self.ffn = FeedForward(embed_dims, feedforward_channels, drop_rate)
        self.drop_path = StochasticDepth(drop_path_rate, "row") if drop_path_rate else nn.Identity()
        scale = torch.full((embed_dims,), float(layer_scale_init_value))
        self.gamma1 = nn.Parameter(scale) if layer_scale_init_value else None
        self.gamma2 = nn.Parameter(scale.clone()) if layer_scale_init_value else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output (N, L, C) for tokens (N, L, C); `bias`: see `Attention`."""
        branch = self.attn(self.ln1(x), bias)
        x = x + self.drop_path(branch if self.gamma1 is None else self.gamma1 * branch)
        branch = self.ffn(self.ln2(x))
        return x + self.drop_path(branch if self.gamma2 is None else self.gamma2 * branch)
