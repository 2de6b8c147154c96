"""Figures that are written as PNG files."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from widefield.writing import replacing


def new_figure(width: float = 6.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches with one pair of axes, which needs no display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file; whole or not at all."""
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")
