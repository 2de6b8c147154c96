"""Evaluation of a pipeline of libvips.

`Region.fetch` computes in the calling thread. `numpy`, `avg` and `write_to_memory` would start libvips' thread pool, after
which a forked process (a DataLoader worker on Linux) hangs at its own first use of the pool. Some operations of libvips use the
pool as soon as they are made, for a matrix or a background colour: the package's docstring says what follows from that.
"""

from collections.abc import Iterator

import numpy as np
import pyvips

from widefield.images import ImageReadError
from widefield.images.photos import describe, dtype_of, forget_errors
from widefield.transforms.values import full_scale

BLOCK = 512
"""Side of the square blocks, in pixels, that are computed at a time: what a rotation reads for one is hardly larger."""

SHARED_TILE = 256
SHARED_TILES = 32
"""Side of the tiles, and how many of them, that are kept of an image with several readers: more than a block overlaps."""


def opened_sequentially(image: pyvips.Image) -> bool:
    """True if the file can be decoded from top to bottom only."""
    return bool(image.get_typeof("vips-sequential"))


def blocks(image: pyvips.Image) -> Iterator[tuple[int, int, np.ndarray]]:
    """All pixels, as (y, x, array (height, width, channels)) of one block after the other, in strips where it must be.

    Raises:
        ImageReadError: A file that the image comes from is damaged, or was opened for another order of reading.
    """
    height, width = BLOCK, BLOCK
    if opened_sequentially(image):
        height, width = max(1, BLOCK * BLOCK // image.width), image.width
    region = pyvips.Region.new(image)
    for y in range(0, image.height, height):
        for x in range(0, image.width, width):
            size = min(height, image.height - y), min(width, image.width - x)
            forget_errors()
            try:
                data = region.fetch(x, y, size[1], size[0])
            except pyvips.Error as error:
                hint = ""
                if opened_sequentially(image):
                    hint = '; it was opened with access="sequential", leave that out if pixels are moved or read twice'
                raise ImageReadError(f"cannot read the pixels of the image: {describe(error)}{hint}") from error
            yield y, x, np.frombuffer(data, dtype_of(image)).reshape(*size, image.bands)


def read(image: pyvips.Image, channels_first: bool) -> np.ndarray:
    """All pixels, as a contiguous array (channels, height, width) or (height, width, channels)."""
    full_scale(image)  # refuses complex pixels, which have no type here
    size = image.height, image.width
    pixels = np.empty((image.bands, *size) if channels_first else (*size, image.bands), dtype_of(image))
    channels_last = pixels.transpose(1, 2, 0) if channels_first else pixels
    for y, x, block in blocks(image):
        channels_last[y : y + block.shape[0], x : x + block.shape[1]] = block
    return pixels


def mean(image: pyvips.Image) -> float:
    """The mean of all pixels and channels; reads them."""
    return sum(float(block.sum(dtype=np.float64)) for _, _, block in blocks(image)) / (
        image.width * image.height * image.bands
    )


def shared(image: pyvips.Image) -> pyvips.Image:
    """`image` for several readers: libvips would compute all that lies before it anew for each of them."""
    if opened_sequentially(image):
        return image.tilecache(tile_width=image.width, tile_height=16, max_tiles=SHARED_TILES, access="sequential")
    return image.tilecache(tile_width=SHARED_TILE, tile_height=SHARED_TILE, max_tiles=SHARED_TILES, access="random")
