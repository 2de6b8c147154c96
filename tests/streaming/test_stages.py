"""Operations over the whole image: the graph is cut into stages, and the result is the whole image's."""

import copy
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from tests.streaming.exactness import TOLERANCE, assert_exact, randomise, relative_error
from widefield.streaming import StreamingCNN, stream

TILES = [(7, None), (9, 11), (2, 3), (64, 64)]


class Fn(nn.Module):
    """A convolution, a function of its map, and a convolution of the result if it is a map."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, channels, 3, 2)
        self.after = nn.Conv2d(channels, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.before(x).relu())
        return self.after(y) if y.ndim == 4 and y.shape[-1] > 1 and y.shape[1] == self.after.in_channels else y


def attention(x: Tensor) -> Tensor:
    """Cross-covariance attention: channels attend to channels."""
    n, c, h, w = x.shape
    q, k, v = (
        x.reshape(n, 2, c // 2, h * w),
        x.flatten(2).view(n, 2, c // 2, -1).tanh(),
        x.view(n, 2, c // 2, h * w) * 2,
    )
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).view_as(x)


def context(x: Tensor) -> Tensor:
    """Global context attention: the softmax-weighted sum of all positions."""
    n, c, h, w = x.shape
    weights = x[:, :1].reshape(n, 1, h * w).softmax(-1).unsqueeze(3)
    pooled = (x.reshape(n, c, h * w).unsqueeze(1) @ weights).view(n, c, 1, 1)
    return x * pooled.sigmoid()


def tokens(x: Tensor) -> Tensor:
    """A mixer over tokens (N, H * W, C), channels only, with a global mean."""
    n, c, h, w = x.shape
    t = x.flatten(2).transpose(1, 2)
    t = F.layer_norm(t, (c,)) + torch.linspace(0, 1, h * w, dtype=x.dtype)[:, None]
    t = t * t.mean(1, keepdim=True).sigmoid()
    return t.transpose(1, 2).reshape(n, c, h, w)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "mean keepdim, broadcast": lambda x: x - x.mean((2, 3), keepdim=True),
    "mean of everything": lambda x: x * x.mean(),
    "mean over channels and space": lambda x: x / (1 + x.mean((1, 2, 3), keepdim=True)),
    "mean in another precision": lambda x: x * x.float().mean((2, 3), keepdim=True, dtype=torch.float64),
    "mean over height": lambda x: x * x.mean(2, keepdim=True),
    "mean over width": lambda x: x.mean(3),
    "sum over rows, then columns": lambda x: x.sum(2).sum(2),
    "coordinate attention": lambda x: x * x.mean(3, keepdim=True).sigmoid() * x.mean(2, keepdim=True).sigmoid(),
    "sum, channels last": lambda x: x.permute(0, 2, 3, 1).sum((1, 2)),
    "amax": lambda x: x.amax((2, 3)),
    "amin and amax": lambda x: x / (1 + x.amax((2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)),
    "max of everything": lambda x: x / (1 + x.max()),
    "max over flattened space": lambda x: x.flatten(2).max(-1)[0],
    "min over flattened space": lambda x: x.flatten(2).min(-1).values,
    "variance": lambda x: x.var((2, 3)),
    "deviation, biased": lambda x: x * x.std((2, 3), keepdim=True, correction=0),
    "variance and mean": lambda x: torch.cat(torch.var_mean(x, (1, 2, 3)), 0),
    "variance over tokens": lambda x: x.flatten(2).var(-1, unbiased=False),
    "2-norm": lambda x: x * torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True),
    "1-norm": lambda x: x.norm(p=1, dim=(2, 3)),
    "3-norm": lambda x: x.norm(p=3, dim=(2, 3)),
    "maximum norm": lambda x: x.norm(p=float("inf"), dim=(2, 3)),
    "grn": lambda x: x * (g := x.norm(2, (2, 3), keepdim=True)) / (g.mean(1, keepdim=True) + 1e-6) + x,
    "logsumexp": lambda x: x.logsumexp((2, 3)),
    "softmax over space": lambda x: x.flatten(2).softmax(-1).view_as(x),
    "log softmax over space": lambda x: x.flatten(2).log_softmax(2).unflatten(2, x.shape[2:]),
    "group norm": lambda x: F.group_norm(x, 2, torch.linspace(0.5, 1, 8, dtype=x.dtype), torch.ones(8, dtype=x.dtype)),
    "group norm of one group": lambda x: F.group_norm(x, 1),
    "instance norm": lambda x: F.instance_norm(x),
    "batch norm by batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "layer norm over space": lambda x: F.layer_norm(x, x.shape[2:], x.new_full(x.shape[2:], 0.5).cumsum(0)),
    "layer norm over everything": lambda x: F.layer_norm(x, x.shape[1:]),
    "adaptive average pooling": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive average pooling to a grid": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "adaptive pooling by a whole factor": lambda x: F.adaptive_avg_pool2d(x[:, :, :8, :12], (4, 6))
    + F.adaptive_max_pool2d(x[:, :, :8, :12], (4, 6)),
    "adaptive pooling to the same size": lambda x: F.adaptive_avg_pool2d(x, x.shape[2:]),
    "adaptive average pooling of one axis": lambda x: F.adaptive_avg_pool2d(x, (None, 1)) * x,
    "adaptive max pooling": lambda x: F.adaptive_max_pool2d(x, 1),
    "adaptive max pooling to a grid": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "average pooling of everything": lambda x: F.avg_pool2d(x, x.shape[2:]),
    "max pooling of everything": lambda x: F.max_pool2d(x, x.shape[2:]),
    "pyramid pooling": lambda x: x + F.interpolate(F.adaptive_avg_pool2d(x, 3), x.shape[2:], mode="bilinear"),
    "image pooling": lambda x: torch.cat([x[:, :4], F.interpolate(F.adaptive_avg_pool2d(x[:, 4:], 1), x.shape[2:])], 1),
    "context attention": context,
    "cross-covariance attention": attention,
    "tokens": tokens,
    "attention pooling": lambda x: torch.bmm(x[:, :2].flatten(2).softmax(-1), x.flatten(2).transpose(1, 2)),
    "einsum over space": lambda x: torch.einsum("nchw,ndhw->ncd", x, x.tanh()),
    "gram matrix": lambda x: x.flatten(2) @ x.flatten(2).mT,
    "tokens of the whole batch": lambda x: (
        F.layer_norm(x.permute(0, 2, 3, 1).reshape(-1, 8), (8,)) @ torch.ones(8, 8, dtype=x.dtype).tril()
        + torch.arange(x.shape[0] * x.shape[2] * x.shape[3]).view(-1, 1)
    ).view(x.shape[0], *x.shape[2:], 8).permute(0, 3, 1, 2),
    "mean over tokens of the whole batch": lambda x: x * x.movedim(1, -1).flatten(0, 2).mean(0).view(8, 1, 1),
    "batch and heads in one": lambda x: x.reshape(-1, 2, x.shape[2] * x.shape[3]).softmax(-1).mean(1),
    "batch of tokens, unflattened again": lambda x: x.movedim(1, 3).reshape(-1, 8).tanh().unflatten(0, (len(x), -1)).sum(1),
    "batched dot products": lambda x: (
        x.movedim(1, -1).reshape(-1, 2, 4) @ x.movedim(1, -1).reshape(-1, 2, 4).mT
    ).view(len(x), *x.shape[2:], 4).movedim(-1, 1),
    "windows of positions": lambda x: x[:, :, :12, :12].unfold(2, 4, 2).unfold(3, 3, 3).mean((-1, -2)),
    "channels by index": lambda x: x[:, torch.tensor([3, 1, 1, 7, 0, 2, 4, 6])] * x.mean((2, 3), keepdim=True),
    "expanded, reshaped": lambda x: x
    * x.view(len(x), 2, 4, *x.shape[2:]).std((2, 3, 4), keepdim=True).expand(-1, -1, 4, *x.shape[2:]).reshape(x.shape),
    "flatten": lambda x: x.flatten(2),
    "scores by a vector": lambda x: ((x.flatten(2).mT @ x.new_ones(8)).softmax(1)[:, None] @ x.flatten(2).mT).squeeze(1),
    "einsum with dots": lambda x: torch.einsum("n...c,n...d->ncd", x.movedim(1, -1), x.movedim(1, -1).tanh()),
    "einsum without an arrow": lambda x: torch.einsum("bchw,ck", x, x.new_ones(8, 3)) * x.mean(),
    "positions joined to tokens": lambda x: torch.cat(
        [x.flatten(2), torch.arange(x[0, 0].numel()).to(x).view(1, 1, -1).expand(len(x), 1, -1)], 1
    ) * x.mean(),
    "deviation of dead channels": lambda x: (x * torch.arange(8).view(8, 1, 1)).std((2, 3)),
    "norm of dead channels": lambda x: (x * torch.arange(8).view(8, 1, 1)).norm(dim=(2, 3)),
    "maximum of two maps": lambda x: torch.max(x, x.mean((2, 3), keepdim=True)) + torch.min(x, torch.ones(()).to(x)),
    "masked mean": lambda x: (x * (x > 0.2)).sum((2, 3)) / (x > 0.2).sum((2, 3)).clamp_min(1),
    "two in a row": lambda x: F.group_norm(F.group_norm(x, 2) * x.mean((2, 3), keepdim=True), 4).relu() + x,
    "branches": lambda x: x * x.mean((2, 3), keepdim=True) + x * F.instance_norm(x.roll(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operations_over_the_whole_image_are_exact(name: str, batch: int) -> None:
    torch.manual_seed(0)
    if batch == 1:
        assert_exact(Fn(FUNCTIONS[name]), torch.randn(1, 3, 37, 29), TILES)
    else:
        streamed = StreamingCNN(module := Fn(FUNCTIONS[name]))  # captured once for both places
        for place in ("host", "file"):
            streamed.maps = place
            assert_exact(module, torch.randn(3, 3, 20, 27), TILES[1:2], wrap=lambda _: streamed)


def trained_like_plain(module: nn.Module, images: list[Tensor], streamed: StreamingCNN) -> None:
    """Two steps of training leave the same outputs, gradients and running statistics."""
    reference = copy.deepcopy(module)
    for image in images:
        ours, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
        found, expected = streamed(ours), reference(theirs)
        assert relative_error(found.detach(), expected.detach()) < TOLERANCE
        weight = torch.randn_like(expected)
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        assert ours.grad is not None
        assert relative_error(ours.grad, theirs.grad) < TOLERANCE
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        scale = max(g.grad.abs().max().item() for g in reference.parameters())
        assert (p.grad - q.grad).abs().max().item() < TOLERANCE * scale, name
    for (name, b), c in zip(module.named_buffers(), reference.buffers(), strict=True):
        assert relative_error(b, c) < TOLERANCE, name


def normed(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.BatchNorm2d(6, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
    ]
    return randomise(nn.Sequential(*layers, nn.Dropout(0.0))).double().train()


@pytest.mark.parametrize("tile", [(7, None), (9, 11)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_statistics_are_those_of_the_whole_batch(tile: tuple[int, int | None], momentum: float | None) -> None:
    module = normed(momentum)
    streamed = StreamingCNN(module, tile, batch_statistics="exact")
    trained_like_plain(module, [torch.randn(3, 3, 29, 31).double() + k for k in range(2)], streamed)
    assert streamed.plan((3, 3, 29, 31)).stages == 3


def test_layers_in_evaluation_mode_keep_their_statistics() -> None:
    module = normed()
    module[1].eval()
    streamed = StreamingCNN(module, 9, batch_statistics="exact")
    trained_like_plain(module, [torch.randn(2, 3, 20, 21).double()], streamed)
    module.eval()
    assert streamed.plan((3, 20, 21)).stages == 1, "the mode flags decide"


def test_batch_statistics_of_a_resnet() -> None:
    torch.manual_seed(0)
    module = randomise(torchvision.models.resnet18(num_classes=3)).double().train()
    trained_like_plain(module, [torch.randn(2, 3, 70, 65).double()], stream(module, (32, 40), batch_statistics="exact"))


class Heads(nn.Module):
    """Batch norm of a map, of a vector, of what runs whole, and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 4)
        self.of_map, self.of_whole = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.of_vector, self.of_tokens = nn.BatchNorm1d(4), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.of_map(self.conv(x)).relu()
        tokens = self.of_tokens(y.flatten(2)).tanh()
        return self.of_vector(self.fc(tokens.mean(2) + self.of_whole(y.flip(3)).amax((2, 3))))


def test_running_statistics_of_vectors_tokens_and_whole_maps_are_updated_too() -> None:
    torch.manual_seed(0)
    module = randomise(Heads()).double().train()
    streamed = stream(module, (7, 9), batch_statistics="exact")
    images = [torch.randn(3, 3, 21, 19).double() + k for k in range(2)]
    reference = copy.deepcopy(module)
    for image in images:
        weight = torch.randn(3, 4).double()
        found, expected = streamed(image), reference(image)
        assert relative_error(found.detach(), expected.detach()) < TOLERANCE
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
    for (name, b), c in zip(module.named_buffers(), reference.named_buffers(), strict=True):
        assert relative_error(b, c[1]) < TOLERANCE, name
    scale = max(p.grad.abs().max().item() for p in reference.parameters() if p.grad is not None)
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            assert (p.grad - q.grad).abs().max().item() < TOLERANCE * scale, name


def test_a_list_is_one_batch_for_batch_statistics() -> None:
    module = normed()
    images = [torch.randn(1, 3, 20, 21).double() for _ in range(3)]
    streamed = StreamingCNN(module, 9, batch_statistics="exact")
    expected = copy.deepcopy(module)(torch.cat(images))
    assert relative_error(torch.cat(streamed(images)), expected) < TOLERANCE
    with pytest.raises(ValueError, match="images of one size"):
        streamed([images[0], images[1][..., 1:]])


def test_a_list_that_is_one_batch_has_one_dtype() -> None:
    images = [torch.rand(1, 3, 20, 21), torch.zeros(1, 3, 20, 21, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="of one dtype: got"):
        StreamingCNN(normed(), 9, batch_statistics="exact")(images)


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_maps_between_stages_live_where_they_are_told_to(place: str, tmp_path: Path) -> None:
    module = nn.Sequential(Fn(FUNCTIONS["two in a row"]), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    wrap = partial(StreamingCNN, maps=place, scratch_dir=tmp_path)
    streamed = assert_exact(module, torch.randn(2, 3, 37, 29), [(8, None), (9, 11)], wrap=wrap)
    assert streamed.plan((2, 3, 37, 29)).map_place == place
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_a_result_that_a_later_stage_reads_stays_on_the_device(place: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.conv(x)
            return x, x * x.mean((2, 3), keepdim=True)

    streamed = assert_exact(Both(), torch.randn(1, 3, 37, 29), [(8, None), 11], wrap=partial(StreamingCNN, maps=place))
    plan = streamed.plan((3, 37, 29))
    with torch.no_grad():
        more = plan.predicted_bytes["outputs"] - streamed.plan((3, 37, 29)).predicted_bytes["outputs"]
    assert more == 4 * 37 * 29 * 8  # its gradient


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_weights_along_one_axis(place: str, tmp_path: Path) -> None:
    """Gates per row and per column have gradients of their own shape."""

    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.rand(8, 37, 1))
            self.cols = nn.Parameter(torch.rand(1, 1, 1, 29))
            self.grid = nn.Parameter(torch.rand(1, 37, 29))

        def forward(self, x: Tensor) -> Tensor:
            x = (x * self.rows + self.grid).tanh()
            return x * self.cols * x.mean((2, 3), keepdim=True) + self.rows

    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Gates(), nn.Conv2d(8, 4, 3))
    wrap = partial(StreamingCNN, maps=place, scratch_dir=tmp_path)
    assert_exact(module, torch.randn(2, 3, 37, 29), [(8, None), (9, 11), (40, 40)], wrap=wrap)


@pytest.mark.cpu
def test_a_short_budget_moves_the_maps_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widefield.streaming.planner._thinner", lambda *args: None)
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(2, 16), nn.ReLU(), nn.Conv2d(16, 4, 3))
    shape = (1, 3, 400, 300)
    rich = StreamingCNN(module, memory_budget="1GiB", scratch_dir=tmp_path).plan(shape)
    assert rich.map_place == "device"
    assert rich.predicted_bytes["maps"] == rich.map_bytes >= 16 * 398 * 298 * 4
    short = StreamingCNN(module, memory_budget="12MiB", scratch_dir=tmp_path)
    plan = short.plan(shape)
    assert plan.map_place == "file"
    assert plan.total_bytes <= 12 * 2**20 < plan.map_bytes
    assert "file" in str(plan)
    image = torch.randn(shape)
    assert relative_error(short(image).detach(), module(image).detach()) < 1e-5
    with pytest.raises(ValueError, match="too small"):
        StreamingCNN(module, memory_budget="3MiB", maps="device").plan(shape)


def test_a_file_without_a_name_goes_with_the_process(tmp_path: Path) -> None:
    """Killed in the middle of a run, it leaves nothing behind."""
    script = f"""
import os, signal, torch, widefield
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.ReLU())
streamed = widefield.StreamingCNN(net, 32, maps="file", scratch_dir={str(tmp_path)!r})
def progress(phase, done, total):
    if phase == "backward":
        os.kill(os.getpid(), signal.SIGKILL)
streamed.progress = progress
streamed(torch.rand(1, 3, 128, 128)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_without_room_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    streamed = StreamingCNN(Fn(FUNCTIONS["group norm"]), 9, maps="file", scratch_dir=tmp_path)
    with pytest.raises(OSError, match="scratch_dir"):
        streamed(torch.randn(1, 3, 29, 31))


def test_ties_of_a_global_maximum_go_as_on_the_whole_image() -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 3, (2, 3, 12, 13)).double()
    for function in ("amax", "amin and amax", "max of everything", "max over flattened space", "adaptive max pooling"):
        module = nn.Sequential(nn.Identity(), nn.ReLU(), Fn(FUNCTIONS[function], channels=3))
        module[2].before = nn.Identity()
        assert_exact(module, image, [(5, 4), (3, None)])


def test_indices_of_a_global_maximum() -> None:
    class Indices(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                *F.adaptive_max_pool2d(x.relu(), (2, 3), return_indices=True),
                x.flatten(2).argmax(-1),
                *x.flatten(2).min(2),
            )

    class Unsigned(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            levels = (x * 10).abs().to(torch.uint8)
            return (
                levels.amin((2, 3)),
                levels.amax((2, 3)),
                *levels.flatten(2).min(-1),
                (x > 0).flatten(2).max(-1)[0],
                levels.sum(),
            )

    assert_exact(Unsigned(), torch.randint(-2, 3, (2, 3, 12, 13)) + 0.1, [(5, 4), (3, None)])
    assert_exact(Indices(), torch.randint(-2, 3, (2, 3, 12, 13)), [(5, 4), (3, None)])


def test_dropout_and_stages_agree_in_the_recomputation() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.GroupNorm(2, 4), nn.Dropout2d(0.5), nn.Conv2d(4, 2, 3)
    ).double()
    image, results = torch.randn(2, 3, 21, 22).double(), []
    for tile in (5, (7, 9), 64):
        torch.manual_seed(0)
        module.zero_grad()
        streamed = StreamingCNN(module, tile)
        (out := streamed(image)).square().sum().backward()
        results.append((out.detach(), module[0].weight.grad))
    assert all(relative_error(a, b) < TOLERANCE for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_variances_do_not_cancel_in_float32() -> None:
    """A bright image with little contrast: the difference of mean square and squared mean has no correct digit."""
    image = 1000 + torch.rand(1, 3, 61, 47) * torch.linspace(0.1, 1, 61)[:, None]
    norm = nn.InstanceNorm2d(3)
    expected = norm(image.double())
    assert (
        relative_error(StreamingCNN(norm, (7, 9))(image), expected) < 5e-4
    )  # 1000 itself has a rounding error of 3e-5


@pytest.mark.parametrize("name", ["softmax over space", "log softmax over space", "variance"])
def test_an_offset_costs_no_precision_in_float32(name: str) -> None:
    image = torch.rand(1, 3, 41, 37) + 1000

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FUNCTIONS[name](x)

    expected = Shifted()(image.double())
    assert relative_error(StreamingCNN(Shifted(), (7, 9))(image), expected) < 2e-6


def test_norms_of_float16_do_not_overflow() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.norm(dim=(2, 3))

    image = (torch.randn(1, 3, 19, 17) * 300).half()
    assert relative_error(StreamingCNN(Norm(), 7)(image), image.double().norm(dim=(2, 3))) < 1e-3
