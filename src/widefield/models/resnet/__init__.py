"""ResNets that stream."""

from widefield.models.resnet.resnet import StreamingResNet, split_resnet

__all__ = ["StreamingResNet", "split_resnet"]
