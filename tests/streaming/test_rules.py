"""Every rule against plain PyTorch on the whole image, in float64."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import TOLERANCE, assert_exact, randomise
from widefield.streaming import StreamingCNN, UnsupportedOpError, stream

TILES = [(7, None), (5, 6), (1, 3), (64, 64)]


class Fn(nn.Module):
    """A function as a module, with a convolution before and after, so that carries have something to carry."""

    def __init__(
        self,
        function: Callable[[Tensor], object],
        channels: int = 8,
        after: int | None = 8,
        before: nn.Module | None = None,
    ):
        super().__init__()
        self.before = before or nn.Conv2d(3, channels, 3, padding=1)
        self.function = function
        self.after = nn.Conv2d(after, 4, 3, padding=1) if after else None

    def forward(self, x: Tensor) -> object:
        y = self.function(self.before(x))
        return self.after(y) if self.after is not None else y


def conv(**options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, **options), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))


CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "no padding": {"kernel_size": 5},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "stride 3 kernel 2": {"kernel_size": 2, "stride": 3},
    "stride larger than the kernel": {"kernel_size": 1, "stride": 2, "padding": 1},
    "stride (2, 1)": {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2)},
    "dilation": {"kernel_size": 3, "dilation": 3, "padding": 3},
    "dilation (1, 2)": {"kernel_size": 3, "dilation": (1, 2), "padding": (1, 4)},
    "groups": {"kernel_size": 3, "groups": 3, "padding": 1},
    "depthwise": {"kernel_size": 7, "groups": 3, "padding": 3},
    "1x7": {"kernel_size": (1, 7), "padding": (0, 3)},
    "7x1": {"kernel_size": (7, 1), "padding": (3, 0)},
    "even kernel": {"kernel_size": 4, "padding": 1, "stride": 2},
    "large padding": {"kernel_size": 3, "padding": 4},
    "same": {"kernel_size": 4, "padding": "same"},
    "same dilated": {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 5, "padding": 3, "padding_mode": "replicate", "stride": 2},
    "reflect same": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    "no bias": {"kernel_size": 3, "bias": False, "stride": 2, "padding": 1},
    "11x11 stride 4": {"kernel_size": 11, "stride": 4, "padding": 2},
}

POOLS = {
    "max 3 s2 p1": nn.MaxPool2d(3, 2, 1),
    "max 3 s2 ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max 3 s2 p1 ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "max 5 s1 p2": nn.MaxPool2d(5, 1, 2),
    "max dilated": nn.MaxPool2d(3, 2, 1, dilation=2),
    "max dilated ceil": nn.MaxPool2d((2, 3), (3, 2), (1, 0), dilation=(1, 2), ceil_mode=True),
    "avg 3 s1 p1": nn.AvgPool2d(3, 1, 1),
    "avg 3 s2 p1 excluding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg 3 s2 p1 ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg 3 s2 p1 ceil excluding": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg 4 s3 ceil": nn.AvgPool2d(4, 3, ceil_mode=True),
    "avg divisor": nn.AvgPool2d((2, 3), 2, (1, 0), divisor_override=5),
}

TRANSPOSED = {
    "k2 s2": {"kernel_size": 2, "stride": 2},
    "k3 s2 p1 op1": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "k4 s2 p1": {"kernel_size": 4, "stride": 2, "padding": 1},
    "k3 s1": {"kernel_size": 3},
    "k3 s1 p2": {"kernel_size": 3, "padding": 2},
    "k2 s3": {"kernel_size": 2, "stride": 3, "output_padding": 2},
    "k1 s4": {"kernel_size": 1, "stride": 4},
    "k5 s3 p2 d2": {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": 2, "output_padding": (1, 2)},
    "groups no bias": {"kernel_size": (3, 2), "stride": (1, 2), "groups": 2, "bias": False},
}

FUNCTIONS: dict[str, Callable[[Tensor], object]] = {
    "adaptive average pooling by about 2": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2)),
    "adaptive max pooling by about 2": lambda x: F.adaptive_max_pool2d(x, (x.shape[2] // 2, x.shape[3] // 3)),
    "adaptive max pooling with ties": lambda x: F.adaptive_max_pool2d(x.round(), (x.shape[2] // 3, x.shape[3] // 3)),
    "adaptive average pooling to more cells": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] * 2 + 1, x.shape[3] + 2)),
    "nearest (3, 1)": lambda x: F.interpolate(x, scale_factor=(3, 1), mode="nearest"),
    "nearest by size": lambda x: F.interpolate(x, size=(x.shape[2] * 7, x.shape[3] * 7), mode="nearest"),
    "nearest down": lambda x: F.interpolate(x[:, :, :22, :18], scale_factor=0.5, mode="nearest"),
    "nearest to an odd size": lambda x: F.interpolate(x, size=(x.shape[2] * 2 + 1, x.shape[3] - 3), mode="nearest"),
    "nearest-exact to an odd size": lambda x: F.interpolate(x, size=(x.shape[2] + 5, 7), mode="nearest-exact"),
    "nearest by 1.3": lambda x: F.interpolate(x, scale_factor=1.3, mode="nearest"),
    "nearest-exact 3": lambda x: F.interpolate(x, scale_factor=3, mode="nearest-exact"),
    "bilinear 3": lambda x: F.interpolate(x, scale_factor=3, mode="bilinear"),
    "bilinear corners": lambda x: F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=True),
    "bilinear to odd size": lambda x: F.interpolate(x, size=(41, 13), mode="bilinear"),
    "bilinear by almost 3": lambda x: F.interpolate(x, scale_factor=3.000000003, mode="bilinear"),
    "bicubic by almost 1/3": lambda x: F.interpolate(x, scale_factor=0.333333333, mode="bicubic"),
    "bilinear antialiased to fewer": lambda x: F.interpolate(x, size=(9, 6), mode="bilinear", antialias=True),
    "bicubic antialiased by 0.4": lambda x: F.interpolate(x, scale_factor=0.4, mode="bicubic", antialias=True),
    "bicubic antialiased to more": lambda x: F.interpolate(x, size=(31, 50), mode="bicubic", antialias=True),
    "bilinear antialiased corners": lambda x: F.interpolate(
        x, size=(11, 40), mode="bilinear", antialias=True, align_corners=True
    ),
    "bicubic corners": lambda x: F.interpolate(x, size=(31, 50), mode="bicubic", align_corners=True),
    "space to depth by view": lambda x: x[:, :2, :22, :18].reshape(1, 2, 11, 2, 9, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 8, 11, 9),
    "depth to space by view": lambda x: x.reshape(1, 2, 2, 2, x.shape[2], x.shape[3]).permute(0, 1, 4, 2, 5, 3).reshape(1, 2, x.shape[2] * 2, x.shape[3] * 2).repeat(1, 4, 1, 1),
    "pad with a value": lambda x: F.pad(x, (0, 5, 0, 5), value=2.0),
    "pad channels": lambda x: F.pad(x, (1, 0, 0, 1, 2, 1))[:, 1:9],
    "crop": lambda x: F.pad(x, (-2, 1, 3, -4)),
    "cat": lambda x: torch.cat([x[:, :4], x.relu()[:, 4:]], 1),
    "cat of two parts along the height": lambda x: torch.cat([x[:, :, 5:], x[:, :, :5]], 2),
    "cat of two parts, the last one first": lambda x: torch.cat([x[..., -3:].relu(), x[..., :-3]], 3) + x,
    "cat of borders around a map": lambda x: torch.cat([x[:, :, :1], x.tanh(), x[:, :, -2:], x[:, :, 4:5]], 2),
    "circular padding": lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"),
    "circular padding twice": lambda x: F.avg_pool2d(F.pad(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1).tanh(), (0, 2, 2, 0), mode="circular"), 3, 1) * x,
    "circular padding and strides": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 2) * x.mean((2, 3), keepdim=True),
    "cat shifted branches": lambda x: torch.cat([F.avg_pool2d(x, 5, 1, 2)[:, :2], x[:, 2:]], 1),
    "stack and unbind": lambda x: sum(torch.stack([x, x * 2], 1).unbind(1)),
    "stack in front": lambda x: torch.stack([x, x.tanh()], 0).sum(0),
    "split": lambda x: torch.cat(torch.split(x, [1, 4, 3], 1)[::-1], 1),
    "chunk": lambda x: torch.cat([c.sigmoid() * k for k, c in enumerate(x.chunk(3, 1))], 1),
    "channel shuffle by view": lambda x: x.view(1, 4, 2, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape),
    "roll rows": lambda x: x.roll(-3, 2),
    "roll rows, columns and channels": lambda x: x.roll((5, -2, 1), (2, -1, 1)),
    "roll and back, beside itself": lambda x: x + F.avg_pool2d(x.roll((-3, 3), (2, 3)), 3, 1, 1).roll((3, -3), (2, 3)),
    "roll more than the map": lambda x: x.roll(2 * x.shape[2] + 1, 2) + x,
    "pooling, strides and padding of a rolled map": lambda x: F.pad(F.max_pool2d(x.roll((4, 3), (2, 3)), 3, 2, 1), (1, 2, 3, 0)) ,
    "reflection of a rolled map": lambda x: F.pad(x.roll((4, -3), (2, 3)), (1, 2, 3, 0), mode="reflect"),
    "resizing of a rolled map": lambda x: F.interpolate(x.roll((4, -3), (2, 3)), scale_factor=2, mode="bilinear"),
    "crop of a rolled map": lambda x: x.roll((-4, -3), (2, 3))[:, :, 2:19, :15],
    "a rolled map times a position grid": lambda x: x.roll(-2, 2) * torch.linspace(-1, 1, x.shape[2], dtype=x.dtype).view(-1, 1),
    "a rolled map times its mean": lambda x: x.roll(-2, 2) * x.roll(3, 3).mean((2, 3), keepdim=True),
    "pooling of a rolled map to a grid": lambda x: x + F.adaptive_avg_pool2d(x.roll((-2, 3), (2, 3)), (3, 2)).mean((2, 3), keepdim=True),
    "dropout of nothing of a rolled map": lambda x: F.dropout(x.roll(2, 3), 0.0),
    "attention in windows": lambda x: _in_windows(x, lambda w: F.scaled_dot_product_attention(w, w.cos(), w * 2)),
    "attention in shifted windows": lambda x: _in_windows(x.roll((-1, -2), (2, 3)), lambda w: F.scaled_dot_product_attention(w, w, w, _shift_mask(w), scale=0.7)).roll((1, 2), (2, 3)),
    "attention in windows by matmul": lambda x: _in_windows(x, lambda w: (w @ w.mT / 3).softmax(-1) @ w),
    "grouped attention in windows": lambda x: _in_windows(x, lambda w: _grouped(w)),
    "attention in windows to what is not masked": lambda x: _in_windows(x, lambda w: F.scaled_dot_product_attention(w, w, w, _shift_mask(w) > 0)),
    "causal attention in windows": lambda x: _in_windows(x, lambda w: F.scaled_dot_product_attention(w, w.cos(), w, is_causal=True)),
    "heads merged with windows": lambda x: _in_windows(x, lambda w: _heads(w)),
    "attention in windows by einsum": lambda x: _in_windows(x, lambda w: torch.einsum("bij,bjc->bic", torch.einsum("bic,bjc->bij", w, w).softmax(-1), w)),
    "pooling of the first tokens of each window": lambda x: _unrolled(x[:, :, :22, :18]),
    "negative indices": lambda x: x[:, torch.tensor([-1, 0, 2, -2, 1, 1, -8, 3])],
    "negative bounds": lambda x: x[:, :, -15:-1:2, :-2],
    "strided slice": lambda x: x[:, :, 1::2, ::3],
    "patch merging by slices": lambda x: torch.cat([x[:, :2, i : 22 : 2, j : 18 : 2] for i in (0, 1) for j in (0, 1)], 1),
    "log softmax, channels last": lambda x: x.permute(0, 2, 3, 1).log_softmax(-1).movedim(-1, 1),
    "mean over channels": lambda x: x * x.mean(1, keepdim=True) + x.amax(1, keepdim=True),
    "mean without keepdim": lambda x: x - x.mean(1)[:, None] + x.var(1).unsqueeze(1),
    "norm over channels": lambda x: F.normalize(x, dim=1),
    "max over channels": lambda x: x + x.max(1, keepdim=True).values - x.min(dim=1, keepdim=True)[0],
    "topk of channels": lambda x: torch.cat([x.topk(3, 1)[0], x.topk(5, 1, largest=False)[0]], 1),
    "middle channels": lambda x: x * x.median(1, keepdim=True)[0] + x.kthvalue(3, 1, keepdim=True)[0] - x.nansum(1, keepdim=True) + x.nanmedian(1)[0][:, None],
    "extremes of channels": lambda x: x * torch.aminmax(x, dim=1, keepdim=True)[0] - x.count_nonzero(1)[:, None] + x.round().mode(1, keepdim=True)[0],
    "operators made of others": lambda x: torch.hstack([x.diff(dim=1), x[:, :1].tile(1, 2, 1, 1)])[:, :8] * F.cosine_similarity(x, x.cos(), 1)[:, None] + x.nanmean(1, keepdim=True) + torch.take_along_dim(x, x.detach().argsort(1), 1),
    "a norm of matrices, and products of vectors": lambda x: x * torch.linalg.matrix_norm(x.movedim(1, -1).unflatten(-1, (2, 4)))[:, None] + torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1)[:, :1],
    "convolution along channels too": lambda x: F.conv3d(x[:, None], torch.arange(54).to(x).sin().view(2, 1, 3, 3, 3), padding=1, stride=(2, 1, 2), dilation=(1, 2, 1)).flatten(1, 2),
    "convolution of values beside a map": lambda x: F.conv3d(x.movedim(1, -1)[:, None], torch.arange(18).to(x).sin().view(2, 1, 3, 3, 1), padding=(1, 1, 0))[:, 0].movedim(-1, 1),
    "local response norm": lambda x: F.local_response_norm(x, 3),
    "repeat_interleave": lambda x: x[:, :4].repeat_interleave(2, 1).repeat_interleave(3, 2).repeat_interleave(2, -1),
    "unfold": lambda x: F.unfold(x, 3, padding=1).view(1, 72, *x.shape[2:])[:, ::9],
    "unfold with strides": lambda x: F.unfold(x, (2, 3), (1, 2), (1, 0), (2, 3)).unflatten(2, ((x.shape[2] + 2) // 2, -1))[:, 2:10],
    "fold of what was unfolded": lambda x: F.fold(F.unfold(x, 3, padding=1).cos(), x.shape[-2:], 3, padding=1),
    "fold with strides": lambda x: F.fold(F.unfold(x, (2, 3), (1, 2), (1, 0), (2, 3)) * 2, x.shape[-2:], (2, 3), (1, 2), (1, 0), (2, 3)),
    "fold of blocks": lambda x: F.fold(x.flatten(2), (2 * x.shape[2], 2 * x.shape[3]), 2, stride=2).repeat(1, 4, 1, 1),
    "unpooling with padding": lambda x: _unpooled(x, (2, 3), (3, 4), (1, 0)),
    "unpooling of a rolled map": lambda x: _unpooled(x.roll((-2, 3), (2, 3)), 2, 2, 0).roll((2, -3), (2, 3)) * x,
    "convex upsampling": lambda x: _upsampled(x),
    "deformable convolution": lambda x: _deformed(x, 2.5 * _channels(x, 18).tanh(), padding=1),
    "deformable convolution with a mask": lambda x: _deformed(x, torch.cat([-_channels(x, 9).clamp(-1, 3), _channels(x, 9).sigmoid() + 0.5], 1)[:, :, ::2, ::3], _channels(x, 9).sigmoid()[:, :, ::2, ::3], stride=(2, 3), padding=(2, 1), dilation=(2, 1)),
    "Fourier transforms of channels": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.arange(5).to(x).view(5, 1, 1) * (1 - 2j), n=8, dim=1),
    "Fourier transforms of tokens": lambda x: torch.fft.fft(x.flatten(2).mT, norm="ortho").imag.mT.view(x.shape) * torch.fft.ifft2(x.movedim(1, -1).unflatten(-1, (2, 4))).flatten(-2).real.movedim(-1, 1),
    "complex maps": lambda x: (torch.view_as_complex(torch.view_as_real(torch.polar(x.abs(), x)) * 2).conj() * torch.complex(x, x.cos())).angle() * (x + 1j * x.flip(1)).abs(),
    "arithmetic": lambda x: (x + 1) * x.sigmoid() - x / (2 + x.abs()) + torch.where(x > 0, x, x * 0.1) ** 2,
    "comparison": lambda x: x * (x > x.mean(1, keepdim=True)) + torch.maximum(x, -x) + x.clamp(-0.5, 0.5),
    "activations": lambda x: F.gelu(F.silu(x)) + F.hardswish(x) + F.elu(x) + F.mish(x) + F.leaky_relu(x) + F.softplus(x) + F.relu6(x) + F.hardsigmoid(x) + F.gelu(x, approximate="tanh") + F.softsign(x) + F.logsigmoid(x) + F.tanhshrink(x),
    "rectified three times": lambda x: x.relu().relu().relu(),
    "in-place": lambda x: (x * 2).relu_() + x.mul(3).add_(x[:, :1]),
    "in-place on a slice": lambda x: _fill_slice(x),
    "residual": lambda x: x + F.avg_pool2d(x, 3, 1, 1),
    "constants": lambda x: x * torch.linspace(0, 1, 8).view(1, 8, 1, 1).to(x) + torch.ones_like(x),
    "detach": lambda x: x * x.detach(),
    "position grid": lambda x: x + torch.linspace(-1, 1, x.shape[2], dtype=x.dtype).view(1, 1, -1, 1) * torch.linspace(0, 1, x.shape[3], dtype=x.dtype),
}  # fmt: skip


def _in_windows(x: Tensor, attention: Callable[[Tensor], Tensor], size: int = 4) -> Tensor:
    """Windows of `size` as tokens (N * windows, size * size, C), and back, as torchvision's Swin has them."""
    (batch, channels, height, width), x = x.shape, x.permute(0, 2, 3, 1)
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    rows, cols = x.shape[1] // size, x.shape[2] // size
    x = x.view(batch, rows, size, cols, size, channels).permute(0, 1, 3, 2, 4, 5)
    x = attention(x.reshape(batch * rows * cols, size * size, channels))
    x = x.view(batch, rows, cols, size, size, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * size, cols * size, channels)[:, :height, :width].permute(0, 3, 1, 2)


def _heads(windows: Tensor) -> Tensor:
    """Attention of two heads, which stand in one dimension with the windows."""
    count, length, channels = windows.shape
    apart = windows.view(count, length, 2, channels // 2).transpose(1, 2).reshape(count * 2, length, channels // 2)
    made = torch.bmm((apart @ apart.mT / 3).softmax(-1), apart)
    return made.view(count, 2, length, channels // 2).transpose(1, 2).reshape(count, length, channels)


def _unrolled(x: Tensor) -> Tensor:
    """Windows of 2 x 2, of which the first token of all comes first, then the second ones, pooled as Hiera does."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 2, 4, 1)
    tokens = x.reshape(batch, height * width, channels) * 2
    pooled = tokens.view(batch, 2, -1, channels).amax(1) + tokens.unflatten(1, (2, -1)).mean(1)
    return pooled.view(batch, 2, height // 2, width // 2, channels).sum(1).permute(0, 3, 1, 2)


def _grouped(windows: Tensor) -> Tensor:
    """Attention of four heads, of which two have keys and values in common."""
    heads = windows.unflatten(2, (4, 2)).transpose(1, 2)
    few = heads[:, :2].cos()
    made = F.scaled_dot_product_attention(heads, few, 2 * few, enable_gqa=True)
    return made.transpose(1, 2).flatten(2)


def _upsampled(x: Tensor) -> Tensor:
    """Each pixel as a convex combination of 3 x 3 around it, twice as large, as RAFT does."""
    batch, _, height, width = x.shape
    weights = torch.cat([x, x.cos(), x.sin(), x * 2, x[:, :4]], 1).view(batch, 1, 9, 2, 2, height, width).softmax(2)
    around = F.unfold(8 * x, [3, 3], padding=1).view(batch, 8, 9, 1, 1, height, width)
    fine = (weights * around).sum(2).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(batch, 8, 2 * height, 2 * width)


def _unpooled(x: Tensor, *window: int | tuple[int, int]) -> Tensor:
    pooled, indices = F.max_pool2d(x, *window, return_indices=True)
    return F.max_unpool2d(pooled.tanh(), indices, *window, x.shape[-2:])


def _channels(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x.sin(), 3 * x.cos()], 1)[:, :count]


def _deformed(x: Tensor, offset: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    weight = torch.arange(8 * 8 * 9).to(x).sin().view(8, 8, 3, 3)
    return torchvision.ops.deform_conv2d(x, offset, weight, mask=mask, **options)


def _shift_mask(windows: Tensor) -> Tensor:
    """Some mask that differs from window to window."""
    count, length, _ = windows.shape
    return torch.arange(count * length * length, dtype=windows.dtype).view(count, length, length).sin() * 3


def _fill_slice(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] += 1
    y[:, 3] = 0.0
    return y


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    torch.manual_seed(0)
    assert_exact(conv(**CONVOLUTIONS[name]), torch.randn(2, 3, 23, 19), TILES)


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str) -> None:
    torch.manual_seed(0)
    assert_exact(Fn(POOLS[name]), torch.randn(1, 3, 23, 19), TILES)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions(name: str) -> None:
    torch.manual_seed(0)
    assert_exact(Fn(nn.ConvTranspose2d(4, 6, **TRANSPOSED[name]), 4, 6), torch.randn(1, 3, 11, 9), TILES)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 2, padding=(2, 5), stride=(1, 3)),
        nn.Conv2d(4, 4, (2, 1), padding=4, dilation=2, groups=4),
        nn.ConvTranspose2d(4, 4, 2, 5, output_padding=4),
        nn.ConvTranspose2d(4, 4, (1, 2), (3, 4), padding=(2, 0), output_padding=(0, 3)),
        nn.ConvTranspose2d(4, 4, 1, output_padding=2, dilation=3),
    ],
    ids=str,
)
def test_outputs_that_no_input_reaches(layer: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), layer, nn.Conv2d(4, 2, 3, padding=1))
    assert_exact(module, torch.randn(1, 3, 20, 12), [(5, None), (1, 3)])


@pytest.mark.cpu
def test_indices_out_of_range_raise_the_error_of_plain_indexing() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), Fn(lambda x: x[:, torch.tensor([0, 4])], after=None, before=nn.Identity())
    )
    with pytest.raises(IndexError, match="index 4 is out of bounds"):
        StreamingCNN(module, 8)(torch.randn(1, 3, 23, 19))


@pytest.mark.parametrize("size", [(7, 1), (1, 7), (2, 1)], ids=str)
def test_one_row_or_column_is_flattened_as_others_are(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = Fn(lambda x: x.flatten(2).softmax(-1) @ x.flatten(2).mT, after=None)
    assert_exact(module, torch.randn(2, 3, *size), [3])


def test_the_mean_of_a_complex_map_runs_whole() -> None:
    torch.manual_seed(0)
    assert_exact(
        Fn(lambda x: x * (x * (1 + 2j)).mean((2, 3), keepdim=True).abs()), torch.randn(1, 3, 23, 19), [7], wrap=stream
    )


def test_a_complex_result_and_one_between_two_scans_are_exact() -> None:
    torch.manual_seed(0)
    module = Fn(lambda x: torch.fft.fft(x, dim=1) / x.std((2, 3), keepdim=True) * (1 - 1j), after=None).double()
    image = torch.randn(1, 3, 23, 19).double()
    expected = module(image)
    found = StreamingCNN(module, 5, verify=False)(image)
    assert found.dtype == torch.complex128
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    weights = torch.randn_like(expected.real) * (2 + 1j)
    grads = [torch.autograd.grad((x * weights).real.sum(), tuple(module.parameters())) for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=TOLERANCE, atol=TOLERANCE)


class Looking(nn.Module):
    """A network that looks at its image, or at a map of it, the other way round too."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.before, self.after = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 2, (3, 2), padding=(2, 0), dilation=2)
        self.net = nn.Sequential(
            nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(6, 6, 3, padding=1), nn.Upsample(scale_factor=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FLIPPED: dict[str, Callable[[Looking, Tensor], Tensor]] = {
    "three ways, flipped back": lambda m, x: sum(m.after(m.net(m.before(x.flip(d)))).flip(d) for d in ([1], [3], [2, 3])),
    "a flipped result": lambda m, x: (m.after(m.before(x.flip(2))), x.flip(3), x.flip((2, 3)).flatten(2)),
    "reductions": lambda m, x: m.before(x) * m.before(x.flip((3, 1))).mean((2, 3), keepdim=True) + m.before(x).flip(2).amax((2, 3), True),
    "a grid of positions": lambda m, x: (m.before(x).flip(2) * torch.linspace(-1, 1, 12, dtype=x.dtype).view(-1, 1)).flip(2),
    "cells": lambda m, x: F.adaptive_avg_pool2d(m.before(x).flip(2), (3, 2)).flatten(1) + F.adaptive_max_pool2d(x.round().flip(3), (4, 3)).flatten(1),
    "windows, slices and padding": lambda m, x: F.pad(F.pad(_in_windows(m.before(x).flip(3), lambda w: (w @ w.mT).softmax(-1) @ w), (1, 0, 2, 3)), (1, 4, 0, 2), mode="reflect")[:, :, 3::2, 1:].flip(3),
    "ties": lambda m, x: F.max_pool2d(x.round().flip(3), 3, 2, 1).flip(3) + F.interpolate(m.before(x)[:, :3].flip(2), size=(12, 10)).flip(2),
    "norms": lambda m, x: F.group_norm(m.before(x).flip(2), 2).flip(2).flatten(2).softmax(-1) + F.layer_norm(m.before(x).flip(3), (12, 10), torch.arange(120).to(x).view(12, 10)).flip(3).flatten(2),
    "tokens of a window": lambda m, x: _in_windows(m.before(x), lambda w: (w @ w.mT).flip(1) @ w),
    "a small whole map": lambda m, x: m.before(x) * F.adaptive_avg_pool2d(m.before(x), 4).flip(3).softmax(2).amax((2, 3), keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", FLIPPED)
def test_flipped_maps_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "window" in name:
        monkeypatch.setattr("widefield.streaming.capture._SYMBOLIC_LIMIT", 0.0)
    torch.manual_seed(0)
    assert_exact(Looking(FLIPPED[name]), torch.randn(1, 3, 23, 19), [(5, 6)])


def test_nan_passes_through() -> None:
    image = torch.randn(1, 3, 14, 11).double()
    image[0, 1, 5, 4] = torch.nan
    for function in (
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: x.amax((2, 3)),
        lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    ):
        module = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), Fn(function, after=None, before=nn.Identity())).double()
        plain, streamed = (image.clone().requires_grad_() for _ in range(2))
        expected, found = module(plain), StreamingCNN(module, 4)(streamed)
        torch.testing.assert_close(found, expected, equal_nan=True)
        expected.sum().backward()
        found.sum().backward()
        torch.testing.assert_close(streamed.grad, plain.grad, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "windows" in name:  # a trace for all sizes takes several times as long, and gives the same operations
        monkeypatch.setattr("widefield.streaming.capture._SYMBOLIC_LIMIT", 0.0)
    if name == "bilinear by almost 3" and torch.get_default_device().type == "cuda":
        pytest.skip("PyTorch's own kernels differ by 1e-7")
    torch.manual_seed(0)
    assert_exact(Fn(FUNCTIONS[name]), torch.randn(1, 3, 23, 19), TILES)


def test_ties_in_max_pooling_go_as_on_the_whole_image() -> None:
    image = torch.randint(0, 2, (1, 3, 21, 22)).double()
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2, 2, ceil_mode=True)):
        assert_exact(nn.Sequential(nn.Identity(), nn.ReLU(), pool), image, [(4, 5)])


def test_positions_of_max_pooling_are_those_in_the_whole_image() -> None:
    image = torch.randint(0, 2, (2, 3, 21, 22)).double()
    image[:, :, :7, :7] = -torch.inf  # windows of which none is larger than padding
    for window in ((3, 2, 1), (2, 2, 0, 1, True), ((4, 3), 3, (2, 1))):
        module = Fn(lambda x, window=window: F.max_pool2d(x, *window, return_indices=True)[1], after=None)
        module.before = nn.Identity()
        assert_exact(nn.Sequential(nn.Identity(), module), image, [(4, 5), (1, None)])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_tiny_images(size: tuple[int, int]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 7, padding=3))
    assert_exact(randomise(module), torch.randn(2, 3, *size), [(1, 1)])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("part", ["all of a map", "a map that is expanded over the batch", "some of its channels"])
def test_every_second_position_beside_another_reader(part: str, layout: torch.memory_format) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8 if "channels" not in part else 4, 5, 1, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            y = y.expand(3, -1, -1, -1) if "expanded" in part else y
            return self.one(y[:, 2:6] if "channels" in part else y), F.avg_pool2d(y, 2)

    for size in ((17, 18), (17, 33)):
        assert_exact(Net().to(memory_format=layout), torch.randn(1, 3, *size), [64, (8, None), 9])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("circular padding by half of a large map", lambda x: F.pad(F.interpolate(x, scale_factor=10), (0, 0, 65, 0), mode="circular")),
        ("two large maps, one above the other", lambda x: torch.cat([F.interpolate(x, scale_factor=10)] * 2, 2)),
        ("softmax over space", lambda x: x.softmax(-1)),
        ("a map beside its mirror image", lambda x: x + x.flip(3)),
        ("a rolled map that is flipped", lambda x: x.roll(2, 3).flip(3)),
        ("a flipped map that is rolled", lambda x: x.flip(2).roll(2, 2)),
        ("spatial matmul", lambda x: x @ x.transpose(2, 3)),
        ("fft over positions", lambda x: torch.fft.fft2(x).real),
        ("fft along the width", lambda x: torch.fft.rfft(x).abs()),
        ("roll of all positions", lambda x: x.roll(1)),
        ("roll by half of a large map", lambda x: F.interpolate(x, scale_factor=10).roll(100, 2)),
        ("deformable convolution without bounds", lambda x: torchvision.ops.deform_conv2d(x, _channels(x, 18), torch.ones(8, 8, 3, 3).to(x), padding=1)),
        ("cumsum over width", lambda x: x.cumsum(3)),
        ("unpooling to positions of windows that overlap", lambda x: F.max_unpool2d(*F.max_pool2d(x, 3, 2, 1, return_indices=True), 3, 2, 1, x.shape[-2:])),
        ("unpooling to positions that were computed", lambda x: F.max_unpool2d(x, x.argsort(1), 2)),
        ("self-attention", lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT] * 3)),
        ("a quantile of the image", lambda x: x.quantile(0.5)),
        ("variance over height", lambda x: x.var(2)),
        ("tokens after a class token", lambda x: torch.cat([x.flatten(2).mT[:, :1] * 0, x.flatten(2).mT], 1)),
        ("the mean of a complex map", lambda x: (x * 2j).mean((2, 3)).abs()),
        ("an empty map", lambda x: (x, x[:, :, : x.shape[2] // 32])),
        ("nearest by 2.01", lambda x: F.interpolate(x, scale_factor=2.01)),
        ("nearest by 1.003", lambda x: F.interpolate(x, scale_factor=1.003)),
        ("bilinear by a factor that changes no size", lambda x: F.interpolate(x, scale_factor=(1.01, 2.0), mode="bilinear")),
        ("transposed sum", lambda x: x[:, :, :17, :17] + x[:, :, :17, :17].transpose(2, 3)),
    ],
)  # fmt: skip
def test_what_is_not_local_is_refused_by_name(name: str, function: Callable[[Tensor], object]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), Fn(function, after=None, before=nn.Identity()))
    with pytest.raises(UnsupportedOpError) as caught:
        StreamingCNN(module, 8)(torch.randn(1, 3, 23, 19))
    assert caught.value.op
    assert "What to do" in str(caught.value)
    assert caught.value.module_path.startswith("1") or caught.value.module_path == ""
