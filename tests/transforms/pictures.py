"""Noise as arrays and as pyvips images."""

import numpy as np
import pyvips

from widefield.transforms.reading import read

DTYPES = ("uint8", "uint16", "float32")


def noise(dtype: str = "uint8", channels: int = 3, height: int = 41, width: int = 67, seed: int = 0) -> np.ndarray:
    """An array (height, width, channels) over the whole range of the dtype, both ends included; 0..1 for floats."""
    generator = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return generator.random((height, width, channels), dtype)
    pixels = generator.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)
    pixels[0, :2] = [[0], [np.iinfo(dtype).max]]
    return pixels


def smooth(height: int = 120, width: int = 160) -> np.ndarray:
    """A uint8 array (height, width, 1) of a few soft blobs, for what interpolates."""
    y, x = np.mgrid[:height, :width]
    return (127 + 60 * np.sin(x / 17) + 60 * np.cos(y / 13 + x / 40)).astype(np.uint8)[..., None]


def vips(array: np.ndarray) -> pyvips.Image:
    """The array (height, width, channels) as an image."""
    return pyvips.Image.new_from_array(array)


def array(image: pyvips.Image) -> np.ndarray:
    """The image as an array (height, width, channels)."""
    return read(image, channels_first=False)
