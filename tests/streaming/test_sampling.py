"""Sampling by grids, and what is known of numbers before they are computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import assert_exact, relative_error
from tests.streaming.test_rules import Fn
from widefield.streaming import StreamingCNN, UnsupportedOpError
from widefield.streaming.capture import trace_module
from widefield.streaming.captured import CallKind
from widefield.streaming.placing import Placing


def own_places(x: Tensor, corners: bool) -> Tensor:
    """The grid by which each position reads itself."""
    return F.affine_grid(torch.eye(2, 3, dtype=x.dtype)[None].expand(len(x), -1, -1), x[:, :1].shape, corners)


def by_pixels(x: Tensor, flow: Tensor, corners: bool = True, **options: object) -> Tensor:
    """`x` where a flow (N, 2, H, W) in pixels says, as networks for optical flow and registration warp."""
    height, width = x.shape[-2:]
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack((cols, rows), 0)[None].to(x.dtype) + flow
    size = torch.tensor([width, height], dtype=x.dtype).view(1, 2, 1, 1)
    at = 2 * at / (size - 1) - 1 if corners else (2 * at + 1) / size - 1
    return F.grid_sample(x, at.permute(0, 2, 3, 1), align_corners=corners, **options)


def near(x: Tensor, mode: str, padding: str, corners: bool, far: float = 2.6) -> Tensor:
    """`x` up to `far` pixels away from each position."""
    size = torch.tensor([x.shape[3], x.shape[2]], dtype=x.dtype)
    offsets = x[:, :2].tanh().permute(0, 2, 3, 1) * (2 * far / size)
    return F.grid_sample(x, own_places(x, corners) + offsets, mode, padding, corners)


def resampled(x: Tensor, size: tuple[int, int], zoom: float, **options: object) -> Tensor:
    theta = torch.tensor([[zoom, 0.0, 0.02], [0.0, zoom, -0.1]], dtype=x.dtype).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, [len(x), 1, *size], False), align_corners=False, **options)


def turned_by_what_it_sees(x: Tensor) -> Tensor:
    """A small spatial transformer, of which forward bounds the matrix."""
    theta = torch.eye(2, 3, dtype=x.dtype) + 0.05 * x.mean((2, 3))[:, :6].tanh().view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, False), align_corners=False)


def by_linspace(x: Tensor) -> Tensor:
    rows, cols = (torch.linspace(-1, 1, n, dtype=x.dtype) for n in x.shape[2:])
    grid = torch.cat(
        [cols.view(1, 1, -1, 1).expand(1, len(rows), -1, 1), rows.view(1, -1, 1, 1).expand(1, -1, len(cols), 1)], 3
    )
    offsets = F.interpolate(x[:, :2, ::2, ::2].sigmoid() - 0.5, size=x.shape[2:], mode="bilinear") / 4
    return F.grid_sample(x, (grid + offsets.movedim(1, -1)).clamp(-1, 1), align_corners=True)


def a_table(x: Tensor) -> Tensor:
    """Colours looked up in a table of 5 x 5 x 5."""
    table = torch.arange(3 * 125, dtype=x.dtype).sin().view(1, 3, 5, 5, 5)
    return F.grid_sample(table, x[:, :3].movedim(1, -1)[:, None], align_corners=True)[:, :, 0].repeat(1, 3, 1, 1)[:, :8]


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        f"{mode}, {padding}, corners {'aligned' if corners else 'apart'}": lambda x, m=mode, p=padding, c=corners: near(x, m, p, c)
        for mode in ("bilinear", "nearest", "bicubic")
        for padding in ("zeros", "border", "reflection")
        for corners in (False, True)
    },
    "at each position itself": lambda x: near(x, "bilinear", "zeros", False, 0.0) + near(x, "bilinear", "border", True, 0.0),
    "a flow in pixels": lambda x: by_pixels(x, x[:, :2].clamp(-4, 1)),
    "a flow in pixels, reflected": lambda x: by_pixels(x, 3 * x[:, 1:3].sin() - 4, False, padding_mode="reflection"),
    "a flow far beyond one border": lambda x: by_pixels(x, 5 * x[:, 1:3].sigmoid() - 19.5, mode="bicubic", padding_mode="border"),
    "a linspace, and offsets that were resized and cut off": by_linspace,
    "a grid of numbers to another size": lambda x: resampled(x, (13, 31), 0.8),
    "a grid of numbers beyond all borders": lambda x: resampled(x, (9, 12), 1.7, mode="bicubic", padding_mode="reflection"),
    "a matrix with bounds": turned_by_what_it_sees,
    "a rolled map": lambda x: near(x.roll((-3, 2), (2, 3)), "bilinear", "border", False).roll((3, -2), (2, 3)) * x,
    "a table for all positions": a_table,
}  # fmt: skip


@pytest.mark.parametrize("name", GRIDS)
def test_sampling_near_each_position_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (
        "corners" in name
    ):  # of the kernel's options one trace for all sizes knows no more than one for this size, and takes longer
        monkeypatch.setattr("widefield.streaming.capture._SYMBOLIC_LIMIT", 0.0)
    torch.manual_seed(0)
    assert_exact(Fn(GRIDS[name]), torch.randn(1, 3, 17, 13), [(6, 5), (1, None)])


def test_a_batch_of_grids_is_exact() -> None:
    torch.manual_seed(0)
    module = Fn(lambda x: torch.cat([near(x, "bilinear", "zeros", False), turned_by_what_it_sees(x)], 1), after=16)
    assert_exact(module, torch.randn(2, 3, 1, 17), [4])
    assert_exact(module, torch.randn(2, 3, 18, 1), [4])


def test_offsets_that_autocast_rounds_are_within_the_bounds() -> None:
    torch.manual_seed(0)
    module = Fn(
        lambda x: by_pixels(x, (x[:, :2].tanh() * 0.01 - 15.04).float() * 3.985), after=None
    )  # -60.02 for -59.93
    image = torch.randn(1, 3, 80, 90)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = StreamingCNN(module, 16, verify=False)(image), module(image)
    assert found.dtype == expected.dtype == torch.float32
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: by_pixels(x, x[:, :2]), "how far each is from its own place is not known"),
        (lambda x: F.grid_sample(x, -own_places(x, True), align_corners=True), "moves on by -1 for each position"),
        (lambda x: F.grid_sample(F.interpolate(x, scale_factor=8), x[:, :2].tanh().movedim(1, -1), align_corners=True), "of 1"),
    ],
    ids=["no bounds", "a flip", "anywhere"],
)  # fmt: skip
def test_sampling_far_away_is_refused_with_the_reason(function: Callable[[Tensor], Tensor], expected: str) -> None:
    with pytest.raises(UnsupportedOpError, match=expected):
        StreamingCNN(
            nn.Sequential(nn.Conv2d(3, 8, 3), Fn(function, after=None, before=nn.Identity())), 8, verify=False
        )(torch.randn(1, 3, 23, 19))


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sums and products": lambda x: 3 - 2 * x.tanh() * torch.arange(5.0) / torch.tensor([2.0, -4.0]).view(2, 1, 1),
    "alpha, and a number before": lambda x: torch.rsub(torch.add(x.sigmoid(), torch.linspace(-1, 4, 5), alpha=-3), 2),
    "limits": lambda x: (x.sin() + torch.linspace(-2, 2, 7).view(-1, 1)).clamp(-1, 1.5) - F.relu6(x.clamp(min=-1)) + x.clamp(3, 2),
    "another order": lambda x: (x.cos() + torch.arange(7).view(-1, 1)).permute(3, 0, 2, 1).flip(1, 3)[1:, :, ::2],
    "pieces": lambda x: torch.stack([(x.erf() * k + torch.arange(5)).unbind(2)[k] for k in (1, 3)], 1).chunk(2, 3)[1],
    "other shapes": lambda x: (x.tanh() + torch.arange(7)[:, None]).view(1, 2, 7, 5).expand(3, -1, -1, -1).flatten(0, 1),
    "one over another": lambda x: x.sigmoid() / (x.cos() + 2) + torch.reciprocal(x.sin() - 3),
    "a mesh": lambda x: torch.stack(torch.meshgrid(torch.arange(7), torch.arange(5), indexing="xy"), -1) * x.tanh().mT[..., None],
    "an affine grid": lambda x: F.affine_grid(torch.eye(2, 3)[None] + 0.3 * x[:, :1, :2, :3].tanh()[:, 0], (1, 1, 7, 5), False),
    "whole numbers": lambda x: (3.7 * x.tanh() + torch.linspace(-2, 2, 5)).int() + torch.tensor([x.shape[3], 2])[:, None, None],
    "filled": lambda x: torch.ones_like(x) * 3 + torch.full((5,), -2.0) + torch.zeros(7, 1) + torch.eye(7, 5) * x.tanh(),
    "joined": lambda x: torch.cat([x.sigmoid(), -x.sigmoid() - torch.arange(5), torch.ones(1, 1, 7, 5)], 1).roll(1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_within_the_range_that_is_known(name: str) -> None:
    module = Fn(NUMBERS[name], before=nn.Identity(), after=None)
    captured = trace_module(module, CallKind((1, 2, 7, 5), torch.float32), symbolic=False).at(7, 5)
    assert captured is not None
    placing = Placing(captured, allow_whole=True)
    for node in captured.nodes:
        placing.add(node)
    known = placing.maps.ranges[captured.outputs[0].name]
    torch.manual_seed(0)
    images = [torch.randn(1, 2, 7, 5) * 3 for _ in range(20)]
    found = torch.stack([module(image) for image in images]).double()
    low, high = known.low, known.high
    for d, slope in known.slopes.items():
        index = torch.arange(found.shape[1 + d], dtype=torch.float64).view(
            [-1 if k == d else 1 for k in range(low.ndim)]
        )
        low, high = low + slope * index, high + slope * index
    assert (found >= low).all()
    assert (found <= high).all()
    least, most = known.ends(found.shape[1:])
    assert found.max() - found.min() > 0.3 * (most - least), "bounds that are far too wide are no help"
