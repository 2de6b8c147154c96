"""Of an image on disk the next tile is read while a step is computed, by one thread that ends with the pass."""

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.streaming.exactness import TOLERANCE, relative_error
from widefield.streaming import StreamingCNN

pytestmark = pytest.mark.cpu  # arrays and tensors of host memory


class OnDisk:
    """Tells which rows were read in which order, and by how many at a time."""

    shape, dtype = (3, 40, 24), torch.float64

    def __init__(self) -> None:
        self.pixels = torch.rand(self.shape, dtype=self.dtype)
        self.rows: list[int] = []
        self.seen = threading.Condition()
        self.alone = threading.Lock()

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        assert self.alone.acquire(blocking=False), "two reads at a time"
        with self.seen:
            self.rows.append(y)
            self.seen.notify_all()
        self.alone.release()
        return self.pixels[:, y : y + height, x : x + width]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1)).double()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("widefield-reader")]


def test_the_next_tile_is_read_in_the_meantime() -> None:
    image, module = OnDisk(), net()
    streamed = StreamingCNN(module, (8, None))
    waited: list[bool] = []

    def progress(phase: str, done: int, steps: int) -> None:
        """The step is done, and the next one not begun."""
        read = min(done + 1, 5) + 5 * (phase == "backward")
        with image.seen:
            waited.append(image.seen.wait_for(lambda: len(image.rows) >= read, timeout=20))

    streamed.progress = progress
    out = streamed(image)
    assert not readers()
    out.sum().backward()
    assert not readers()
    assert waited and all(waited)
    assert image.rows == [0, 8, 16, 24, 32, 32, 24, 16, 8, 0]
    streamed_gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    module(image.pixels[None]).sum().backward()
    for p, found in zip(module.parameters(), streamed_gradients, strict=True):
        assert p.grad is not None and relative_error(found, p.grad) < TOLERANCE


def test_a_failing_read_ends_the_pass_and_its_thread() -> None:
    image = OnDisk()
    image.pixels = image.pixels[:, :20]  # the file is shorter than it says
    with pytest.raises(ValueError, match=r"read\(16, 0, 8, 24\) returned shape \(3, 4, 24\), expected \(3, 8, 24\)"):
        StreamingCNN(net(), (8, None))(image)
    assert not readers()


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_a_reader_may_use_its_memory_again(dtype: torch.dtype) -> None:
    class Reused(OnDisk):
        def __init__(self) -> None:
            super().__init__()
            self.pixels = (255 * self.pixels).to(dtype)
            self.dtype = dtype
            self.buffer = torch.empty(3, 8, 24, dtype=dtype)

        def read(self, y: int, x: int, height: int, width: int) -> Tensor:
            return self.buffer.copy_(super().read(y, x, height, width))

    image, module = Reused(), net()
    out = StreamingCNN(module, (8, None), value_range=(0, 255))(image)
    assert relative_error(out.detach(), module(image.pixels[None].double() / 255).detach()) < TOLERANCE


class Given:
    """Declares a dtype and reads whatever `given` makes of pixels from 0 to 255."""

    shape, pixels = (3, 16, 12), np.random.RandomState(0).randint(0, 256, (3, 16, 12))

    def __init__(self, dtype: Any, given: Callable[[np.ndarray], Any]) -> None:
        self.dtype, self.given = dtype, given

    def __repr__(self) -> str:
        return "slide.tif"

    def read(self, y: int, x: int, height: int, width: int) -> Any:
        return self.given(self.pixels[:, y : y + height, x : x + width])


@pytest.mark.parametrize(
    ("dtype", "given", "words"),
    [
        (np.uint8, lambda pixels: pixels, "returned torch.int64, but the image declares torch.uint8"),
        ("float32", lambda pixels: pixels / 255, "returned torch.float64, but the image declares torch.float32"),
        (np.uint8, lambda pixels: None, "returned NoneType None, expected an array or tensor of shape (3, 8, 12)"),
        (np.uint8, lambda pixels: pixels[:1].astype(np.uint8), "returned shape (1, 8, 12), expected (3, 8, 12)"),
    ],
)
def test_what_read_gives_must_be_what_the_image_declares(dtype: Any, given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"slide.tif.read(0, 0, 8, 12) {words}")):
        StreamingCNN(net(), (8, None))(Given(dtype, given))


@pytest.mark.parametrize("dtype", [None, object, "nonsense", np.complex64])
def test_an_image_declares_real_or_whole_numbers(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype of slide.tif must be|only real ones are streamed"):
        StreamingCNN(net(), (8, None))(Given(dtype, lambda pixels: pixels))


@pytest.mark.parametrize(
    "given", [lambda pixels: pixels.astype(">u2"), lambda pixels: pixels.astype("u2")[::-1, :, ::-1]]
)
def test_arrays_may_have_any_byte_order_and_strides(given: Callable[[np.ndarray], np.ndarray]) -> None:
    module, image = net(), Given(np.uint16, given)
    whole = torch.from_numpy(given(image.pixels).astype(np.float64))[None] / 65535
    assert relative_error(StreamingCNN(module, (8, None))(image).detach(), module(whole).detach()) < TOLERANCE


def test_a_pass_that_fails_ends_its_thread() -> None:
    """Even if somebody keeps the exception, and with it what the pass held."""
    streamed = StreamingCNN(net(), (8, None))

    def progress(phase: str, done: int, steps: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    streamed.progress = progress
    with pytest.raises(KeyboardInterrupt) as kept:
        streamed(OnDisk())
    assert kept.value is not None and not readers()
