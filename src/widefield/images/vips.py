"""Decoding through libvips, always in the calling thread.

`Region.fetch` is used and never `write_to_memory`, `numpy` or `thumbnail`: those start libvips' thread pool, after
which a forked process (a DataLoader worker on Linux) hangs for good at its own first use of the pool.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyvips

from widefield.images.pixel_source import cannot_read

_DTYPES: dict[str, np.dtype] = {
    "uchar": np.dtype("u1"),
    "char": np.dtype("i1"),
    "ushort": np.dtype("u2"),
    "short": np.dtype("i2"),
    "uint": np.dtype("u4"),
    "int": np.dtype("i4"),
    "float": np.dtype("f4"),
    "double": np.dtype("f8"),
}
OpenPlanes = Callable[[], tuple[pyvips.Image, ...]]
"""Opens images of one size anew; their bands, one image after the other, are the channels."""

_NOT_RGB = ("lab", "labs", "labq", "xyz", "yxy", "lch", "cmc")


_OPENING = Lock()


@contextmanager
def kept_out_of_cache() -> Iterator[None]:
    """Keep what is opened in this block out of libvips' operation cache, which empties it.

    The cache belongs to the process. It would keep an image alive after its last user, with three rows of decoded tiles
    (0.2 GB after a dozen slides), and give the earlier pixels of a file that was written again under its name.
    """
    with _OPENING:
        size = pyvips.cache_get_max()
        pyvips.cache_set_max(0)
        try:
            yield
        finally:
            pyvips.cache_set_max(size)


def load(path: Path, access: str, fail_on: str, source: pyvips.Source | None = None, **options: Any) -> pyvips.Image:
    """A libvips image of `path`, in grey, RGB or as many bands as there are; alpha included.

    Args:
        path: The file.
        access: "random", for what libvips reads in any order, or "sequential".
        fail_on: The least fault that is an error; below it libvips gives grey or black for what it cannot decode.
        source: What is decoded instead of the file itself.
        options: Of the loader: page, subifd.

    Raises:
        ImageReadError: libvips has no loader for it, or the pixels have a type or colour space that we don't read.
    """
    forget_errors()
    options = {"access": access, "fail_on": fail_on, **options}
    try:
        if source is None:
            image = pyvips.Image.new_from_file(str(path), **options)
        else:
            image = pyvips.Image.new_from_source(source, "", **options)
        if image.interpretation == "cmyk":
            image = image.colourspace("srgb")
    except pyvips.Error as error:
        raise cannot_read(path, describe(error)) from error
    if image.format not in _DTYPES:
        raise cannot_read(path, f"its pixels are of type {image.format}; expected integers or floats")
    if image.interpretation in _NOT_RGB:
        raise cannot_read(path, f"its colour space is {image.interpretation}; convert it to RGB first")
    return image


def dtype_of(image: pyvips.Image) -> np.dtype:
    """The numpy type of the pixels of an image from `load`."""
    return _DTYPES[image.format]


def fetch(path: Path, region: pyvips.Region, dtype: np.dtype, y: int, x: int, height: int, width: int) -> np.ndarray:
    """Pixels of type `dtype` as an array (height, width, bands); an ImageReadError naming `path` if they are damaged.

    A `pyvips.Region` belongs to the thread that made it.
    """
    forget_errors()
    try:
        data = region.fetch(x, y, width, height)
    except pyvips.Error as error:
        where = f"y={y}, x={x}, height={height}, width={width}"
        raise cannot_read(path, f"truncated or corrupt data in the region {where} ({describe(error)})") from error
    return np.frombuffer(data, dtype).reshape(height, width, -1)


def forget_errors() -> None:
    """Empty libvips' list of errors, which keeps warnings about files that were read well, before an operation.

    The list belongs to the process: what another thread fails at in the meantime can still get into a message.
    """
    pyvips.vips_lib.vips_error_clear()


def describe(error: pyvips.Error) -> str:
    """Return the last messages of libvips in one line."""
    lines = dict.fromkeys(line.strip() for line in error.detail.splitlines() if line.strip())
    return "; ".join(lines) or error.message
