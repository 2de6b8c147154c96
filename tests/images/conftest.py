"""Pictures to write in every format."""

import numpy as np
import pytest


def picture() -> np.ndarray:
    """A uint8 picture (height, width, 3) whose size no tile divides; noise, so that a shifted region shows."""
    return np.random.default_rng(0).integers(0, 256, (201, 333, 3), dtype=np.uint8)


@pytest.fixture
def rgb() -> np.ndarray:
    """The picture as an array (height, width, 3)."""
    return picture()


@pytest.fixture
def chw(rgb: np.ndarray) -> np.ndarray:
    """The same as an image gives it: (3, height, width)."""
    return rgb.transpose(2, 0, 1)
