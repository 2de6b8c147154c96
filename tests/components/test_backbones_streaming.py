"""Backbones that stream: the same maps, gradients and names as without."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widefield.components import (
    ConvNeXt,
    DataSample,
    EfficientNet,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    ResNet_CIFAR,
    TimmBackbone,
    VisionTransformer,
)
from widefield.components.backbones.base_backbone import StreamableBackbone, StreamingOptions
from widefield.config.check import check_description
from widefield.registry import MODELS, ComponentOf
from widefield.streaming import StreamingCNN


class Small(StreamableBackbone):
    """A backbone as a user writes it: nothing in it knows of tiles."""

    def __init__(self, streaming: Any = None, norm_eval: bool = False, frozen: bool = False) -> None:
        super().__init__(streaming)
        self.norm_eval, self.frozen = norm_eval, frozen
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 5, 2, 2)
        self.train(self.training)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.bn1(self.conv1(x)).relu()
        return first, self.conv2(first).tanh()

    def frozen_parts(self) -> list[nn.Module]:
        return [self.conv1, self.bn1] if self.frozen else []


class OnDisk:
    """An image that is read region by region."""

    dtype = torch.float64

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.shape, self.largest = pixels, tuple(pixels.shape), 0

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        self.largest = max(self.largest, height * width)
        return self.pixels[:, y : y + height, x : x + width]


def pair(make: Any, **streaming: Any) -> tuple[Any, Any]:
    """A backbone in float64, with random running statistics, and the same one with streaming."""
    torch.manual_seed(0)
    plain, streams = make().double(), make(streaming={"tile_size": 48, **streaming}).double()
    for part in plain.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 1.5)
    assert list(plain.state_dict()) == list(streams.state_dict())
    streams.load_state_dict(plain.state_dict())
    return plain, streams


def assert_same(plain: Any, streams: Any, image: Tensor) -> None:
    """Maps, gradients of weights and image, and running statistics agree."""
    images = [image.clone().requires_grad_() for _ in range(2)]
    outs = [plain(images[0]), streams(images[1])]
    assert all(type(out) is tuple for out in outs)
    weights = [torch.rand_like(out) for out in outs[0]]
    for out in outs:
        torch.stack([(one * weight).mean() for one, weight in zip(out, weights, strict=True)]).sum().backward()
    close = {"rtol": 1e-10, "atol": 1e-10}
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, **close)
    torch.testing.assert_close(images[0].grad, images[1].grad, **close)
    for one, other in zip(plain.parameters(), streams.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
        torch.testing.assert_close(one.grad, other.grad, **close)
    for one, other in zip(plain.buffers(), streams.buffers(), strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("options", [{}, {"frozen": True}], ids=str)
def test_in_evaluation_mode_maps_and_gradients_are_those_of_whole_images(options: dict[str, Any]) -> None:
    plain, streams = pair(lambda **more: Small(**options, **more))
    assert_same(plain.eval(), streams.eval(), torch.rand(2, 3, 101, 130, dtype=torch.float64))


def test_with_norm_eval_training_is_that_of_whole_images() -> None:
    plain, streams = pair(lambda **more: Small(norm_eval=True, **more))
    assert_same(plain.train(), streams.train(), torch.rand(1, 3, 101, 130, dtype=torch.float64))


def test_with_exact_batch_statistics_training_is_that_of_whole_images() -> None:
    plain, streams = pair(Small, batch_statistics="exact")
    before = plain.bn1.running_mean.clone()
    assert_same(plain.train(), streams.train(), torch.rand(2, 3, 101, 130, dtype=torch.float64))
    assert not torch.equal(plain.bn1.running_mean, before)


NETWORKS = {
    "ResNet": lambda **more: ResNet(
        18, base_channels=4, stem_channels=4, deep_stem=True, frozen_stages=1, out_indices=(0, 3), **more
    ),
    "ResNet_CIFAR": lambda **more: ResNet_CIFAR(50, base_channels=2, stem_channels=4, **more),
    "ConvNeXt": lambda **more: ConvNeXt({"depths": [1, 1, 1, 1], "channels": [4, 4, 6, 8]}, out_indices=(0, 3), **more),
    "ConvNeXt maps": lambda **more: ConvNeXt(
        {"depths": [1, 1, 1, 1], "channels": [4, 4, 6, 8]}, gap_before_final_norm=False, use_grn=True, **more
    ),
    "TimmBackbone": lambda **more: TimmBackbone("resnet10t", out_indices=(0, 2), frozen_stages=1, **more),
    "MobileNetV3": lambda **more: MobileNetV3("small_050", out_indices=(2, 4), **more),
    "MobileNetV2": lambda **more: MobileNetV2(0.25, **more),
    "EfficientNet": lambda **more: EfficientNet("b0", **more),
}
SLOW = ("ResNet_CIFAR", "ConvNeXt maps", "MobileNetV2", "EfficientNet")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in NETWORKS],
)
def test_every_convolutional_backbone_streams(name: str) -> None:
    plain, streams = pair(NETWORKS[name])
    assert_same(plain.eval(), streams.eval(), torch.rand(1, 3, 97, 110, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolutional_backbone_streams_exactly_in_training(name: str) -> None:
    plain, streams = pair(NETWORKS[name], batch_statistics="exact")
    assert_same(plain.train(), streams.train(), torch.rand(2, 3, 97, 110, dtype=torch.float64))


def test_images_that_are_read_lazily_are_read_tile_by_tile_and_lists_give_lists() -> None:
    plain, streams = pair(Small)
    plain.eval()
    streams.eval()
    pixels = [torch.rand(3, 101, 130, dtype=torch.float64), torch.rand(3, 80, 90, dtype=torch.float64)]
    lazy = [OnDisk(one) for one in pixels]
    for image, outs in zip(pixels, streams(lazy), strict=True):
        for one, other in zip(plain(image[None]), outs, strict=True):
            torch.testing.assert_close(one, other)
    assert lazy[0].largest < 101 * 130
    assert torch.equal(streams(lazy[1])[1], streams(lazy)[1][1])


def test_streaming_can_be_switched_off_planned_copied_and_saved() -> None:
    _, streams = pair(Small)
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    out = streams.eval()(image)
    assert streams.streamed.plan((3, 5000, 5000)).tile_size[0] <= 5000
    for other in (copy.deepcopy(streams), pickle.loads(pickle.dumps(streams))):
        assert other.streamed is not streams.streamed
        nn.init.zeros_(other.conv2.weight)
        nn.init.zeros_(other.conv2.bias)
        assert not other(image)[1].any(), "the copy streams its own weights"
    assert torch.equal(out[1], streams(image)[1])
    streams.streamed.disable()
    torch.testing.assert_close(streams(image)[1], out[1])
    assert Small().streamed is None


def test_hooks_run_once_for_each_image_with_the_whole_maps() -> None:
    seen = []
    _, streams = pair(Small)
    streams.register_forward_hook(lambda module, args, out: seen.append(tuple(out[1].shape)))
    streams(torch.rand(1, 3, 101, 130, dtype=torch.float64))
    assert seen == [(1, 6, 26, 33)]


def test_options_are_those_of_the_engine_less_normalisation_and_processes() -> None:
    engine = inspect.signature(StreamingCNN).parameters
    ours = {field.name: field.default for field in dataclasses.fields(StreamingOptions)}
    assert set(ours) == set(engine) - {"module", "mean", "std", "value_range", "process_group"}
    assert all(engine[name].default == default for name, default in ours.items())
    backbone = Small(streaming=StreamingOptions(tile_size=[64, None], memory_budget="1GiB"))
    assert (backbone.streamed.tile_size, backbone.streamed.memory_budget) == ((64, None), 2**30)
    assert Small(streaming={}).streamed is not None


@pytest.mark.parametrize(
    ("streaming", "message"),
    [
        ({"tile": 5}, "streaming has no option 'tile'; did you mean"),
        ({"tile_size": 0}, "tile_size=0 must be a positive int"),
        ({"memory_budget": "much"}, "memory_budget='much' is not a size"),
        ({"batch_statistics": "batch"}, "batch_statistics='batch'"),
        (512, "streaming=512 must be a dictionary"),
    ],
)
def test_wrong_options_are_refused_when_the_backbone_is_made(streaming: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Small(streaming=streaming)


def test_a_transformer_says_why_it_does_not_stream() -> None:
    with pytest.raises(ValueError, match="VisionTransformer cannot stream: attention relates each patch to all others"):
        VisionTransformer(streaming={"tile_size": 512})


@pytest.mark.parametrize(
    ("streaming", "path", "message"),
    [
        (
            {"tile_sise": 64},
            ("streaming", "tile_sise"),
            "StreamingOptions has no argument 'tile_sise'; did you mean tile_size",
        ),
        ({"batch_statistics": "exakt"}, ("streaming", "batch_statistics"), "did you mean 'exact'"),
        ({"tile_size": [64, "all"]}, ("streaming", "tile_size", "1"), "got 'all'"),
    ],
)
def test_a_configuration_with_wrong_options_is_refused_before_anything_is_built(
    streaming: dict[str, Any], path: tuple[str, ...], message: str
) -> None:
    description = {"type": "ConvNeXt", "arch": "atto", "streaming": streaming}
    ((found, text),) = check_description(description, ComponentOf(MODELS, "backbone"))
    assert found == path
    assert message in str(text)
    assert not check_description({**description, "streaming": {"tile_size": [64, None]}}, ComponentOf(MODELS))


def test_a_head_behind_a_streaming_backbone_learns_what_it_would_from_whole_images() -> None:
    backbone = {"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 6, 8]}}
    head = {"type": "LinearClsHead", "num_classes": 3, "in_channels": 8}
    gradients = []
    for streaming in (None, {"tile_size": 64}):
        torch.manual_seed(0)
        parts = [MODELS.build({**backbone, "streaming": streaming}).double(), MODELS.build(head).double()]
        samples = [DataSample().set_gt_label(label) for label in (0, 2)]
        image = torch.rand(2, 3, 97, 110, dtype=torch.float64)
        parts[1].loss(parts[0](image), samples)["loss"].backward()
        gradients.append([parameter.grad for part in parts for parameter in part.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_streaming_backbone_is_built_from_a_description() -> None:
    backbone = MODELS.build({"type": "ConvNeXt", "arch": "atto", "streaming": {"tile_size": 64}})
    assert backbone.streamed.tile_size == (64, 64)
