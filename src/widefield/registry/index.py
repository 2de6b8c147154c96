"""The components of Widefield: names, homes and summaries, so that they can be listed without being imported."""

from widefield.registry.registry import Entry

_HOME = "widefield.components"

COMPONENTS = (
    Entry("ResNet", f"{_HOME}.backbones.resnet:ResNet", "backbone", "ResNet of depth 18, 34, 50, 101 or 152."),
    Entry(
        "ResNet_CIFAR",
        f"{_HOME}.backbones.resnet_cifar:ResNet_CIFAR",
        "backbone",
        "ResNet for images of 32 x 32 pixels: a 3 x 3 stem of stride 1, and no pooling behind it.",
    ),
    Entry(
        "GlobalAveragePooling",
        f"{_HOME}.necks.gap:GlobalAveragePooling",
        "neck",
        "The average of each channel over all positions.",
    ),
    Entry(
        "ClsHead",
        f"{_HOME}.heads.cls_head:ClsHead",
        "head",
        "Classification head without parameters: its input are scores.",
    ),
    Entry("LinearClsHead", f"{_HOME}.heads.linear_head:LinearClsHead", "head", "Classification by one linear layer."),
    Entry(
        "CrossEntropyLoss",
        f"{_HOME}.losses.cross_entropy_loss:CrossEntropyLoss",
        "loss",
        "Cross-entropy of class indices, of soft labels, or of independent labels.",
    ),
)
