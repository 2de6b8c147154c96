"""Dtypes, arguments and layouts that are seldom given: the numbers of plain PyTorch, or a refusal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import TOLERANCE, relative_error
from tests.streaming.test_rules import Fn
from widefield.streaming import StreamingCNN, UnsupportedOpError

TILES: tuple[Any, ...] = ((7, None), 5, 64)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "whole numbers above floats": lambda x: torch.cat([(9 * x).long(), x.double()], 2),
    "float32 above float64, and on": lambda x: torch.cat([x, x.double()], 2).mul(3).sum((2, 3)),
    "largest of int32": lambda x: F.max_pool2d((9 * x).int(), 3, 2, 1, ceil_mode=True),
    "where the largest of int64 is": lambda x: F.max_pool2d((9 * x).long(), 3, 2, 1, return_indices=True),
    "a map times a number of float64": lambda x: x * x.double().mean().expand_as(x),
    "softmax of whole numbers": lambda x: (9 * x).long().flatten(2).softmax(-1, dtype=torch.float32),
    "a norm in float64": lambda x: torch.linalg.vector_norm(x + 1e4, dim=(2, 3), dtype=torch.float64),
    "variance of everything": lambda x: x.flatten(2).var(unbiased=False),
    "variance and mean of everything": lambda x: torch.var_mean(x.flatten(2), False),
}


def run(module: nn.Module, image: Tensor) -> list[Tensor]:
    result = module(image)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes_are_those_of_plain_pytorch(name: str) -> None:
    module, image = Fn(FUNCTIONS[name], after=None, before=nn.Identity()), torch.randn(1, 3, 24, 20)
    with torch.no_grad():
        expected = run(module, image)
        for tile in TILES:
            for found, plain in zip(run(StreamingCNN(module, tile, verify=False), image), expected, strict=True):
                assert found.dtype == plain.dtype
                assert relative_error(found, plain) < (1e-9 if plain.dtype == torch.float64 else 1e-5), tile


@pytest.mark.cpu
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool2d(x, 17, 8, 4, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 17, 16, 0, ceil_mode=True),
        lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 16, x.shape[3] // 16)),
    ],
)
def test_means_of_float16_do_not_overflow(pool: Callable[[Tensor], Tensor]) -> None:
    module, image = Fn(pool, after=None, before=nn.Identity()), torch.full((1, 3, 64, 56), 300.0, dtype=torch.float16)
    with torch.no_grad():
        for tile in TILES:
            assert (StreamingCNN(module, tile, verify=False)(image) == 300).all(), tile


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.interpolate((200 * x).byte(), scale_factor=1.5, mode="bilinear"),
        lambda x: F.interpolate((200 * x).byte(), size=(9, 7), mode="bicubic", antialias=True),
        lambda x: torch.einsum("nchh->nc", x),
        lambda x: torch.einsum("nchh,ncww->nc", x, x),
        lambda x: F.channel_shuffle(x.flatten(0, 1), 2),
        lambda x: F.cross_entropy(x, x[:, 0].mT.long()),
        lambda x: F.cross_entropy(x, x.mT.softmax(1), reduction="none"),
    ],
)
def test_what_no_tile_can_know_is_refused_on_square_images_too(function: Callable[[Tensor], object]) -> None:
    with pytest.raises(UnsupportedOpError):
        StreamingCNN(Fn(function, after=None), 8, verify=False)(torch.rand(2, 3, 24, 24))


def test_a_loss_has_the_defaults_that_are_left_out() -> None:
    class Loss(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.hinge_embedding_loss(x, labels)

    image, labels = torch.randn(1, 3, 24, 20, dtype=torch.float64), torch.ones(1, 3, 24, 20, dtype=torch.float64)
    labels[..., ::2] = -1
    found = StreamingCNN(Loss(), 7, verify=False)(image, labels)
    assert relative_error(found, F.hinge_embedding_loss(image, labels)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_numbers_are_scaled_before_they_are_rounded(dtype: torch.dtype) -> None:
    image = torch.tensor([0, 30000, 65535]).to(torch.uint16).expand(1, 3, 24, 3).contiguous()
    streamed = StreamingCNN(Fn(lambda x: x * 2, after=None, before=nn.MaxPool2d(1)), 8, verify=False)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        streamed.module.register_parameter("weight", nn.Parameter(torch.zeros(1, dtype=dtype)))
        found = streamed(image)
    assert found.dtype == dtype and relative_error(found, image.double() / 65535 * 2) < 4e-3
