"""The places that a map looks at are the middles of what its entries depend on."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from widefield.registry import MODELS
from widefield.streaming import StreamingCNN

SIZE = 384


class Branches(nn.Module):
    """A convolution beside pooling, as in ResNet-D, whose middles differ."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + nn.functional.avg_pool2d(x, 2)


def vgg(padding: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=padding), nn.ReLU(), nn.AvgPool2d(2)),
    )


def resnet() -> nn.Module:
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    return nn.Sequential(*list(net.children())[:-2])


def convnext() -> nn.Module:
    return nn.Sequential(*list(timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(4, 4, 4, 8)).children())[:-1])


NETWORKS = {
    "resnet": (resnet, 0.0, 32.0),
    "convnext": (convnext, 15.5, 32.0),
    "vgg, padded": (lambda: vgg(1), 3.5, 8.0),
    "vgg, not padded": (lambda: vgg(0), 10.5, 8.0),
    "dilated": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, dilation=4, padding=2)), 5.0, 2.0),
    "padded at one side": (lambda: nn.Sequential(nn.ReflectionPad2d((0, 1, 2, 3)), nn.Conv2d(3, 4, 5, 4)), 0.0, 4.0),
    "upsampled": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Upsample(scale_factor=2, mode="bilinear")), 0.5, 2.0),
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 4, 4, 2, 1)), 0.5, 2.0),
    "branches": (Branches, 0.25, 2.0),
}


def plain_sums(module: nn.Module) -> nn.Module:
    """The module with convolutions that weigh all places they read alike, so that middles are not blurred by chance."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            part.weight.data[:] = part.weight.data.mean((2, 3), keepdim=True)
    return module.double().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_cells_lie_where_the_gradient_of_the_image_has_its_middle(name: str) -> None:
    torch.manual_seed(0)
    make, origin, stride = NETWORKS[name]
    module = plain_sums(make())
    cells = StreamingCNN(module).cells((3, SIZE, SIZE - 30))
    assert (cells.origin[0], cells.stride[0]) == (origin, stride)
    image = torch.rand(1, 3, SIZE, SIZE - 30, dtype=torch.float64, requires_grad=True)
    result = module(image)
    assert cells.size == result.shape[2:]  # the map of a ConvNeXt ends before the image of 354 pixels does
    places = torch.arange(SIZE, dtype=torch.float64)
    first = cells.size[0] // 2
    found = []
    for j in (first, first + 1):  # of an upsampled map neighbours look at the same place, and are right on average
        (gradient,) = torch.autograd.grad(result[0, :, j].sum(), image, retain_graph=True)
        weight = gradient.abs().sum((0, 1, 3))
        found.append(float((weight * places).sum() / weight.sum()))
    assert sum(found) / 2 == pytest.approx(origin + stride * (first + 0.5), abs=0.5)


def test_any_layer_and_the_map_before_attention_can_be_asked_for() -> None:
    network = StreamingCNN(nn.Sequential(vgg(1), nn.Conv2d(4, 4, 3)))
    assert network.cells((3, 64, 64), "0.3").origin == (0.5, 0.5)
    assert network.cells((3, 64, 64), "0").size == (8, 8)
    assert network.cells((3, 64, 64)).size == (6, 6)
    arch = {"embed_dims": 16, "num_layers": 1, "num_heads": 2, "feedforward_channels": 16}
    tokens = MODELS.build({"type": "VisionTransformer", "arch": arch, "img_size": 32, "patch_size": 8})
    cells = StreamingCNN(tokens, unsupported="run_whole").cells((3, 32, 32), "layers.0.ln1")
    assert (cells.size, cells.origin, cells.stride) == ((4, 4), (3.5, 3.5), (8.0, 8.0))


def test_a_layer_that_is_not_there_is_told_with_near_ones() -> None:
    streamed = StreamingCNN(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), verify=False)
    with pytest.raises(ValueError, match=r"layer='11' is no layer of the module; .* such as 1"):
        streamed.cells((3, 40, 40), layer="11")
