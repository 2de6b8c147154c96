"""That the engine streams: no operation, forward or backward, ever makes a map larger than a tile with its carries."""

from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import SqueezeExcitation

from widefield.streaming import StreamingCNN, stream
from widefield.streaming.captured import CallKind


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest storage that any operation makes, other than those of the allowed shapes."""

    def __init__(self, allowed: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.allowed, self.largest, self.operations = allowed, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in pytree.tree_leaves(result):
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) in self.allowed:
                continue
            if tensor.ndim == 1:  # the block of all carries, not a map
                continue
            if tensor.untyped_storage().data_ptr() not in inputs:  # not a view or an update of what was there
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def _largest_buffer(streamed: StreamingCNN, image: Tensor) -> int:
    """Bytes of the largest tile with its carries, by the schedule."""
    kind = CallKind(tuple(image.shape), torch.float32)
    program = streamed._program(kind)
    grid = streamed._planner(program, kind).grids[0]
    return max(
        value.pixel_bytes * (row[v].ready - row[v].held_from) * (col[v].ready - col[v].held_from)
        for v, value in enumerate(grid.stage.values)
        for row in grid.rows
        for col in grid.cols
    )


@pytest.mark.parametrize(
    ("name", "tile"),
    [("resnet18", (32, None)), pytest.param("convnext_tiny", (64, 64), marks=pytest.mark.slow)],
    ids=str,
)
def test_no_spatial_tensor_exceeds_a_tile_and_its_carries(name: str, tile: tuple[int, int | None]) -> None:
    model = getattr(tv, name)()
    if name == "resnet18":
        trunk = nn.Sequential(*list(model.children())[:6])  # small weights, so that maps are what is large
    else:
        trunk = model.features[:3].eval()
    streamed = StreamingCNN(trunk, tile)
    image = torch.randn(1, 3, 640, 512)
    bound = _largest_buffer(streamed, image)
    whole = streamed.plan((3, 640, 512))
    output = streamed(image).shape
    allowed = {tuple(output), *(tuple(p.shape) for p in trunk.parameters())}
    with LargestTensor(allowed) as record:
        out = streamed(image)
        out.backward(torch.ones_like(out))
    assert record.operations > whole.steps * 10
    assert record.largest <= 1.5 * bound, (record.largest, bound)  # padding at the border makes a tile larger
    plain = 640 * 512 * 4 * (64 // 4 if name == "resnet18" else 384 // 16)  # the largest map of the whole image
    assert record.largest < plain / 4


def test_a_streamed_classifier_never_makes_a_whole_map_of_its_deepest_layers() -> None:
    """Squeeze-and-Excite keeps the maps that it multiplies; all others, and the map before the global pooling, never exist."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), SqueezeExcitation(8, 2), nn.Conv2d(8, 32, 3, padding=1), nn.GELU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    streamed = stream(model, (32, None))
    image = torch.randn(1, 3, 512, 384)
    streamed.plan((3, 512, 384))
    with LargestTensor({(1, 8, 256, 192)}) as record:
        streamed(image).sum().backward()
    assert record.operations > 100
    assert record.largest < 256 * 192 * 32 * 4 / 4


def test_the_plain_module_would_fail_this_test() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    with LargestTensor(set()) as record:
        trunk(torch.randn(1, 3, 64, 64))
    assert record.largest == 64 * 64 * 8 * 4
