"""Masks and crops of masked image modelling, drawn for each image, for data sets and models alike."""

from widefield.components.transforms.masks import MASK_GENERATORS, BEiTMaskGenerator, RandomMaskGenerator
from widefield.components.transforms.two_pictures import RandomResizedCropAndInterpolationWithTwoPic

__all__ = ["MASK_GENERATORS", "BEiTMaskGenerator", "RandomMaskGenerator", "RandomResizedCropAndInterpolationWithTwoPic"]
