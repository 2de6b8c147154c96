"""ResNets with fewer channels than torchvision's, for small data and small machines."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

NARROW_RESNETS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet10_w16": ((1, 1, 1, 1), 16),
    "resnet18_w8": ((2, 2, 2, 2), 8),
    "resnet18_w16": ((2, 2, 2, 2), 16),
    "resnet18_w32": ((2, 2, 2, 2), 32),
}
"""Name -> blocks per stage, channels of the first stage."""


class NarrowResNet(nn.Module):
    """A ResNet of basic blocks, laid out and named as torchvision's `resnet18`, with `width` instead of 64 channels.

    He et al., Deep Residual Learning for Image Recognition, 2015, table 1; each stage doubles the channels.

    Args:
        blocks: Number of blocks of each of the four stages.
        width: Channels of the first stage.
        num_classes: Outputs of the last layer.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
