"""Networks of segmentation_models.pytorch and MONAI train with the loss inside, exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.streaming.exactness import TOLERANCE, randomise, relative_error
from widefield.components.losses.dense_losses import DiceLoss
from widefield.modules import DenseModule

CLASSES = 3


def smp(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network with timm's smallest encoder, of strides up to 8."""

    def make() -> nn.Module:
        library = pytest.importorskip("segmentation_models_pytorch")
        encoder = {"encoder_name": "tu-test_resnet", "encoder_depth": 3, "encoder_weights": None}
        return getattr(library, name)(**{**encoder, "classes": CLASSES, **options})

    return make


def monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of two dimensions with few channels."""

    def make() -> nn.Module:
        nets = pytest.importorskip("monai.networks.nets")
        return getattr(nets, name)(**{"spatial_dims": 2, "in_channels": 3, "out_channels": CLASSES, **options})

    return make


LEVELS = {"channels": (4, 8, 8), "strides": (2, 2)}
NETWORKS = {
    "smp Unet": smp("Unet", decoder_channels=(8, 8, 4)),
    "monai UNet, instance norm": monai("UNet", **LEVELS),
}
MORE = {
    "smp Unet, scSE": smp("Unet", decoder_channels=(16, 16, 16), decoder_attention_type="scse"),
    "smp UnetPlusPlus": smp("UnetPlusPlus", decoder_channels=(8, 8, 4)),
    "smp Linknet": smp("Linknet"),
    "smp FPN": smp("FPN", encoder_depth=5, decoder_pyramid_channels=32, decoder_segmentation_channels=32),
    "smp PSPNet": smp("PSPNet", psp_out_channels=8),
    "smp DeepLabV3": smp("DeepLabV3", encoder_depth=5, encoder_name="mobilenet_v2", decoder_channels=8),
    "smp DeepLabV3Plus": smp("DeepLabV3Plus", encoder_depth=5, encoder_name="mobilenet_v2", decoder_channels=8),
    "smp PAN": smp("PAN", encoder_depth=5, encoder_name="mobilenet_v2", decoder_channels=8),
    "smp UPerNet": smp("UPerNet", encoder_depth=5, decoder_channels=8),
    "smp Segformer": smp("Segformer", encoder_depth=5, decoder_segmentation_channels=8),
    "monai UNet, batch norm, residuals": monai("UNet", **LEVELS, num_res_units=1, norm="BATCH"),
    "monai BasicUNet": monai("BasicUNet", features=(4, 4, 8, 8, 8, 4)),
    "monai BasicUNetPlusPlus": monai("BasicUNetPlusPlus", features=(4, 4, 8, 8, 8, 4)),
    "monai AttentionUnet": monai("AttentionUnet", **LEVELS),
    "monai SegResNet": monai("SegResNet", init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    "monai DynUNet": monai(
        "DynUNet", kernel_size=(3, 3, 3), strides=(1, 2, 2), upsample_kernel_size=(2, 2), filters=(4, 8, 8)
    ),
    "monai FlexibleUNet": monai("FlexibleUNet", backbone="efficientnet-b0", decoder_channels=(8, 8, 8, 8, 4)),
}


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_step_has_the_loss_and_the_gradients_of_plain_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = randomise((NETWORKS | MORE)[name]()).double().eval()
    generator = torch.Generator().manual_seed(1)
    size = (128, 128) if name == "smp PAN" else (64, 96)  # which pools the deepest map three times
    image = torch.rand(1, 3, *size, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, CLASSES, (1, *size), dtype=torch.uint8, generator=generator)
    labels[:, 5:9, 7:] = 255
    made = net(image)
    expected = DiceLoss()(made[0] if isinstance(made, (list, tuple)) else made, labels)
    dense = DenseModule(net, CLASSES, loss="dice", tile_size=32, verify=False)
    monkeypatch.setattr(dense, "log", lambda *_, **__: None)
    found = dense.training_step((image, labels), 0)
    assert relative_error(found, expected) <= TOLERANCE
    weights = list(net.parameters())
    gradients = [
        torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True) for loss in (found, expected)
    ]
    scale = max(float(grad.abs().max()) for grad in gradients[1])
    for one, other in zip(*gradients, strict=True):
        if other.abs().max() <= 1e-13 * scale:  # zero but for rounding, as of a bias that a norm takes away
            assert one.abs().max() <= 1e-13 * scale
        else:
            assert float((one - other).abs().max()) <= TOLERANCE * max(float(other.abs().max()), 1e-4 * scale)
