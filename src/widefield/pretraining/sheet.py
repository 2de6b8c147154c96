"""Pictures side by side in one."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from widefield.pretraining.views import to_unit

CELL, GAP = 112, 4
"""Longest side of a picture, and the space between two, in pixels."""


def sheet(rows: Sequence[Sequence[Tensor]]) -> bytes:
    """A PNG of rows of pictures (C, H, W), uint8 or floats from 0 to 1: their first three channels, or the first one as grey."""
    step = CELL + GAP
    canvas = np.full((step * len(rows) + GAP, step * max(map(len, rows)) + GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            small = _small(picture)
            top, left = GAP + y * step, GAP + x * step
            canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(png: bytes) -> np.ndarray:
    """uint8 (height, width, 3) of a PNG of colours."""
    return np.array(Image.open(io.BytesIO(png)))


def _small(picture: Tensor) -> np.ndarray:
    """uint8 (height, width, 3) of at most a cell."""
    shown = to_unit(picture[:3] if len(picture) >= 3 else picture[:1], None).expand(3, -1, -1)
    scale = CELL / max(shown.shape[1:])
    size = [max(1, round(side * scale)) for side in shown.shape[1:]]
    resized = F.resize(shown, size, antialias=True).clamp(0, 1) * 255
    return resized.round().to(torch.uint8).permute(1, 2, 0).numpy()
