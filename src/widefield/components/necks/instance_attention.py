"""Multiple-instance heads in which every instance looks at every other."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.necks.instance_pooling import InstancePooling, attend
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module()
class ABMILX(InstancePooling):
    """Attention of several heads, each refined by attention among all instances (Tang et al., 2025, https://arxiv.org/abs/2506.02408).

    h_i = gelu(We x_i), in heads of d channels each. Of each head, the score of an instance is s_i = w2 gelu(W1 h_i), by the same
    weights for all heads, and the refined score s_i + v sum_j softmax_j(q_i . k_j / sqrt(d)) s_j, where q and k are linear in the
    layer norm of h. Softmax of it over the instances gives the attention maps (N, heads, h, w), these the weighted sums of h, and
    two linear layers over the sums of all heads the logits. Linear layers are without bias.

    Every instance is compared with every other, so that it does not stream: `widefield.stream` runs it on the whole map.

    Args:
        in_channels: Channels D of the map.
        num_classes: Logits C.
        embed_channels: Rows of We, a multiple of `heads`.
        heads: Attention maps.

    Examples:
        >>> ABMILX(8, 2)(torch.rand(1, 8, 5, 7)).shape
        torch.Size([1, 2])
    """

    def __init__(self, in_channels: int, num_classes: int, embed_channels: int = 512, heads: int = 8) -> None:
        super().__init__(in_channels, num_classes)
        if embed_channels % heads:
            raise WrongArgumentError(f"embed_channels={embed_channels} is no multiple of heads={heads}")
        self.heads = heads
        channels = embed_channels // heads
        self.embedding = nn.Sequential(nn.Linear(in_channels, embed_channels, bias=False), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(channels, channels, bias=False), nn.GELU(), nn.Linear(channels, 1, bias=False)
        )
        self.norm = nn.LayerNorm(channels)
        self.query_key = nn.Linear(channels, 2 * channels, bias=False)
        self.value = nn.Linear(1, 1, bias=False)
        self.projection = nn.Linear(embed_channels, embed_channels, bias=False)
        self.classifier = nn.Linear(embed_channels, num_classes, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        x = self._map(x, mask)
        h = self.embedding(x.flatten(2).transpose(1, 2)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        scores = self.score(h)
        query, key = self.query_key(self.norm(h)).chunk(2, -1)
        seen = None if mask is None else mask.flatten(1)[:, None, None]
        scores = scores + functional.scaled_dot_product_attention(query, key, self.value(scores), seen)
        attention = attend(scores[..., 0].unflatten(2, x.shape[2:]), mask)
        z = torch.einsum("nkp,nkpd->nkd", attention.flatten(2), h)
        logits = self.classifier(self.projection(z.flatten(1)))
        return (logits, attention) if return_attention else logits


class NystromAttention(nn.Module):
    """Attention of all tokens to all by way of a few landmarks (Xiong et al., 2021, https://arxiv.org/abs/2102.03902).

    softmax(Q K'^T) Z softmax(Q' K^T) V, where Q' and K' are the means of Q and K over `landmarks` segments of the sequence, and Z
    is the pseudo-inverse of softmax(Q' K'^T) after `iterations` of the paper's equation; to it is added a convolution of V along
    the sequence, channel by channel of a head. Segments are those of adaptive average pooling, equal ones where they divide the
    sequence; a shorter sequence has as many as tokens.

    Args:
        channels: Of the tokens.
        heads: They divide the channels.
        landmarks: See above.
        iterations: See above.
        kernel_size: Of the convolution, odd.
    """

    def __init__(
        self, channels: int, heads: int = 8, landmarks: int = 256, iterations: int = 6, kernel_size: int = 33
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.query_key_value = nn.Linear(channels, 3 * channels, bias=False)
        self.residual = nn.Conv2d(
            heads, heads, (kernel_size, 1), padding=(kernel_size // 2, 0), groups=heads, bias=False
        )
        self.projection = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return new tokens (N, L, channels), and how the first one looks at all: (N, heads, L)."""
        projected = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = projected.unbind()
        query = query * query.shape[-1] ** -0.5
        count = min(self.landmarks, tokens.shape[1])
        few_queries, few_keys = _segment_means(query, count), _segment_means(key, count)
        to_few = (query @ few_keys.transpose(2, 3)).softmax(-1)
        inverse = pseudo_inverse((few_queries @ few_keys.transpose(2, 3)).softmax(-1), self.iterations)
        from_few = (few_queries @ key.transpose(2, 3)).softmax(-1)
        left = to_few @ inverse
        result = left @ (from_few @ value) + self.residual(value)
        return self.projection(result.transpose(1, 2).flatten(2)), (left[:, :, :1] @ from_few)[:, :, 0]


def _segment_means(x: Tensor, count: int) -> Tensor:
    """Return the means (N, heads, count, d) of `count` segments of x (N, heads, L, d)."""
    return (
        functional.adaptive_avg_pool1d(x.flatten(0, 1).transpose(1, 2), count).transpose(1, 2).unflatten(0, x.shape[:2])
    )


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Return the Moore-Penrose inverses of stochastic matrices (..., n, n), after so many of the iterations of Xiong et al.

    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, from A^T / (|A|_1 |A|_inf) on.
    """
    one = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    norms = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    inverse = matrix.transpose(-1, -2) / norms[..., None, None]
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product))) / 4
    return inverse


class PyramidPositions(nn.Module):
    """Conditional positions: x plus depthwise convolutions of it by kernels of 7, 5 and 3, over tokens laid out as a square.

    Shao et al., 2021, algorithm 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels) for size in (7, 5, 3)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return new tokens of (1, side * side, channels)."""
        side = math.isqrt(tokens.shape[1])
        x = tokens.transpose(1, 2).unflatten(2, (side, side))
        return (x + sum(convolution(x) for convolution in self.convolutions)).flatten(2).transpose(1, 2)


@MODELS.register_module()
class TransMIL(InstancePooling):
    """Transformer over the instances (Shao et al., 2021, https://arxiv.org/abs/2106.00908).

    h_i = relu(W x_i), instances row by row, of which the first come again until their number is a square; a class token before
    them; tokens + attention(norm(tokens)); conditional positions on the square; the same again; norm; a linear layer of the class
    token. The attention is that of Nystrom, see `NystromAttention`. As in the paper, the square is one of the sequence: only
    what stands in a row of the map is near each other in it, and the mask takes instances out of the sequence.

    The attention maps (N, heads, h, w) are those of the class token to the instances in the second layer. As products of
    approximations they need not be positive; what went to the class token itself and to repeated instances is left out.

    Every instance looks at every other, so that it does not stream: `widefield.stream` runs it on the whole map.

    Args:
        in_channels: Channels D of the map.
        num_classes: Logits C.
        embed_channels: Rows of W.
        heads: Of the attention.
        landmarks: Of the attention.

    Examples:
        >>> TransMIL(8, 2, embed_channels=16)(torch.rand(1, 8, 5, 7)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        embed_channels: int = 512,
        heads: int = 8,
        landmarks: int = 256,
    ) -> None:
        super().__init__(in_channels, num_classes)
        if embed_channels % heads:
            raise WrongArgumentError(f"embed_channels={embed_channels} is no multiple of heads={heads}")
        self.embedding = nn.Sequential(nn.Linear(in_channels, embed_channels), nn.ReLU())
        self.class_token = nn.Parameter(torch.randn(1, 1, embed_channels))
        self.norms = nn.ModuleList(nn.LayerNorm(embed_channels) for _ in range(3))
        self.attentions = nn.ModuleList(NystromAttention(embed_channels, heads, landmarks) for _ in range(2))
        self.positions = PyramidPositions(embed_channels)
        self.classifier = nn.Linear(embed_channels, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        x = self._map(x, mask)
        results = [self._of_one(x[n], None if mask is None else mask[n]) for n in range(len(x))]
        logits = torch.cat([one for one, _ in results])
        return (logits, torch.stack([attention for _, attention in results])) if return_attention else logits

    def _of_one(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return logits (1, C) and attention maps (heads, h, w) of one map (D, h, w)."""
        instances = x.flatten(1).T
        if mask is not None:
            instances = instances[mask.flatten()]
        tokens = self.embedding(instances)[None]
        count = tokens.shape[1]
        side = math.ceil(count**0.5)
        tokens = torch.cat([self.class_token, tokens, tokens[:, : side * side - count]], 1)
        tokens = tokens + self.attentions[0](self.norms[0](tokens))[0]
        tokens = torch.cat([tokens[:, :1], self.positions(tokens[:, 1:])], 1)
        change, looks = self.attentions[1](self.norms[1](tokens))
        logits = self.classifier(self.norms[2](tokens + change)[:, 0])
        looks = looks[0, :, 1 : count + 1]
        if mask is None:
            return logits, looks.unflatten(1, x.shape[1:])
        return logits, torch.zeros_like(looks[:, :1]).expand(-1, mask.numel()).masked_scatter(
            mask.flatten(), looks
        ).unflatten(1, mask.shape)
