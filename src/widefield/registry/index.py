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
    Entry(
        "LabelSmoothLoss",
        f"{_HOME}.losses.label_smooth_loss:LabelSmoothLoss",
        "loss",
        "Cross-entropy of smoothed labels.",
    ),
    Entry("L1Loss", f"{_HOME}.losses.l1_loss:L1Loss", "loss", "Absolute difference of predictions and targets."),
    Entry(
        "PixelReconstructionLoss",
        f"{_HOME}.losses.pixel_reconstruction_loss:PixelReconstructionLoss",
        "loss",
        "Difference of predicted and true values of masked patches.",
    ),
    Entry(
        "CosineSimilarityLoss",
        f"{_HOME}.losses.cosine_similarity_loss:CosineSimilarityLoss",
        "loss",
        "shift - scale * cosine of the angle between prediction and target.",
    ),
    Entry(
        "FocalLoss",
        f"{_HOME}.losses.focal_loss:FocalLoss",
        "loss",
        "Binary cross-entropy of each class, in which what is right already counts little.",
    ),
    Entry(
        "AsymmetricLoss",
        f"{_HOME}.losses.asymmetric_loss:AsymmetricLoss",
        "loss",
        "Focal loss with one exponent for positive labels and another for negative ones.",
    ),
)
