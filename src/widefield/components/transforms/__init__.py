"""What is drawn for each image of masked image modelling, for data sets and models alike."""

from widefield.components.transforms.masks import MASK_GENERATORS, BEiTMaskGenerator, RandomMaskGenerator
from widefield.components.transforms.two_pictures import RandomResizedCropAndInterpolationWithTwoPic

__all__ = ["MASK_GENERATORS", "BEiTMaskGenerator", "RandomMaskGenerator", "RandomResizedCropAndInterpolationWithTwoPic"]
