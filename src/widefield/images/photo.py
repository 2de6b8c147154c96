"""PNG and JPEG files: one level, no spacing (their resolution tags are made up as a rule)."""

from functools import partial
from pathlib import Path

import pyvips

from widefield.images.decoded import DecodedPixels
from widefield.images.source import OpenedLevel, check_level
from widefield.images.vips import dtype_of, kept_out_of_cache, load


def open_photo(path: Path, level: int) -> OpenedLevel:
    """Open a PNG or JPEG file; see `open_image` for the errors."""
    (image,) = _open_planes(path)
    levels = ((image.height, image.width),)
    check_level(level, levels, path)
    shape = (image.bands, image.height, image.width)
    return OpenedLevel(levels, None, DecodedPixels(path, shape, dtype_of(image), partial(_open_planes, path)))


def _open_planes(path: Path) -> tuple[pyvips.Image]:
    # not at warnings: libpng and libjpeg warn of harmless colour profiles and stray bytes, which cameras do write
    with kept_out_of_cache():
        image = load(path, "sequential", fail_on="error")
        return (image.extract_band(0, n=image.bands - 1) if image.hasalpha() else image,)
