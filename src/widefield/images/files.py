"""Image files in folders: the one list of how their names end, and the one search for them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

IMAGE_ENDINGS = (
    *(".bmp", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *(".btf", ".ndpi", ".qptiff", ".scn", ".svs", ".tf2", ".tf8"),  # TIFF and BigTIFF, mostly slides, by other names
)
"""Endings of the names of image files, in lower case; upper case counts too. Files beside an image (`scene.tif.aux.xml`,
`scene.tfw`, `scene.tif.ovr`) end otherwise."""


def is_image_name(name: str, endings: Sequence[str] = IMAGE_ENDINGS) -> bool:
    """Return True if `name` has one of `endings`, in whatever case."""
    return name.lower().endswith(tuple(ending.lower() for ending in endings))


def images_below(folder: Path, endings: Sequence[str] = IMAGE_ENDINGS) -> list[Path]:
    """Return the image files in `folder` and all folders below, in the order of their paths from it.

    Links are followed; hidden files and folders are left out. Nothing is opened, so a file may still turn out to be no image.

    Args:
        folder: Where to look; one that does not exist holds none.
        endings: How the names of files end, in whatever case.
    """
    found = (path for path in _walk(folder) if is_image_name(path.name, endings))
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        parent = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(parent / name)]
        yield from (parent / name for name in names if not name.startswith("."))


def _leads_back(path: Path) -> bool:
    """Return True if `path` is a link to a folder above it, so that following it would never end."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
