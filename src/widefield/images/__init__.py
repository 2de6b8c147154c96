"""Lazily read images: one object, whatever the file, that reads a region without loading the rest."""

from widefield.images.files import IMAGE_ENDINGS, images_below, is_image_name
from widefield.images.image import ImageFile, open_image, thumbnail
from widefield.images.pixel_source import Alpha, ImageReadError, warn_of_dropped_alpha

__all__ = [
    "IMAGE_ENDINGS",
    "Alpha",
    "ImageFile",
    "ImageReadError",
    "images_below",
    "is_image_name",
    "open_image",
    "thumbnail",
    "warn_of_dropped_alpha",
]
