"""Images with labels: tables, folders, CIFAR; transforms of them; and the Lightning data modules over them."""

from widefield.data.cifar import CIFAR10, CIFAR100
from widefield.data.datasets import Datasets, collate_items
from widefield.data.described import AnnotationFile, DescribedDataset, ImageFolder
from widefield.data.labelled_images import Batch, EpochShuffle, ImageDataset, LabelledImages, LazyImages, collate
from widefield.data.labels import Columns, LabelledImage, LabelTable, read_labels
from widefield.data.paired_images import PairedImages
from widefield.data.pipeline import MultiView, Pipeline
from widefield.data.segmented_images import SegmentedImages
from widefield.data.splits import stratified_split
from widefield.data.tables import LabelError
from widefield.data.targets import Target, Task
from widefield.registry import DATASETS, TRANSFORMS

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DATASETS",
    "TRANSFORMS",
    "AnnotationFile",
    "Batch",
    "Columns",
    "Datasets",
    "DescribedDataset",
    "EpochShuffle",
    "ImageDataset",
    "ImageFolder",
    "LabelError",
    "LabelTable",
    "LabelledImage",
    "LabelledImages",
    "LazyImages",
    "MultiView",
    "PairedImages",
    "Pipeline",
    "SegmentedImages",
    "Target",
    "Task",
    "collate",
    "collate_items",
    "read_labels",
    "stratified_split",
]
