"""Networks of other libraries, with random weights, for `widefield bench` and benchmarks/predictions.py.

After `uv pip install --no-deps segmentation-models-pytorch`:

    uv run --no-sync widefield bench --model benchmarks/networks.py:unet --budget 1/3
    uv run --no-sync widefield bench --model benchmarks/networks.py:unet_group_norm --budget 0.4
"""

from torch import nn


def unet() -> nn.Module:
    """Return a U-Net with a ResNet-34 and batch norm, of segmentation_models_pytorch."""
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None)


def unet_group_norm() -> nn.Module:
    """Return the same with group norm in place of batch norm, in groups of 8 channels."""
    network = unet()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(child.num_features // 8, child.num_features))
    return network


def monai_unet() -> nn.Module:
    """Return MONAI's U-Net with instance norm and residual units."""
    from monai.networks.nets.unet import UNet

    return UNet(2, 3, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)
