"""The components of Widefield: names, homes and summaries, so that they can be listed without being imported."""

from widefield.registry.registry import Entry

_HOME = "widefield.components"

# Replaceable are those that the tutorials of MMPretrain have their readers write: the reader's takes the place of ours.
COMPONENTS = (
    Entry("ResNet", f"{_HOME}.backbones.resnet:ResNet", "backbone", "ResNet of depth 18, 34, 50, 101 or 152."),
    Entry(
        "ResNet_CIFAR",
        f"{_HOME}.backbones.resnet_cifar:ResNet_CIFAR",
        "backbone",
        "ResNet for images of 32 x 32 pixels: a 3 x 3 stem of stride 1, and no pooling behind it.",
        replaceable=True,
    ),
    Entry(
        "GlobalAveragePooling",
        f"{_HOME}.necks.gap:GlobalAveragePooling",
        "neck",
        "The average of each channel over all positions.",
        replaceable=True,
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
