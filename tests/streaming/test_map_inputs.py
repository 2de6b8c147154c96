"""Several maps in, the loss inside: the same losses and gradients as the plain module, by label maps that are read tile by tile."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.streaming.exactness import TOLERANCE, relative_error
from tests.streaming.masked import foreground
from widefield.streaming import StreamingCNN, UnsupportedOpError, stream

CLASSES, SIZE = 4, (37, 41)
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 0.7], dtype=torch.float64)


class WithLoss(nn.Module):
    """A small network whose forward takes targets and ends in a loss."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.loss = nn.Sequential(nn.Conv2d(3, CLASSES, 3, padding=1), nn.Tanh()), loss

    def forward(self, image: Tensor, *maps: Tensor) -> Any:
        return self.loss(self.network(image), *maps)


def labels(ignored: int | None = None) -> Tensor:
    found = torch.randint(0, CLASSES, (2, *SIZE), generator=torch.Generator().manual_seed(1))
    if ignored is not None:
        found[:, 3:9, 5:] = ignored
    return found


def numbers() -> Tensor:
    return torch.rand(2, CLASSES, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_like_plain(module: nn.Module, image: Tensor, *maps: Any, **options: Any) -> None:
    """Results, and gradients of parameters, the image and maps."""
    streamed = StreamingCNN(module.double(), (16, 12), verify=False, **options)
    inputs = [x for x in (image.requires_grad_(), *maps) if x.requires_grad]
    expected, found = module(image, *maps), streamed(image, *maps)
    assert relative_error(found, expected) <= TOLERANCE
    if expected.requires_grad:
        wanted = [*inputs, *module.parameters()]
        pairs = zip(*(torch.autograd.grad(loss.sum(), wanted) for loss in (found, expected)), strict=True)
        assert all(relative_error(f, e) <= TOLERANCE for f, e in pairs)


LOSSES: dict[str, tuple[Callable[..., Any], Callable[[], Tensor]]] = {
    "cross-entropy": (F.cross_entropy, labels),
    "cross-entropy, ignoring": (lambda x, t: F.cross_entropy(x, t, ignore_index=255), lambda: labels(255)),
    "cross-entropy, weighted and smoothed": (
        lambda x, t: F.cross_entropy(x, t, weight=WEIGHT, ignore_index=255, label_smoothing=0.1),
        lambda: labels(255),
    ),
    "cross-entropy, summed": (lambda x, t: F.cross_entropy(x, t, WEIGHT, reduction="sum"), labels),
    "cross-entropy of each position": (lambda x, t: F.cross_entropy(x, t, reduction="none"), labels),
    "cross-entropy to probabilities": (lambda x, t: F.cross_entropy(x, t.softmax(1), WEIGHT), numbers),
    "cross-entropy of flat maps": (lambda x, t: F.cross_entropy(x.flatten(2), t.flatten(1)), labels),
    "cross-entropy of all positions in a row": (
        lambda x, t: F.cross_entropy(x.permute(0, 2, 3, 1).reshape(-1, CLASSES), t.reshape(-1), WEIGHT),
        labels,
    ),
    "nothing but what is ignored": (
        lambda x, t: F.cross_entropy(x, t * 0 + 255, ignore_index=255, reduction="sum"),
        labels,
    ),
    "negative log-likelihood": (lambda x, t: F.nll_loss(x.log_softmax(1), t, WEIGHT), labels),
    "binary cross-entropy": (lambda x, t: F.binary_cross_entropy(x.sigmoid(), t), numbers),
    "binary cross-entropy with logits": (
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, pos_weight=WEIGHT.view(CLASSES, 1, 1)),
        numbers,
    ),
    "mean squared error": (F.mse_loss, numbers),
    "sum of absolute errors": (lambda x, t: F.l1_loss(x, t, reduction="sum"), numbers),
    "absolute errors of each image": (lambda x, t: F.l1_loss(x, t, reduction="none").mean((1, 2, 3)), numbers),
    "smooth L1": (lambda x, t: F.smooth_l1_loss(x, t, beta=0.3), numbers),
    "Huber": (lambda x, t: F.huber_loss(x.flatten(2), t.flatten(2), delta=0.2), numbers),
    "soft margin": (lambda x, t: F.soft_margin_loss(x, t.round() * 2 - 1), numbers),
    "Kullback-Leibler": (lambda x, t: F.kl_div(x.log_softmax(1), t.softmax(1), reduction="batchmean"), numbers),
    "soft Dice": (
        lambda x, t: 1 - ((2 * (x.sigmoid() * t).sum((2, 3)) + 1) / ((x.sigmoid() + t).sum((2, 3)) + 1)).mean(),
        numbers,
    ),
    "Dice of classes": (
        lambda x, t: (x.softmax(1) * F.one_hot(t, CLASSES).permute(0, 3, 1, 2)).sum((0, 2, 3)),
        labels,
    ),
    "confusion matrix": (
        lambda x, t: torch.einsum("nhwc,nhwd->cd", F.one_hot(x.argmax(1), CLASSES).to(x), F.one_hot(t, CLASSES).to(x)),
        labels,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_inside_are_exact(name: str) -> None:
    torch.manual_seed(0)
    loss, target = LOSSES[name]
    assert_like_plain(WithLoss(loss), torch.rand(2, 3, *SIZE, dtype=torch.float64), target())


def test_a_loss_of_nothing_is_nan_as_in_plain_pytorch() -> None:
    module = WithLoss(lambda x, t: F.cross_entropy(x, t, ignore_index=0)).double()
    image, target = torch.rand(1, 3, *SIZE, dtype=torch.float64), torch.zeros(1, *SIZE, dtype=torch.int64)
    assert StreamingCNN(module, 16, verify=False)(image, target).isnan()


def test_maps_of_several_sizes_and_dtypes_train_exactly() -> None:
    torch.manual_seed(0)

    def loss(x: Tensor, target: Tensor, weights: Tensor, other: Tensor) -> Tensor:
        each = F.cross_entropy(F.avg_pool2d(x * other, 2), target.long(), reduction="none")
        return (each * F.interpolate(weights, scale_factor=4, mode="nearest")[:, 0]).mean()

    image = torch.rand(2, 3, 48, 56, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (2, 24, 28), dtype=torch.uint8)
    weights = torch.rand(2, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    other = torch.rand(2, 1, 48, 56, dtype=torch.float64, requires_grad=True)
    assert_like_plain(WithLoss(loss), image, target, weights, other)


class Lazy:
    """Pixels that are read lazily and counted."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.shape, self.dtype, self.read_from = pixels, tuple(pixels.shape), pixels.dtype, 0

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        self.read_from += height * width
        return self.pixels[:, y : y + height, x : x + width]


def test_labels_are_read_tile_by_tile() -> None:
    torch.manual_seed(0)
    module = WithLoss(lambda x, t: F.cross_entropy(x, t[:, 0].long())).double()
    image, target = (
        torch.rand(3, 96, 80, dtype=torch.float64),
        torch.randint(0, CLASSES, (1, 96, 80), dtype=torch.uint8),
    )
    read = Lazy(target)
    streamed = stream(module, 32)
    loss = streamed(Lazy(image), read)
    assert relative_error(loss, module(image[None], target[None])) <= TOLERANCE
    assert read.read_from == target.numel()
    with torch.no_grad():
        part = streamed.plan((1, 3, 96, 80), read)
    assert part.steps == 9
    streamed.disable()
    assert relative_error(streamed(Lazy(image), read), loss) <= TOLERANCE


def test_the_loss_of_a_mask_is_that_of_the_foreground() -> None:
    torch.manual_seed(0)
    module = WithLoss(lambda x, t: (F.cross_entropy(x, t, WEIGHT), F.mse_loss(x, x.detach() * 0 + 1))).double()
    image, target = torch.rand(1, 3, *SIZE, dtype=torch.float64), labels()[:1]
    cells = torch.zeros(1, 5, 5, dtype=torch.bool)
    cells[:, 1:3, 2:] = True
    inside = foreground(cells, SIZE)
    logits = module.network(torch.where(inside, image, 0.25))
    expected = (
        F.cross_entropy(logits, torch.where(inside[:, 0], target, -100), WEIGHT),
        (logits - 1)[inside.expand_as(logits)].square().mean(),
    )
    for found, of_all in zip(StreamingCNN(module, 16)(image, target, mask=cells, fill=0.25), expected, strict=True):
        assert relative_error(found, of_all) <= TOLERANCE


def test_a_batch_of_lists_has_a_map_each() -> None:
    module = WithLoss(F.cross_entropy).double()
    images = [torch.rand(1, 3, n, 40, dtype=torch.float64) for n in (30, 50)]
    targets = [torch.randint(0, CLASSES, (1, n, 40)) for n in (30, 50)]
    found = stream(module, 16)(images, targets)
    for loss, image, target in zip(found, images, targets, strict=True):
        assert relative_error(loss, module(image, target)) <= TOLERANCE
    with pytest.raises(ValueError, match="a list of 2 images needs a list of as many maps: map 1 is Tensor"):
        stream(module, 16)(images, targets[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 36, 41), "does not go with an image of shape"),
        (torch.zeros(2, 37, 41), "N as for the image"),
        (torch.zeros(37, 41), "does not go with an image of shape"),
        (np.zeros((1, 37, 41)), "got ndarray"),
    ],
    ids=["another size", "another batch", "no batch", "an array"],
)
def test_maps_that_do_not_go_with_the_image_are_refused(given: Any, message: str) -> None:
    module = stream(WithLoss(F.mse_loss), 16)
    with pytest.raises(ValueError, match=message):
        module(torch.rand(1, 3, 37, 41), given)


def test_labels_that_depend_on_no_image_are_refused_by_name() -> None:
    module = WithLoss(lambda x: F.cross_entropy(x, torch.zeros(1, *x.shape[2:], dtype=torch.int64)))
    with pytest.raises(UnsupportedOpError, match="pass the labels as a map of their own"):
        StreamingCNN(module, 16)(torch.rand(1, 3, *SIZE))


def test_a_prepared_image_holds_its_maps() -> None:
    torch.manual_seed(0)
    module = WithLoss(lambda x, other: x * (x.mean((2, 3), keepdim=True) + other)).double()
    image, other = (torch.rand(1, n, 40, 48, dtype=torch.float64) for n in (3, 1))
    streamed = StreamingCNN(module, 16)
    with torch.no_grad():
        prepared = streamed.prepare(image, other)
        found = streamed(prepared, region=(8, 8, 10, 20))
        assert relative_error(found, module(image, other)[:, :, 8:18, 8:28]) <= TOLERANCE
        other += 1
        with pytest.raises(ValueError, match="has changed since prepare"):
            streamed(prepared, region=(8, 8, 10, 20))


def test_one_trace_serves_images_and_maps_of_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        each = F.cross_entropy(x, target, reduction="none")
        return (each * F.interpolate(weights, scale_factor=4, mode="nearest")[:, 0]).mean()

    module = WithLoss(loss).double()
    streamed = StreamingCNN(module, 16)
    for height, width in ((48, 64), (36, 80), (100, 20)):
        image, weights = torch.rand(1, 3, height, width).double(), torch.rand(1, 1, height // 4, width // 4).double()
        target = torch.randint(0, CLASSES, (1, height, width))
        assert relative_error(streamed(image, target, weights), module(image, target, weights)) <= TOLERANCE
        monkeypatch.setattr("widefield.streaming.program_cache.trace_module", None)
