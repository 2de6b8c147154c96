"""PNG and JPEG files: one level, no spacing (their resolution tags are made up as a rule)."""

from functools import partial
from pathlib import Path

import pyvips

from widefield.images.decoded import DecodedPixels
from widefield.images.source import Alpha, OpenedLevel, check_level, warn_of_dropped_alpha
from widefield.images.vips import dtype_of, kept_out_of_cache, load


def open_photo(path: Path, level: int, alpha: Alpha) -> OpenedLevel:
    """Open a PNG or JPEG file; see `open_image` for the errors."""
    (image,) = _open_planes(path, "keep")
    levels = ((image.height, image.width),)
    check_level(level, levels, path)
    if image.hasalpha() and alpha == "drop":
        warn_of_dropped_alpha(path, image.bands)
        image = _without_alpha(image)
    shape = (image.bands, image.height, image.width)
    return OpenedLevel(levels, None, DecodedPixels(path, shape, dtype_of(image), partial(_open_planes, path, alpha)))


def _open_planes(path: Path, alpha: Alpha) -> tuple[pyvips.Image]:
    # not at warnings: libpng and libjpeg warn of harmless colour profiles and stray bytes, which cameras do write
    with kept_out_of_cache():
        image = load(path, "sequential", fail_on="error")
        return (_without_alpha(image) if image.hasalpha() and alpha == "drop" else image,)


def _without_alpha(image: pyvips.Image) -> pyvips.Image:
    return image.extract_band(0, n=image.bands - 1)
