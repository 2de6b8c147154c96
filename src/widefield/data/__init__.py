"""Label tables, datasets of lazy images, and the Lightning data module over them."""

from widefield.data.dataset import Batch, EpochShuffle, ImageDataset, collate
from widefield.data.labels import LabelError, LabelledImage, LabelTable, read_labels
from widefield.data.module import LabelledImages
from widefield.data.split import stratified_split

__all__ = [
    "Batch",
    "EpochShuffle",
    "ImageDataset",
    "LabelError",
    "LabelTable",
    "LabelledImage",
    "LabelledImages",
    "collate",
    "read_labels",
    "stratified_split",
]
