"""U-Nets of segmentation_models_pytorch, for `widefield bench`.

After `uv pip install --no-deps segmentation-models-pytorch`:

    uv run --no-sync widefield bench --model benchmarks/networks.py:unet --budget 1/3
    uv run --no-sync widefield bench --model benchmarks/networks.py:unet_group_norm --budget 0.4
"""

import segmentation_models_pytorch as smp
from torch import nn


def unet() -> nn.Module:
    """Return a U-Net with a ResNet-34 and batch norm, with random weights."""
    return smp.Unet("resnet34", encoder_weights=None)


def unet_group_norm() -> nn.Module:
    """Return the same with group norm in place of batch norm, in groups of 8 channels."""
    network = unet()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(child.num_features // 8, child.num_features))
    return network
