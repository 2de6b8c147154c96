"""Batch norm statistics set from random crops."""

import numpy as np
import pytest
import torch
from torch import nn

from widefield.streaming import StreamingCNN, calibrate_batch_norm


class Lazy:
    """A lazy image over an array (C, H, W)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.shape = pixels.shape
        self.dtype = pixels.dtype
        self.largest_read = 0

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        self.largest_read = max(self.largest_read, height * width)
        return self.pixels[:, y : y + height, x : x + width].copy()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def pixels(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)


def test_one_crop_of_the_whole_image_gives_its_statistics() -> None:
    net = network()
    image = torch.rand(1, 3, 32, 32)
    assert calibrate_batch_norm(net, [image], crop_size=100, crops=3, batch_size=1) == 2
    with torch.no_grad():
        first = net[0](image)
    torch.testing.assert_close(net[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(net[1].running_var, first.var((0, 2, 3)))


def test_every_crop_counts_the_same_whatever_the_last_batch() -> None:
    net = network()
    images = [torch.full((1, 3, 8, 8), float(value)) for value in (0.0, 0.3, 0.9)]
    calibrate_batch_norm(net, images, crop_size=8, crops=3, batch_size=2)
    with torch.no_grad():
        means = torch.stack([net[0](image).mean((0, 2, 3)) for image in images])
    torch.testing.assert_close(net[1].running_mean, means.mean(0))


def test_nothing_but_the_statistics_changes() -> None:
    net = network()
    net[1].eval()
    modes = [part.training for part in net.modules()]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random_state = torch.get_rng_state()
    calibrate_batch_norm(net, [Lazy(pixels(0))], crops=4, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert [part.training for part in net.modules()] == modes
    assert (net[1].momentum, net[4].momentum) == (0.3, 0.1)
    assert torch.equal(torch.get_rng_state(), random_state)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{name}" for layer in (1, 4) for name in statistics}
    assert all(parameter.grad is None for parameter in net.parameters())


def test_modes_and_momenta_are_restored_after_an_error() -> None:
    net = network()
    with pytest.raises(RuntimeError):
        calibrate_batch_norm(net, [torch.rand(1, 5, 8, 8)], crops=1)
    assert net.training
    assert net[1].momentum == 0.3


def test_the_seed_decides_and_only_crops_are_read() -> None:
    image = Lazy(pixels(1, 200, 200))
    results = []
    for seed in (0, 0, 1):
        net = network()
        calibrate_batch_norm(net, [image], crop_size=16, crops=4, generator=torch.Generator().manual_seed(seed))
        results.append(net[1].running_mean)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert image.largest_read == 16 * 16


def test_a_streaming_cnn_uses_its_own_normalisation() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    plain, inside = network(), network()
    settings = {"crop_size": 24, "crops": 4}
    calibrate_batch_norm(
        plain, [Lazy(pixels(0))], mean=mean, std=std, generator=torch.Generator().manual_seed(0), **settings
    )
    streamed = StreamingCNN(inside, mean=mean, std=std)
    calibrate_batch_norm(streamed, [Lazy(pixels(0))], generator=torch.Generator().manual_seed(0), **settings)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(inside.state_dict()[key], value)
    with pytest.raises(ValueError, match="StreamingCNN"):
        calibrate_batch_norm(streamed, [Lazy(pixels(0))], mean=mean, std=std)


def test_a_network_without_batch_norm_is_left_alone() -> None:
    assert calibrate_batch_norm(nn.Conv2d(3, 4, 3), [Lazy(pixels(0))]) == 0


@pytest.mark.parametrize(("argument", "value"), [("crop_size", 0), ("crops", -1), ("batch_size", 0)])
def test_numbers_below_one_are_refused(argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{argument}={value}"):
        calibrate_batch_norm(network(), [Lazy(pixels(0))], **{argument: value})


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        calibrate_batch_norm(network(), [])


def test_crops_lie_in_the_mask_and_one_tiny_image_does_not_decide_their_size() -> None:
    image = torch.zeros(3, 256, 256)
    image[:, 160:224, 32:96] = 5
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[5:7, 1:3] = True
    batch_norm = nn.BatchNorm2d(3)
    tiny = torch.full((3, 4, 4), 1e6)
    calibrate_batch_norm(batch_norm, [image, tiny, image], crop_size=16, masks=[mask, torch.ones(1, 1), mask])
    assert 3 < batch_norm.running_mean.min() <= batch_norm.running_mean.max() <= 5
    with pytest.raises(ValueError, match="1 masks for 2 images"):
        calibrate_batch_norm(batch_norm, [image, image], masks=[mask])


@pytest.mark.parametrize("order", ["<f4", ">f4"])
def test_a_reader_may_use_its_memory_again(order: str) -> None:
    pixels = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)

    class Reader:
        shape, dtype, memory = (3, 64, 64), np.dtype(order), np.empty((3, 16, 16), order)

        def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
            self.memory[...] = pixels[:, y : y + height, x : x + width]
            return self.memory if self.again else self.memory.copy()

        def __init__(self, again: bool) -> None:
            self.again = again

    found = []
    for image in (Reader(True), Reader(False)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        generator = torch.Generator().manual_seed(0)
        calibrate_batch_norm(net, [image], crop_size=16, crops=8, batch_size=8, generator=generator)
        found.append(net[1].running_var)
    assert torch.equal(*found)
