"""Image files in folders: the one list of how their names end, and the one search for them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from widefield.errors import WrongArgumentError
from widefield.images.formats import image_formats

OTHER_PICTURES = (
    *(".apng", ".avif", ".dds", ".dib", ".exr", ".heic", ".heif", ".ico", ".j2c"),
    *(".jpf", ".jpx", ".jxl", ".mpo", ".pcx", ".psd", ".sgi", ".tga"),
)
"""Endings of pictures that are not read, unless a format has them, see `image_endings`."""


def image_endings() -> tuple[str, ...]:
    """Endings of the names of image files, in lower case, of all formats; upper case counts too.

    Files beside an image (`scene.tif.aux.xml`, `scene.tfw`, `scene.tif.ovr`) end otherwise.
    """
    return tuple(sorted({ending for one in image_formats() for ending in one.endings}))


def is_image_name(name: str, endings: Sequence[str] | None = None) -> bool:
    """Return True if `name` has one of `endings` (by default those of all formats), in whatever case.

    Raises:
        ValueError: `name` is no text, or `endings` are no list of texts.
    """
    if not isinstance(name, str):
        raise WrongArgumentError(f"name={name!r}; expected the name of a file")
    return name.lower().endswith(_checked(endings))


def _checked(endings: Sequence[str] | None) -> tuple[str, ...]:
    """Endings in lower case; a ValueError unless they are several, as the letters of one are endings of most names."""
    if endings is None:
        return image_endings()
    if not isinstance(endings, (list, tuple, set, frozenset)) or not all(
        isinstance(one, str) and one for one in endings
    ):
        raise WrongArgumentError(
            f"endings={endings!r}; expected a list such as ['.tif', '.svs'], or None for all formats"
        )
    return tuple(ending.lower() for ending in endings)


def images_below(folder: Path, endings: Sequence[str] | None = None) -> list[Path]:
    """Return the images in `folder` and all folders below, in the order of their paths from it.

    Links are followed; hidden files and folders are left out, and so are the files that a slide of Hamamatsu (`.vms`) names and the
    folder of an OIF. A folder with the ending of an image (`scan.zarr`) is one. No image is opened, so a file may still turn out to
    be none.

    Args:
        folder: Where to look; one that does not exist holds none.
        endings: How the names of images end, in whatever case; by default as those of all formats.

    Raises:
        ValueError: `folder` is no path, or `endings` are no list of texts.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise WrongArgumentError(f"folder={folder!r}; expected the path of a folder")
    folder = Path(folder)
    return sorted(_walk(folder, _checked(endings)), key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path, endings: Sequence[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        parent = Path(place)
        parts = _parts(parent, names)
        names = [name for name in names if name not in parts]
        folders[:] = [name for name in folders if name not in parts]
        seen = [name for name in folders if not name.startswith(".") and not _leads_back(parent / name)]
        images = [name for name in seen if is_image_name(name, endings)]
        folders[:] = [name for name in seen if name not in images]
        yield from (parent / name for name in images)
        yield from (parent / name for name in names if not name.startswith(".") and is_image_name(name, endings))


def _parts(folder: Path, names: Sequence[str]) -> set[str]:
    """The names in `folder` of what belongs to another image there."""
    found = {f"{name}.files" for name in names if name.lower().endswith(".oif")}
    for name in names:
        if name.lower().endswith((".vms", ".vmu")):
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                found.update(line.partition("=")[2].strip() for line in file.read(2**16).splitlines())
    return found


def _leads_back(path: Path) -> bool:
    """Return True if `path` is a link to a folder above it, so that following it would never end."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())
