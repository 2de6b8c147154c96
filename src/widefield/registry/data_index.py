"""Data sets and transforms by name, so that they can be listed without being imported."""

from widefield.registry.registry import Entry, Registry

_HOME = "widefield.data"
_TORCHVISION = (
    "AugMix",
    "AutoAugment",
    "CenterCrop",
    "ColorJitter",
    "ElasticTransform",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "Identity",
    "JPEG",
    "Normalize",
    "Pad",
    "RGB",
    "RandAugment",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomAutocontrast",
    "RandomChannelPermutation",
    "RandomCrop",
    "RandomEqualize",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomInvert",
    "RandomPerspective",
    "RandomPhotometricDistort",
    "RandomPosterize",
    "RandomResize",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomShortestSize",
    "RandomSolarize",
    "RandomVerticalFlip",
    "RandomZoomOut",
    "Resize",
    "ScaleJitter",
    "TrivialAugmentWide",
)
"""Those of `torchvision.transforms.v2` that take an image, and whose arguments can be written down."""

DATASETS = Registry(
    "dataset",
    (
        Entry(
            "Datasets",
            f"{_HOME}.datasets:Datasets",
            "data module",
            "Data sets for training, validation and test, and the batches made of them.",
        ),
        Entry(
            "LabelledImages",
            f"{_HOME}.module:LabelledImages",
            "data module",
            "Labelled images of a folder, split into training, validation and test images.",
        ),
        Entry(
            "ImageFolder",
            f"{_HOME}.folder:ImageFolder",
            "dataset",
            "Image files of a folder, with a class for each of its sub-folders.",
        ),
        Entry(
            "AnnotationFile",
            f"{_HOME}.annotations:AnnotationFile",
            "dataset",
            "Image files that a text file names, with their labels.",
        ),
        Entry("CIFAR10", f"{_HOME}.cifar:CIFAR10", "dataset", "CIFAR-10: 32 x 32 pixels, ten classes."),
        Entry("CIFAR100", f"{_HOME}.cifar:CIFAR100", "dataset", "CIFAR-100: 32 x 32 pixels, a hundred classes."),
    ),
    group="widefield.datasets",
)
"""Data sets, and data modules over them."""

TRANSFORMS = Registry(
    "transform",
    (
        *(Entry(name, f"torchvision.transforms.v2:{name}", "", "from torchvision") for name in _TORCHVISION),
        Entry("MultiView", f"{_HOME}.pipeline:MultiView", "", "Several random views of an image."),
        Entry(
            "RandomResizedCropAndInterpolationWithTwoPic",
            "widefield.components.transforms:RandomResizedCropAndInterpolationWithTwoPic",
            "",
            "One random crop in two sizes: for the model and for the target generator.",
        ),
    ),
    group="widefield.transforms",
)
"""Changes of an image between a data set and the model."""
