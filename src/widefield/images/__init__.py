"""Lazily read images: one object, whatever the file, that reads a region without loading the rest."""

from widefield.images.background import Background, ForegroundChoice
from widefield.images.files import OTHER_PICTURES, image_endings, images_below, is_image_name
from widefield.images.foreground import Mask, foreground
from widefield.images.formats import Alpha, ImageReadError, warn_of_dropped_alpha
from widefield.images.image import ImageFile, open_image
from widefield.images.label_maps import LabelMap, LabelMapError, open_labels
from widefield.images.map_target import map_target
from widefield.images.polygons import polygons
from widefield.images.thumbnail import thumbnail

__all__ = [
    "OTHER_PICTURES",
    "Alpha",
    "Background",
    "ForegroundChoice",
    "ImageFile",
    "ImageReadError",
    "LabelMap",
    "LabelMapError",
    "Mask",
    "foreground",
    "image_endings",
    "images_below",
    "is_image_name",
    "map_target",
    "open_image",
    "open_labels",
    "polygons",
    "thumbnail",
    "warn_of_dropped_alpha",
]
